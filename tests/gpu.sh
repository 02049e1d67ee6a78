#!/usr/bin/env bash
# Trains every fixture on GPU 0 through the real daemon, in fp32 and in bf16, and compares with PyTorch's fp64 results.
# Needs no compiler: takes ramtorchd from $RAMTORCHD (default: target/release/ramtorchd) and python3 for the comparison.
#   tests/gpu.sh OUT_FOLDER
set -u
here=$(cd "$(dirname "$0")" && pwd)
bin=${RAMTORCHD:-$here/../target/release/ramtorchd}
out=${1:?an output folder}
mkdir -p "$out"
if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1; then
  echo "skipped: no GPU on this machine"
  exit 0
fi
exec python3 "$here/gpu_parity.py" "$bin" "$out"
