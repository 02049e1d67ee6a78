#!/usr/bin/env bash
# Builds what tests/gpu_node.sh and tests/reliability_node.sh need on a machine with GPUs, into a folder to carry there. Needs no GPU and no CUDA.
#   tests/gpu_pack.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?a folder}
mkdir -p "$folder"
cargo build --release -p ramtorchd -p ramtorch-client
target="${CARGO_TARGET_DIR:-target}"
built() { # name of the test, arguments for cargo...
  local test=$1
  shift
  cargo test --release --test "$test" "$@" --no-run --message-format=json | python3 -c 'import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m.get("target", {}).get("name") == sys.argv[1]:
        print(m["executable"])' "$test" | tail -1
}
cp "$target/release/ramtorchd" "$target/release/ramtorch" "$folder/"
cp "$(built ops -p ramtorch-cuda)" "$folder/ops"
cp "$(built chaos -p ramtorch-tests)" "$folder/chaos"
cp "$(built load -p ramtorch-tests)" "$folder/load"
strip "$folder/ramtorchd" "$folder/ramtorch" "$folder"/{ops,chaos,load}
ls -l "$folder"
