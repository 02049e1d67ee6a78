#!/usr/bin/env bash
# What docs/reliability.md promises, on a machine with GPUs (or a quiet one without); builds nothing.
#   tests/gpu_pack.sh FOLDER                              (on the machine that builds)
#   tests/reliability_node.sh FOLDER OUT [PART...]        (on the other, in a checkout of the same version)
# Parts: service (the daemon as the packaged configuration sets it up: roots, kernel confinement, a job inside them and two outside),
# chaos (KILLS, 25, of random processes), load (a minute of watchers and submissions beside a job on a CPU device, or on LOAD_DEVICE,
# and then TURNS, 8, of 8 s with and without them; LOAD_MODEL names a model of bench/checkpoint_stall.py for that job, 3b with
# BATCH=8 LOAD_DEVICE=cuda:0 TURNS=0), stall (what a checkpoint of a 3B model costs). DEVICES names the devices, all GPUs unless told otherwise. OUT/summary.txt has all figures.
set -u
here=$(cd "$(dirname "$0")" && pwd)
. "$here/node.sh"
shift 2
devices=${DEVICES:-$(seq -s, -f 'cuda:%.0f' 0 $((gpus - 1)))}
if [ -z "$devices" ]; then
  echo "skipped: no GPU on this machine; DEVICES=cpu:2 runs the same on the processor"
  exit 0
fi
export RAMTORCH_TEST_BIN_DIR=$bin RAMTORCH_TEST_FIXTURES_DIR=$here/fixtures

job() { # file, data, metrics
  cat >"$1" <<TOML
name = "service"
[model]
path = "llama"
[data]
format = "tokens"
train = "$2"
sequence_length = 16
[train]
steps = 20
batch_size = 4
[optimizer]
lr = 1e-3
[output]
path = "model"
metrics = "$3"
TOML
}

service() {
  local root=$out/service daemon rc=0
  rm -rf "$root" && mkdir -p "$root/srv" "$root/state" && cp -r "$here/fixtures/models/llama" "$here/fixtures/tokens.bin" "$root/srv/"
  cp "$here/fixtures/tokens.bin" "$root/outside.bin"
  sed -e "s,/srv/ramtorch,$root/srv,; s,/var/lib/ramtorch,$root/state,; s,/run/ramtorch/ramtorchd.sock,$root/s," \
    -e '/^groups\|^admin_groups/d' -e 's,127.0.0.1:9477,127.0.0.1:19477,' "$here/../deploy/ramtorchd.toml" >"$root/ramtorchd.toml"
  job "$root/srv/inside.toml" tokens.bin metrics.jsonl
  job "$root/srv/reads-outside.toml" ../outside.bin metrics-2.jsonl
  job "$root/srv/writes-outside.toml" tokens.bin ../metrics.jsonl
  "$bin/ramtorchd" start --config "$root/ramtorchd.toml" --devices "$devices" &
  daemon=$!
  export RAMTORCH_SOCKET=$root/s
  for _ in $(seq 300); do [ -S "$root/s" ] && break || sleep 0.1; done
  "$bin/ramtorch" doctor || true
  "$bin/ramtorch" submit "$root/srv/inside.toml" --watch || { echo "the job inside the roots failed" && rc=1; }
  [ "$(wc -l <"$root/srv/metrics.jsonl")" = 20 ] || { echo "not all steps were written" && rc=1; }
  for refused in reads writes; do
    if "$bin/ramtorch" submit "$root/srv/$refused-outside.toml"; then
      echo "a job that $refused outside of the roots was taken" && rc=1
    fi
  done
  curl -sf http://127.0.0.1:19477/metrics | grep -E '^ramtorch_(jobs|devices|up)' | head -5
  kill -TERM $daemon && wait $daemon || { echo "the daemon ended with code $?" && rc=1; }
  return $rc
}

chaos() {
  RAMTORCH_CHAOS_DEVICES=$devices RAMTORCH_CHAOS_KILLS=${KILLS:-25} RAMTORCH_CHAOS_STEPS=${STEPS:-300} \
    RAMTORCH_CHAOS_SEED=${SEED:-2026} RAMTORCH_CHAOS_PATIENCE=30 RAMTORCH_CHAOS_SUMMARY=$out/chaos.txt "$bin/chaos" --nocapture
}

load() {
  ulimit -n "$(ulimit -Hn)"
  local device=${LOAD_DEVICE:-cpu:1} pinned=1
  [ "${device%%:*}" = cpu ] || pinned=0
  if [ -n "${LOAD_MODEL:-}" ]; then
    PYTHONPATH=$here/../bench python3 -c 'import sys, inputs, checkpoint_stall
inputs.write(sys.argv[1], checkpoint_stall.MODELS[sys.argv[2]][0], 2_000_000)' "$out/load-model" "$LOAD_MODEL" || return 1
    export RAMTORCH_LOAD_MODEL=$out/load-model
  fi
  RAMTORCH_LOAD_SECONDS=${LOAD_SECONDS:-60} RAMTORCH_LOAD_WATCHERS=1000 RAMTORCH_LOAD_SUBMISSIONS=200 RAMTORCH_LOAD_BATCH=${BATCH:-768} \
    RAMTORCH_LOAD_TURNS=${TURNS:-8} RAMTORCH_LOAD_DEVICES=$device RAMTORCH_LOAD_STRICT=1 RAMTORCH_LOAD_PINNED=$pinned \
    RAMTORCH_LOAD_SUMMARY=$out/load.txt "$bin/load" --nocapture
}

stall() {
  local first=${devices%%,*}
  python3 "$here/../bench/checkpoint_stall.py" --bin "$bin" --out "$out/stall" --model "${MODEL:-3b}" --device "$first" \
    --every "${EVERY:-60}" --until-durable --staging "${STAGING:-default}"
}

[ $# -gt 0 ] || set -- service chaos load stall
for name in "$@"; do
  part "$name" "$name" || tail -25 "$out/$name.log"
  case $name in
    service) grep -iE 'landlock|confine|outside' "$out/service.log" | cut -c1-300 | tee -a "$out/summary.txt" ;;
    stall) grep '^[|]' "$out/stall.log" | tee -a "$out/summary.txt" ;;
    *) [ -f "$out/$name.txt" ] && tee -a "$out/summary.txt" <"$out/$name.txt" ;;
  esac
done
exit $failed
