#!/usr/bin/env bash
# Every CUDA test on a machine with GPUs, then the benchmark table; builds nothing. Both go to a folder, with a summary.
#   tests/gpu_pack.sh FOLDER                         (on the machine that builds)
#   tests/gpu_node.sh FOLDER OUT [TABLE OPTION...]   (on the machine with GPUs, in a checkout of the same version)
# More options go to bench/gpu_table.py (--rows, --steps, --gpus N). TESTS=0 or TABLE=0 in the environment leaves a part out.
set -u
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/tests/node.sh"
shift 2
if [ "$gpus" = 0 ]; then
  echo "skipped: no GPU on this machine"
  exit 0
fi
: >"$out/summary.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$out/summary.txt"
export RAMTORCHD=$bin/ramtorchd
if [ "${TESTS:-1}" != 0 ]; then
  BENCH_SECONDS=0 part operations "$here/worker/cuda/run_tests.sh" "$bin/ops" "$out/operations"
  part parity "$here/tests/gpu.sh" "$out/parity"
  if [ "$gpus" -gt 1 ]; then
    part gpus "$here/tests/gpus.sh" "$out/gpus" "$gpus"
  else
    part gpus "$here/tests/gpus.sh" "$out/gpus" 1 repeat kill early hold log visit stream place
  fi
fi
if [ "${TABLE:-1}" != 0 ]; then
  part table python3 "$here/bench/gpu_table.py" --bin "$bin" --out "$out/table" "$@"
  cat "$out/table/table.md" 2>/dev/null | tee -a "$out/summary.txt"
fi
exit $failed
