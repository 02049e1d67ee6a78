//! The daemon `ramtorchd`. Everything is in the library.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    ramtorchd::cli::main()
}
