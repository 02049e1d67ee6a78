# What scripts share that run ready binaries on a node; sourced with their arguments: a folder made by tests/gpu_pack.sh and a folder
# for results. Sets bin, out, gpus (how many there are) and failed, and has `part`.
bin=$(cd "${1:?a folder made by tests/gpu_pack.sh}" && pwd)
out=${2:?an output folder}
mkdir -p "$out"
out=$(cd "$out" && pwd)
gpus=$(ls /dev 2>/dev/null | grep -cE '^nvidia[0-9]+$')
failed=0
part() { # name, command...
  local name=$1 begin=$SECONDS
  shift
  "$@" >"$out/$name.log" 2>&1
  local rc=$?
  [ $rc = 0 ] || failed=1
  printf '%-8s %-24s %4d s   %s\n' "$([ $rc = 0 ] && echo ok || echo FAILED)" "$name" $((SECONDS - begin)) \
    "$(grep -E '[0-9]+ ([A-Za-z]+ )*(passed|failed|skipped)|^skipped:' "$out/$name.log" | tail -1)" | tee -a "$out/summary.txt"
  return $rc
}
