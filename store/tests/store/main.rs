//! Parameter stores in real shared memory: by one process, by several, damaged, and left by a killed one.

mod api;
mod common;
mod damage;
mod processes;
