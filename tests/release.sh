#!/bin/sh
# Builds the release binaries and shows that they hold nothing of the fail points; the binaries of the tests do, which
# shows that the search would find it.
set -eu
cd "$(dirname "$0")/.."
cargo build --quiet -p ramtorchd -p ramtorch-client
cargo build --quiet --release -p ramtorchd -p ramtorch-client
target="${CARGO_TARGET_DIR:-target}"
names=$(sed -n 's/.*= "\([a-z-]*\.[a-z]*\)", .*;/\1/p' store/failpoint/src/points.rs)
found=0
for word in RAMTORCH_FAILPOINTS "fail point " $names; do
    if grep -aqF "$word" "$target/release/ramtorchd" "$target/release/ramtorch"; then
        echo "a release binary holds \"$word\"" >&2
        found=1
    fi
    grep -aqF "$word" "$target/debug/ramtorchd" || { echo "the debug binary does not hold \"$word\": the search is wrong" >&2; found=1; }
done
[ "$found" = 0 ] && echo "no fail point in the release binaries; $(echo "$names" | wc -l) points, the variable and the messages looked for"
exit "$found"
