//! Every operation of the CUDA device against the CPU device.
//!
//! Inputs are random, sizes odd, outputs poisoned and fenced. The reference runs in single precision on the same
//! (rounded) inputs. Without a GPU every test is skipped, and the number is printed.
//!
//! ```text
//! ops [FILTER…] [--list] [--bench] [--isolate] [--exact NAME]
//! ```
//! `--isolate` runs each test in a process of its own: a fault on the device ends one test and not all. Tests that this machine
//! cannot do are counted as skipped; with `--exact` the exit code is then 77.
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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Exit code of a process whose only test was skipped.
const SKIPPED: u8 = 77;
/// The test that is running has called [`skip`].
static SKIP: AtomicBool = AtomicBool::new(false);

/// To be called by a test that this machine cannot do, which then returns.
fn skip(why: &str) {
    println!("skipped: {why}");
    SKIP.store(true, Ordering::Relaxed);
}

#[derive(PartialEq, Clone, Copy)]
enum Outcome {
    Passed,
    Skipped,
    Failed,
}

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
            return if exact.is_some() { ExitCode::from(SKIPPED) } else { ExitCode::SUCCESS };
        }
    }
    if has("--bench") {
        bench::run(&filters);
        return ExitCode::SUCCESS;
    }
    let (mut failed, mut skipped) = (Vec::new(), 0);
    for (name, test) in &chosen {
        let before = Instant::now();
        let outcome = if has("--isolate") { isolated(name) } else { here(*test) };
        let word = match outcome {
            Outcome::Passed => "ok     ",
            Outcome::Skipped => "skipped",
            Outcome::Failed => "FAILED ",
        };
        println!("{word} {name} ({:.1} s)", before.elapsed().as_secs_f64());
        match outcome {
            Outcome::Passed => {}
            Outcome::Skipped => skipped += 1,
            Outcome::Failed => failed.push(*name),
        }
    }
    if exact.is_none() {
        let passed = chosen.len() - skipped - failed.len();
        let names = if failed.is_empty() { String::new() } else { format!(": {}", failed.join(" ")) };
        println!("\n{passed} CUDA tests passed, {skipped} skipped, {} failed{names}", failed.len());
    }
    match failed.is_empty() {
        false => ExitCode::FAILURE,
        true if exact.is_some() && skipped > 0 => ExitCode::from(SKIPPED),
        true => ExitCode::SUCCESS,
    }
}

fn here(test: fn()) -> Outcome {
    SKIP.store(false, Ordering::Relaxed);
    match catch_unwind(AssertUnwindSafe(test)) {
        Err(_) => Outcome::Failed,
        Ok(()) if SKIP.load(Ordering::Relaxed) => Outcome::Skipped,
        Ok(()) => Outcome::Passed,
    }
}

fn isolated(name: &str) -> Outcome {
    match Command::new("/proc/self/exe").args(["--exact", name]).status().map(|s| s.code()) {
        Ok(Some(0)) => Outcome::Passed,
        Ok(Some(code)) if code == i32::from(SKIPPED) => Outcome::Skipped,
        _ => Outcome::Failed,
    }
}
