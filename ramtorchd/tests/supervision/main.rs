//! The supervisor against real processes that misbehave on demand: crash, hang, lie, linger.
//!
//! This program is three: the tests, a daemon for tests that kill one (`daemon`), and the worker that daemons start
//! (`worker`), as `ramtorchd` itself is daemon and worker. The worker speaks the real protocol through the real link and
//! does what a script says; planning and segments are stood in for by `fake::FakeEngine`. Everything else is the
//! product.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

mod bench;
mod calls;
mod failures;
mod fake;
mod life;
mod recovery;
mod stop;

use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    match role.as_deref() {
        Some("worker") => fake::worker_main(),
        Some("daemon") => bench::daemon_main(),
        _ => {
            let trials = [life::trials(), failures::trials(), stop::trials(), calls::trials(), recovery::trials()];
            libtest_mimic::run(&Arguments::from_args(), trials.into_iter().flatten().collect()).exit_code()
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
