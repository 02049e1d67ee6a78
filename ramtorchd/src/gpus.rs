//! Asks CUDA what the daemon must not ask itself: how much memory each GPU has, and where it is on the bus.
//!
//! A short-lived process of this program loads CUDA and prints the answer. It may hang in the driver, so that it has a
//! time limit, and nobody waits for it after that.

use crate::process::PARENT_VARIABLE;
use ramtorch_worker::GpuSeen;
use std::io::Read;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The first use of a GPU after a boot can take many seconds.
const LIMIT: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// The GPUs that CUDA shows.
///
/// # Errors
/// Text for the user: what CUDA said, or that it said nothing in time.
pub fn seen() -> Result<Vec<GpuSeen>, String> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("gpus").env(PARENT_VARIABLE, std::process::id().to_string()).env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| format!("cannot start a process: {e}"))?;
    let end = Instant::now() + LIMIT;
    // The answer is far smaller than a pipe's buffer, so that the process never waits for this one to read.
    while child.try_wait().map_err(|e| e.to_string())?.is_none() {
        if Instant::now() > end {
            let _ = child.kill();
            return Err(format!("the driver gave no answer within {} s; see dmesg for errors of the GPUs", LIMIT.as_secs()));
        }
        std::thread::sleep(POLL);
    }
    let mut text = String::new();
    if let Some(out) = child.stdout.take() {
        out.take(1 << 20).read_to_string(&mut text).map_err(|e| e.to_string())?;
    }
    serde_json::from_str::<Result<Vec<GpuSeen>, String>>(&text).map_err(|_| "the process that asks CUDA has crashed".to_string())?
}

/// The process that is asked.
pub fn main() -> ExitCode {
    if let Err(e) = ramtorch_worker::prepare_process() {
        return answer(&Err(e.message));
    }
    if let Err(text) = crate::worker::die_with_parent() {
        return answer(&Err(text));
    }
    answer(&ramtorch_worker::gpus().map_err(|e| e.message))
}

fn answer(result: &Result<Vec<GpuSeen>, String>) -> ExitCode {
    match serde_json::to_string(result) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(_) => ExitCode::FAILURE,
    }
}
