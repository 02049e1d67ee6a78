#![no_main]

extern crate ramtorch_fuzz;

#[path = "../bodies/safetensors.rs"]
mod safetensors;

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(safetensors::seeds), |data: &[u8]| safetensors::run(data));
