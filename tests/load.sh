#!/bin/sh
# 1,000 watchers and 200 submissions a second beside a job that trains, against a release build: no call may fail, the p99 of
# every call has to stay under 50 ms, and training must not be slower by 2 %.
#
#   tests/load.sh [SECONDS [WATCHERS [SUBMISSIONS]]]      the figures go to load-summary.txt as well
#
# With two processors or more, training has one for itself, and its core where there are others; the daemon shares the others with
# the load generator. Set RAMTORCH_LOAD_PINNED=0 to leave that to the kernel.
# Afterwards come 8 turns (RAMTORCH_LOAD_TURNS) of 8 s without load and 8 s under it, and training is judged by their median: a
# virtual machine is faster and slower by itself. A step takes 0.2 s or so. RAMTORCH_LOAD_BATCH=64 makes it a tenth of that, and watchers get ten
# times the events.
set -eu
cd "$(dirname "$0")/.."
RAMTORCH_LOAD_SECONDS="${1:-60}"
RAMTORCH_LOAD_WATCHERS="${2:-1000}"
RAMTORCH_LOAD_SUBMISSIONS="${3:-200}"
RAMTORCH_LOAD_BATCH="${RAMTORCH_LOAD_BATCH:-768}"
RAMTORCH_LOAD_STRICT="${RAMTORCH_LOAD_STRICT:-1}"
RAMTORCH_LOAD_PINNED="${RAMTORCH_LOAD_PINNED:-1}"
RAMTORCH_LOAD_TURNS="${RAMTORCH_LOAD_TURNS:-8}"
RAMTORCH_LOAD_SUMMARY="${RAMTORCH_LOAD_SUMMARY:-$PWD/load-summary.txt}"
export RAMTORCH_LOAD_TURNS RAMTORCH_LOAD_SECONDS RAMTORCH_LOAD_WATCHERS RAMTORCH_LOAD_SUBMISSIONS RAMTORCH_LOAD_BATCH RAMTORCH_LOAD_STRICT RAMTORCH_LOAD_PINNED RAMTORCH_LOAD_SUMMARY
ulimit -n "$(ulimit -Hn)"
cargo test --profile "${RAMTORCH_LOAD_PROFILE:-release}" -p ramtorch-tests --test load -- --nocapture
