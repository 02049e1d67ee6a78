#![no_main]

extern crate ramtorch_fuzz;

#[path = "../bodies/config.rs"]
mod config;

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(config::seeds), |data: &[u8]| config::run(data));
