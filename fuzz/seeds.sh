#!/bin/sh
# Keeps some inputs of the corpora that fuzz/run.sh has built up, for the ordinary tests, which go through them again:
#
#   fuzz/seeds.sh [TARGET...]      fuzz/corpus/TARGET → fuzz/corpus-seeds/TARGET
#
# Inputs of at most 4 KiB, merged by libFuzzer into the fewest that reach as much; of these, spread over all sizes,
# 16 of each target. Needs what `fuzz/run.sh build` has built.
set -eu
cd "$(dirname "$0")"
host=$(rustc -vV | sed -n 's/^host: //p')
bin=${CARGO_TARGET_DIR:-$PWD/target}/fuzz/$host/release
for t in ${*:-worker_reports tokenizer job_file config safetensors}; do
    merged=$(mktemp -d)
    small=$(mktemp -d)
    find "corpus/$t" -type f -size -5k -exec cp {} "$small" \;
    nice -n 19 "$bin/$t" -merge=1 -rss_limit_mb=1024 "$merged" "$small" >/dev/null 2>&1
    rm -rf "corpus-seeds/$t"
    mkdir -p "corpus-seeds/$t"
    # Evenly from all sizes: the smallest ones alone are all refused at their first byte.
    find "$merged" -type f -printf '%s %p\n' | sort -n | awk '{ p[NR] = $2 } END { n = NR < 16 ? NR : 16; for (i = 1; i <= n; i++) print p[int(i * NR / n)] }' |
        while read -r file; do cp "$file" "corpus-seeds/$t/"; done
    rm -rf "$merged" "$small"
    printf '%s: %s inputs, %s bytes\n' "$t" "$(ls "corpus-seeds/$t" | wc -l)" "$(cat "corpus-seeds/$t"/* | wc -c)"
done
