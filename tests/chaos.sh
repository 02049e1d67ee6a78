#!/bin/sh
# Kills random processes of a training run until KILLS of them have died, and compares every step with a run that nobody
# disturbed.
#
#   tests/chaos.sh [KILLS [SEED]]        500 kills unless told otherwise; the summary goes to chaos-summary.txt as well
set -eu
cd "$(dirname "$0")/.."
RAMTORCH_CHAOS_KILLS="${1:-500}"
RAMTORCH_CHAOS_SEED="${2:-$(date +%s)}"
RAMTORCH_CHAOS_STEPS="${RAMTORCH_CHAOS_STEPS:-3000}"
RAMTORCH_CHAOS_SUMMARY="${RAMTORCH_CHAOS_SUMMARY:-$PWD/chaos-summary.txt}"
export RAMTORCH_CHAOS_KILLS RAMTORCH_CHAOS_SEED RAMTORCH_CHAOS_STEPS RAMTORCH_CHAOS_SUMMARY
cargo test -p ramtorch-tests --test chaos -- --nocapture
