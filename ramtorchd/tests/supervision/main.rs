//! The supervisor against real processes that misbehave on demand: crash, hang, lie, linger.
//!
//! This program is four: the tests, a daemon for tests that kill one (`daemon`), a client of another user (`caller`, `submitter`),
//! and the worker that daemons start (`worker`), as `ramtorchd` itself is daemon and worker. The worker speaks the real protocol through the real link and
//! does what a script says; planning and segments are stood in for by `fake::FakeEngine`. Everything else is the
//! product.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod access;
mod bench;
mod calls;
mod failures;
mod fake;
mod gpus;
mod idle;
mod life;
mod metrics;
mod recovery;
mod stop;
mod tls;

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    match role.as_deref() {
        Some("worker") => fake::worker_main(),
        Some("daemon") => bench::daemon_main(),
        Some("caller") => access::caller_main(),
        Some("submitter") => access::submitter_main(),
        _ => {
            let trials = [life::trials(), failures::trials(), stop::trials(), calls::trials(), recovery::trials()];
            let trials = trials.into_iter().chain([access::trials(), tls::trials(), metrics::trials(), gpus::trials(), idle::trials()]);
            libtest_mimic::run(&Arguments::from_args(), trials.flatten().collect()).exit_code()
        }
    }
}

/// A test that runs on a runtime of its own and fails by panicking.
fn trial<F>(name: &str, test: fn() -> F) -> Trial
where
    F: Future<Output = ()> + 'static,
{
    Trial::test(name, move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let limited = async { tokio::time::timeout(std::time::Duration::from_secs(120), test()).await };
        runtime.block_on(limited).map_err(|_| "the test took longer than two minutes")?;
        runtime.shutdown_timeout(std::time::Duration::from_secs(5));
        Ok(())
    })
}
