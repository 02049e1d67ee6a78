#!/bin/sh
# Builds the fuzz targets with coverage instrumentation, on the stable compiler, and runs each of them in turn, at the
# lowest priority and with one thread:
#
#   fuzz/run.sh SECONDS_PER_TARGET [TARGET...]      prints executions, coverage and crashes of each
#   fuzz/run.sh build                               builds only
#   fuzz/run.sh check                               checks that they compile, without instrumentation
#   fuzz/run.sh asan SECONDS                        the store's unit tests, then its target, with the address sanitizer
#
# Seeds come from the targets themselves; what a run finds stays in fuzz/corpus and is where the next run begins. An input
# that crashes a target, takes it more than 10 s or more than 1 GiB of memory is left in fuzz/artifacts/TARGET:
#
#   fuzz/run.sh repeat TARGET FILE                  runs one input
#
# RAMTORCH_FUZZ_BUILD=0 runs what was built before. RAMTORCH_FUZZ_ASAN=1 adds the address sanitizer (for the crates with unsafe code; slower, and never with mappings that
# reserve no memory).
set -eu
cd "$(dirname "$0")"
host=$(rustc -vV | sed -n 's/^host: //p')
target_dir=${CARGO_TARGET_DIR:-$PWD/target}
rss=1024
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0"
if [ "${RAMTORCH_FUZZ_ASAN:-}" = 1 ]; then
    flags="$flags -Zsanitizer=address"
    target_dir=$target_dir/asan
    export RUSTC_BOOTSTRAP=1
    # Shadow memory, and what was freed and is kept for a while.
    rss=2560
fi
bin=$target_dir/fuzz/$host/release
build() {
    # --target keeps build scripts and macros free of the flags.
    RUSTFLAGS=$flags cargo build --release --target "$host" --target-dir "$target_dir/fuzz" "$@"
}
all=$(sed -n 's/^name = "\([a-z_]*\)"$/\1/p' Cargo.toml)

case ${1:-} in
asan)
    # The store is where the unsafe code that reads what others left is. Without the other targets it is built in a minute.
    case ${2:-} in '' | *[!0-9]*) exec ./run.sh ;; esac
    export RUSTC_BOOTSTRAP=1
    (cd .. && RUSTFLAGS=-Zsanitizer=address cargo test -p ramtorch-store --lib --target "$host" --target-dir "$target_dir/asan/tests")
    RAMTORCH_FUZZ_ASAN=1 RAMTORCH_FUZZ_ALONE=1 exec ./run.sh "$2" store
    ;;
build) build --bins; exit ;;
check)
    # Locked: what is checked is what was last fuzzed.
    RUSTFLAGS="--cfg fuzzing -D warnings" exec cargo check --quiet --locked --bins --target "$host" --target-dir "$target_dir/fuzz"
    ;;
repeat) build --bin "$2"; exec "$bin/$2" -timeout=10 -rss_limit_mb=$rss -malloc_limit_mb=1024 "$3" ;;
'' | *[!0-9]*) sed -n '2,/^set/p' "$0" | grep '^#' >&2; exit 2 ;;
esac
seconds=$1
shift
if [ "${RAMTORCH_FUZZ_ALONE:-}" = 1 ]; then
    build --no-default-features --bin store
elif [ "${RAMTORCH_FUZZ_BUILD:-1}" != 0 ]; then
    build --bins
fi
mkdir -p out
failed=0
printf '%-16s %12s %9s %9s %8s %8s\n' target executions exec/s edges features crashes
for t in ${*:-$all}; do
    mkdir -p "corpus/$t" "artifacts/$t"
    RAMTORCH_FUZZ_SEEDS=$PWD/corpus/$t "$bin/$t" >"out/$t.seeds" 2>&1
    before=$(ls "artifacts/$t" | wc -l)
    # A job of one process: an input that kills it is kept, and ends the target's turn.
    nice -n 19 "$bin/$t" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=$rss -malloc_limit_mb=1024 -max_len=65536 \
        -print_final_stats=1 -artifact_prefix="artifacts/$t/" "corpus/$t" >"out/$t.log" 2>&1 || true
    crashes=$(($(ls "artifacts/$t" | wc -l) - before))
    last=$(grep -E '^#[0-9]+.* cov: ' "out/$t.log" | tail -n 1)
    field() { printf '%s' "$last" | sed -n "s/.* $1: \([0-9]*\).*/\1/p"; }
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "out/$t.log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "out/$t.log")
    printf '%-16s %12s %9s %9s %8s %8s\n' "$t" "${executions:-?}" "${rate:-?}" "$(field cov)" "$(field ft)" "$crashes"
    [ "$crashes" = 0 ] && [ -n "$executions" ] || failed=1
done
exit $failed
