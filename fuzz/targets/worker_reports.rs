//! Workers that say anything at any time: the state task goes on, and forgets nothing. The format of an input is in
//! ramtorchd/src/fuzzing.rs.
#![no_main]

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(ramtorchd::fuzzing::conversations), |data: &[u8]| {
    ramtorchd::fuzzing::converse(data);
});
