#!/usr/bin/env bash
# Builds what tests/gpu_node.sh needs on a machine with GPUs, into a folder to carry there. Needs no GPU and no CUDA.
#   tests/gpu_pack.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?a folder}
mkdir -p "$folder"
cargo build --release -p ramtorchd -p ramtorch-client
target="${CARGO_TARGET_DIR:-target}"
ops=$(cargo test --release -p ramtorch-cuda --test ops --no-run --message-format=json |
  python3 -c 'import json, sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m.get("target", {}).get("name") == "ops":
        print(m["executable"])' | tail -1)
cp "$target/release/ramtorchd" "$target/release/ramtorch" "$folder/"
cp "$ops" "$folder/ops"
strip "$folder/ramtorchd" "$folder/ramtorch" "$folder/ops"
ls -l "$folder"
