#!/bin/bash
# Runs the CUDA device's tests and its benchmark on a machine with a GPU; builds nothing there.
#
#   cargo test --release -p ramtorch-cuda --test ops --no-run      (on the machine that builds; prints the binary's path)
#   worker/cuda/run_tests.sh BINARY [RESULTS_FOLDER] [FILTER...]   (on the machine with the GPU)
#
# Writes tests.log and bench.log. Each test has a process of its own, so a fault on the device ends one test and not all.
# TEST_SECONDS and BENCH_SECONDS limit the two parts; 0 leaves a part out.
# SANITIZER=memcheck|racecheck|initcheck|synccheck runs each test under that tool of compute-sanitizer besides (which comes with the
# CUDA toolkit); what it finds is in sanitizer.log. SANITIZER_SECONDS (600) limits each test.
set -u
binary=$(readlink -f "$1"); shift
results=${1:-cuda-test-results}; [ $# -gt 0 ] && shift
mkdir -p "$results"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | tee "$results/gpu.txt"
status=0
if [ "${TEST_SECONDS:-300}" != 0 ]; then
  timeout -k 5 "${TEST_SECONDS:-300}" "$binary" --isolate "$@" >"$results/tests.log" 2>&1
  status=$?
  grep -E '^(ok|skipped|FAILED) |tests (passed|skipped)' "$results/tests.log"
  grep -E -B2 -A6 "panicked at" "$results/tests.log" | grep -vE '^(ok|skipped) |RUST_BACKTRACE' | cut -c1-400 | head -80
fi
if [ -n "${SANITIZER:-}" ]; then
  sanitizer=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -1)
  if [ -z "$sanitizer" ]; then
    echo "$SANITIZER skipped: no compute-sanitizer on this machine"
  else
    : >"$results/sanitizer.log"
    clean=0 skipped=0 all=0
    # "NAME: test" for each, of those that the filters leave.
    while read -r name; do
      all=$((all + 1))
      echo "== $name" >>"$results/sanitizer.log"
      RAMTORCH_OPS_WATCHED=1 timeout -k 5 "${SANITIZER_SECONDS:-600}" "$sanitizer" --tool "$SANITIZER" --error-exitcode 97 --target-processes all \
        "$binary" --exact "$name" >>"$results/sanitizer.log" 2>&1 </dev/null
      rc=$?
      case $rc in
        0) clean=$((clean + 1)) ;;
        77) skipped=$((skipped + 1)) ;; # a test that this machine cannot do
        *)
          echo "FAILED $SANITIZER $name: exit $rc"
          status=1
          ;;
      esac
    done < <("$binary" --list "$@" 2>/dev/null | sed -n 's/: test$//p')
    echo "$SANITIZER: $clean of $all tests passed clean, $skipped skipped"
    [ "$all" -gt 0 ] || status=1
  fi
fi
if [ "${BENCH_SECONDS:-120}" != 0 ]; then
  timeout -k 5 "${BENCH_SECONDS:-120}" "$binary" --bench "$@" >"$results/bench.log" 2>&1
  cat "$results/bench.log"
fi
exit $status
