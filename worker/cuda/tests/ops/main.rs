//! Every operation of the CUDA device against the CPU device.
//!
//! Inputs are random, sizes odd, outputs poisoned and fenced. The reference runs in single precision on the same
//! (rounded) inputs. Without a GPU every test is skipped, and the number is printed.
//!
//! ```text
//! ops [FILTER…] [--list] [--bench] [--isolate] [--exact NAME]
//! ```
//! `--isolate` runs each test in a process of its own: a fault on the device ends one test and not all.
//! `--bench` measures instead of testing.
#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod bench;
mod beside;
mod elementwise;
mod mixing;
mod movement;
mod optimizer;
mod peers;
mod rig;
mod timeline;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitCode};
use std::time::Instant;

/// A test: panics or returns.
pub type Test = (&'static str, fn());

fn all() -> Vec<Test> {
    [movement::TESTS, mixing::TESTS, elementwise::TESTS, optimizer::TESTS, timeline::TESTS, peers::TESTS].concat()
}

fn main() -> ExitCode {
    if let Err(e) = ramtorch_cuda::ensure_libraries() {
        eprintln!("{e}");
        return ExitCode::FAILURE;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|a| a == flag);
    let exact = arguments.iter().position(|a| a == "--exact").and_then(|i| arguments.get(i + 1));
    let filters: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    let chosen: Vec<Test> = match exact {
        Some(name) => all().into_iter().filter(|t| t.0 == name).collect(),
        None => all().into_iter().filter(|t| filters.is_empty() || filters.iter().any(|f| t.0.contains(f.as_str()))).collect(),
    };
    if has("--list") {
        chosen.iter().for_each(|t| println!("{}: test", t.0));
        return ExitCode::SUCCESS;
    }
    match ramtorch_cuda::available() {
        Ok(gpus) if exact.is_none() => println!("{}", gpus.iter().map(|g| format!("{g:?}")).collect::<Vec<_>>().join("\n")),
        Ok(_) => {}
        Err(e) => {
            println!("{} CUDA tests skipped: no GPU ({e})", chosen.len());
            return ExitCode::SUCCESS;
        }
    }
    if has("--bench") {
        bench::run(&filters);
        return ExitCode::SUCCESS;
    }
    let mut failed = Vec::new();
    for (name, test) in &chosen {
        let before = Instant::now();
        let passed = if has("--isolate") { isolated(name) } else { catch_unwind(AssertUnwindSafe(test)).is_ok() };
        println!("{} {name} ({:.1} s)", if passed { "ok    " } else { "FAILED" }, before.elapsed().as_secs_f64());
        if !passed {
            failed.push(*name);
        }
    }
    if exact.is_none() {
        println!("\n{} CUDA tests passed, {} failed: {}", chosen.len() - failed.len(), failed.len(), failed.join(" "));
    }
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn isolated(name: &str) -> bool {
    Command::new("/proc/self/exe").args(["--exact", name]).status().is_ok_and(|s| s.success())
}
