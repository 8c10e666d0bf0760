#!/bin/sh
# Build the wheel of bpkit into build/packages/wheels, as it would be uploaded.
set -eu
cd "$(dirname "$0")/../.."
into=build/packages
rm -rf $into/source $into/wheels
mkdir -p $into/source
# From a copy: setuptools keeps a build/lib in the tree, and would put files into the wheel that are long gone.
cp -R bpkit plugins exported pyproject.toml README.md LICENSE $into/source
"${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir $into/wheels $into/source
rm -rf $into/source
