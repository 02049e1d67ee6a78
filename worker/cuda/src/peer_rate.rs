//! How fast GPUs reach one another's memory: every one sends to the next of a ring, all at once.

use crate::driver::{Context, Memory, RawStream, cu};
use cudarc::driver::sys;
use ramtorch_device::EngineError;
use std::time::Instant;

/// Bytes of a copy, and copies that are timed: some milliseconds on the slowest links.
const BYTES: u64 = 64 << 20;
const COPIES: u32 = 4;

/// One GPU: what it sends from, and where the one before it writes. Fields are dropped in this order.
struct End {
    stream: RawStream,
    from: Memory,
    to: Memory,
    context: Context,
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.context.enter();
    }
}

impl End {
    fn open(ordinal: u32) -> Result<End, EngineError> {
        let context = Context::open(ordinal)?;
        let memory = || Memory::new(BYTES, &format!("cuda:{ordinal}: measurement of peers"));
        Ok(End { stream: RawStream::new(false)?, from: memory()?, to: memory()?, context })
    }

    /// Has this GPU reach the memory of `other`.
    fn reach(&self, other: &End) -> Result<(), EngineError> {
        self.context.enter()?;
        // SAFETY: the context of this device is current, the other one is alive.
        let status = unsafe { sys::cuCtxEnablePeerAccess(other.context.raw(), 0) };
        if status == sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED {
            return Ok(());
        }
        crate::driver::check(status, || "peer access: cuCtxEnablePeerAccess".to_owned())
    }

    fn send(&self, other: &End) -> Result<(), EngineError> {
        self.context.enter()?;
        let (to, from) = (other.context.raw(), self.context.raw());
        cu!("peers", cuMemcpyPeerAsync(other.to.ptr, to, self.from.ptr, from, BYTES as usize, self.stream.0))
    }

    fn finish(&self) -> Result<(), EngineError> {
        self.context.enter()?;
        self.stream.synchronize("peers")
    }
}

/// Bytes a second that each of these GPUs receives while it sends as much, all at once; for GPUs that reach one another's memory
/// and that nobody else uses. Takes 128 MiB of each for a moment.
///
/// # Errors
/// What the driver says, or fewer than two GPUs.
pub fn peer_bytes_per_second(gpus: &[u32]) -> Result<f64, EngineError> {
    if gpus.len() < 2 {
        return Err(EngineError::internal("a GPU alone has no peers"));
    }
    let ends = gpus.iter().map(|g| End::open(*g)).collect::<Result<Vec<_>, _>>()?;
    let pairs = || ends.iter().zip(ends.iter().cycle().skip(1));
    pairs().try_for_each(|(a, b)| a.reach(b))?;
    let round = |copies: u32| -> Result<(), EngineError> {
        (0..copies).try_for_each(|_| pairs().try_for_each(|(a, b)| a.send(b)))?;
        ends.iter().try_for_each(End::finish)
    };
    round(1)?; // the first one sets up the links
    let begin = Instant::now();
    round(COPIES)?;
    Ok((u64::from(COPIES) * BYTES) as f64 / begin.elapsed().as_secs_f64().max(1e-9))
}
