#!/bin/sh
# Make build/packages/venv, apart from .venv: the environment in which tests/packages/try_packages.py is a new user.
set -eu
cd "$(dirname "$0")/../.."
into=build/packages
"${PYTHON:-python3}" -m venv --clear $into/venv
# torch first, by itself: with a range to choose from, pip may fetch another build of it.
$into/venv/bin/pip install --quiet -c constraints.txt torch
PYTHON=$into/venv/bin/python sh tests/packages/wheel.sh
# The extras of a trained policy; its tests train and export. The other packages need neither.
$into/venv/bin/pip install --quiet -c constraints.txt "$(echo $into/wheels/*.whl)[train,export]" pytest ruff
