#![no_main]

#[path = "../bodies/job_file.rs"]
mod job_file;

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(job_file::seeds), |data: &[u8]| job_file::run(data));
