//! The command `ramtorch`, as a process, against a daemon of prepared answers.
#![forbid(unsafe_code)]
// Helpers of tests are outside of `#[test]`, which the lint's exception does not see.
#![allow(clippy::unwrap_used)]

mod failures;
mod harness;
mod interrupts;
mod jobs;
mod mock;
mod models;
mod node;
mod terminal;
mod watch;
