//! Parameter stores in real shared memory: by one process, by several, damaged, and left by a killed one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop where it stands")]

mod api;
mod common;
mod damage;
mod processes;
mod snapshots;
