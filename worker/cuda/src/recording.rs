//! Work that is enqueued again and again in one call: CUDA graphs.
//!
//! ```text
//!   keep_work:  begin capture ─► operations on Compute (none runs) ─► end capture ─► instantiated
//!   again:      one launch on Compute
//! ```
//! A graph has the operations' arguments as they were: what changes from one run to the next lies in device memory.

use crate::driver::{RawStream, cu};
use cudarc::driver::sys;
use ramtorch_device::EngineError;

/// An instantiated graph.
pub(crate) struct Recording(sys::CUgraphExec);

// SAFETY: a handle that may be used from any thread; the device that owns it lets one at a time.
unsafe impl Send for Recording {}

impl Recording {
    /// What `work` enqueues on `stream`. An error of `work`, or of an operation that cannot be captured, ends the capture; the stream
    /// goes on as before.
    pub(crate) fn of(stream: &RawStream, work: &mut dyn FnMut() -> Result<(), EngineError>) -> Result<Recording, EngineError> {
        // Other threads' calls are none of its business.
        cu!("recording", cuStreamBeginCapture_v2(stream.0, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))?;
        let done = work();
        let mut graph = std::ptr::null_mut();
        // Whatever `work` came to: a stream stays in capture until this.
        let ended = cu!("recording", cuStreamEndCapture(stream.0, &mut graph));
        let mut exec = std::ptr::null_mut();
        let made = done.and(ended).and_then(|()| cu!("recording", cuGraphInstantiateWithFlags(&mut exec, graph, 0)));
        if !graph.is_null() {
            // What was instantiated is a copy.
            let _ = cu!("recording", cuGraphDestroy(graph));
        }
        made.map(|()| Recording(exec))
    }

    pub(crate) fn launch(&self, stream: &RawStream) -> Result<(), EngineError> {
        cu!("recording", cuGraphLaunch(self.0, stream.0))
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let _ = cu!("recording", cuGraphExecDestroy(self.0));
    }
}
