#![no_main]

extern crate ramtorch_fuzz;

#[path = "../bodies/tokenizer.rs"]
mod tokenizer;

fn init() {
    ramtorch_fuzz::seeds(tokenizer::seeds);
    ramtorch_fuzz::panics_may_be_caught();
}

libfuzzer_sys::fuzz_target!(init: init(), |data: &[u8]| tokenizer::run(data));
