#!/bin/sh
# Counts the faults that tests inject, by kind, from the tests themselves: a Markdown table for docs/reliability.md. A fault in
# a loop or in a group for several kinds of jobs is counted once; random ones (chaos, fuzzing, sequences of events) are not.
#
#   tests/faults.sh
set -eu
cd "$(dirname "$0")/.."
points="tests/tests/*.rs"
fake=$(ls ramtorchd/tests/supervision/*.rs | grep -v /fake.rs)
files="worker/modelio/src/checkpoint/tests.rs worker/modelio/src/export/tests.rs"

# Occurrences of a pattern in files, comments left out.
count() {
    pattern=$1
    shift
    cat "$@" | sed 's,^ *//.*,,' | grep -oE "$pattern" | wc -l | tr -d ' '
}

# Each point is stopped at once, but for those that other tests name themselves.
all=$(count '= "[a-z.-]+", (Daemon|Prepare|Rank);' store/failpoint/src/points.rs)
elsewhere=$(sed -n '/^const OF_A_STOP/,/;/p; /^const OF_EARLY_UPDATES/,/;/p; /^const OF_A_LOG/,/;/p' tests/tests/failpoints.rs | grep -oE '"[a-z.-]+"' | wc -l)
stops=$((all - elsewhere))

echo "| fault | at named points | in workers that follow a script |"
echo "|---|---|---|"
echo "| killed (SIGKILL, other signals, exit without a word) | $(count '(=|->)kill\b' $points) | $(count 'Act::(Signal\((6|9|11)\)|Exit)' $fake) |"
echo "| stopped (SIGSTOP) | $(($(count '(=|->)stop\b' $points) + stops)), of which $stops are one for each point | $(count 'Act::Signal\(19\)' $fake) |"
echo "| panic | $(count '(=|->)panic\b' $points) | $(count 'Act::Panic' $fake) |"
echo "| error where the place can fail | $(count '(=|->)error\b' $points) | $(count 'Act::Fail' $fake) |"
echo "| late (sleep) | $(count '(=|->)sleep\(' $points) | |"
echo "| disk full, or dead, at every change of files in turn | $(count 'Fault::(DiskFull|Death)' $files) | |"
echo "| hangs, and sends heartbeats | | $(count 'Act::Linger' $fake) |"
echo "| lies about its step | | $(count 'Act::(Claim|Pretend)' $fake) |"
echo "| status of a GPU | | $(count 'Act::Cuda' $fake) |"
