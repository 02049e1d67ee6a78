//! The command `ramtorch`.
#![forbid(unsafe_code)]
fn main() {}
