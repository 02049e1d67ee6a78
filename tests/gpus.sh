#!/usr/bin/env bash
# Trains on N GPUs of this machine through the real daemon: the same losses as on one, the same bits run after run, when a worker
# is killed or stopped, when pages are updated beside the backward pass, when weights are streamed into the least memory, when
# gradients stay on a GPU, and without peer access; and on fewer GPUs from a checkpoint. Some minutes in all; the first failure
# does not end it.
#   tests/gpus.sh OUT_FOLDER N [CHECK...]    CHECK: repeat parity kill hang service early hold log visit stream place resize pull nop2p (default: all)
# With DEVICES=shared in the environment all ranks share one GPU.
# Needs no compiler: takes ramtorchd from $RAMTORCHD (default: target/release/ramtorchd) and python3.
set -u
here=$(cd "$(dirname "$0")" && pwd)
bin=${RAMTORCHD:-$here/../target/release/ramtorchd}
out=${1:?an output folder}
gpus=${2:?a number of GPUs}
shift 2
mkdir -p "$out"
found=$(ls /dev | grep -cE '^nvidia[0-9]+$')
wanted=$gpus
if [ "${DEVICES:-}" = shared ]; then wanted=1; fi
if [ "$found" -lt "$wanted" ]; then
  echo "skipped: $found GPUs on this machine"
  exit 0
fi
exec python3 "$here/gpus.py" "$bin" "$out" "$gpus" "$@"
