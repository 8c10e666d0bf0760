#!/bin/sh
# Install the runtimes that tests/test_export_runtimes.py tries into build/runtimes; nothing else is touched.
set -eu
cd "$(dirname "$0")/../.."
into=build/runtimes
mkdir -p $into/node
"${PYTHON:-python3}" -m venv $into/venv
# Without dependencies: OpenVINO would bring telemetry, and onnxruntime-node's script would fetch CUDA.
$into/venv/bin/pip install --quiet --no-deps -r tests/runtimes/requirements.txt
cp tests/runtimes/package.json $into/node/
npm install --prefix $into/node --ignore-scripts --no-audit --no-fund --no-package-lock
# OpenVINO's Python package has the headers and libraries for C++ too.
if command -v "${CXX:-g++}" > /dev/null; then
    openvino=$(echo "$PWD"/$into/venv/lib/python3*/site-packages/openvino)
    "${CXX:-g++}" -std=c++17 -O2 docs/examples/runtimes/network.cpp -I"$openvino/include" \
        "$openvino"/libs/libopenvino.so.* "-Wl,-rpath,$openvino/libs" -o $into/network
else
    echo "no C++ compiler: docs/examples/runtimes/network.cpp is not tried"
fi
