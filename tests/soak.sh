#!/bin/sh
# Starts, cancels, fails and kills JOBS jobs, and looks at what the daemon takes meanwhile: nothing may grow.
#
#   tests/soak.sh [JOBS [SEED]]        1,000 jobs unless told otherwise; the figures go to soak-summary.txt as well
set -eu
cd "$(dirname "$0")/.."
RAMTORCH_SOAK_JOBS="${1:-1000}"
RAMTORCH_SOAK_SEED="${2:-$(date +%s)}"
RAMTORCH_SOAK_SUMMARY="${RAMTORCH_SOAK_SUMMARY:-$PWD/soak-summary.txt}"
export RAMTORCH_SOAK_JOBS RAMTORCH_SOAK_SEED RAMTORCH_SOAK_SUMMARY
cargo test --profile "${RAMTORCH_SOAK_PROFILE:-dev}" -p ramtorch-tests --test soak -- --nocapture
