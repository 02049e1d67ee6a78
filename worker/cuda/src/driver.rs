//! Thin checked layer over the driver's functions: errors with names, owners that free what they made.
//!
//! Every owner's `Drop` ignores errors and never panics. The context must be current on the thread that drops: the
//! device sees to it.

use cudarc::driver::sys;
use ramtorch_device::{EngineError, ErrorKind};
use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Calls a driver function and names the operation in its error.
macro_rules! cu {
    ($what:expr, $f:ident($($a:expr),* $(,)?)) => {
        // SAFETY: the arguments follow the function's contract: pointers to live locals, handles owned by this crate, device
        // addresses inside allocations of this device.
        $crate::driver::check(unsafe { cudarc::driver::sys::$f($($a),*) }, || format!("{}: {}", $what, stringify!($f)))
    };
}
pub(crate) use cu;

/// Turns a status of the driver into an error that names it.
pub(crate) fn check(status: sys::CUresult, what: impl FnOnce() -> String) -> Result<(), EngineError> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let kind = match status {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY | sys::CUresult::CUDA_ERROR_NO_DEVICE => ErrorKind::Resources,
        _ => ErrorKind::Internal,
    };
    let mut text = std::ptr::null();
    // SAFETY: `text` receives a pointer to a static string, or stays null.
    let known = unsafe { sys::cuGetErrorString(status, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
    let meaning = if known {
        // SAFETY: a static string of the driver, terminated.
        format!(" ({})", unsafe { CStr::from_ptr(text) }.to_string_lossy())
    } else {
        String::new()
    };
    Err(EngineError::new(kind, format!("{}: {status:?}{meaning}", what())).with_device_code(status as u32))
}

thread_local! {
    /// Number of the [`Context`] that this thread entered last: nothing but [`Context::enter`] makes contexts current here.
    static ENTERED: Cell<u64> = const { Cell::new(0) };
}

/// The primary context of a device, retained.
pub(crate) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Its own, never given twice: a context that was released and retained again is another one.
    number: u64,
}

// SAFETY: contexts may be used from any thread, once made current there.
unsafe impl Send for Context {}

impl Context {
    pub(crate) fn open(ordinal: u32) -> Result<Context, EngineError> {
        let what = format!("cuda:{ordinal}");
        let (mut device, mut context) = (0, std::ptr::null_mut());
        cu!(what, cuInit(0))?;
        cu!(what, cuDeviceGet(&mut device, ordinal as i32))?;
        cu!(what, cuDevicePrimaryCtxRetain(&mut context, device))?;
        static LAST: AtomicU64 = AtomicU64::new(0);
        let c = Context { device, context, number: 1 + LAST.fetch_add(1, Ordering::Relaxed) };
        c.enter()?;
        Ok(c)
    }

    /// For functions that take a context; alive as long as this.
    pub(crate) fn raw(&self) -> sys::CUcontext {
        self.context
    }

    /// Makes the context current on this thread. Every operation begins with it: where it is current, it costs nothing.
    pub(crate) fn enter(&self) -> Result<(), EngineError> {
        if ENTERED.get() != self.number {
            cu!("cuda", cuCtxSetCurrent(self.context))?;
            ENTERED.set(self.number);
        }
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let _ = cu!("cuda", cuDevicePrimaryCtxRelease_v2(self.device));
    }
}

/// Device memory.
pub(crate) struct Memory {
    pub(crate) ptr: u64,
    pub(crate) bytes: u64,
}

impl Memory {
    pub(crate) fn new(bytes: u64, what: &str) -> Result<Memory, EngineError> {
        let mut ptr = 0;
        cu!(format!("{what} ({bytes} bytes)"), cuMemAlloc_v2(&mut ptr, bytes as usize))?;
        Ok(Memory { ptr, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = cu!("memory", cuMemFree_v2(self.ptr));
    }
}

/// Page-locked host memory.
pub(crate) struct Pinned {
    pub(crate) ptr: *mut u8,
    pub(crate) bytes: usize,
}

// SAFETY: owned memory; whoever holds the value decides who reads and writes.
unsafe impl Send for Pinned {}

impl Pinned {
    pub(crate) fn new(bytes: usize, what: &str) -> Result<Pinned, EngineError> {
        let mut ptr: *mut c_void = std::ptr::null_mut();
        cu!(
            format!("{what} ({bytes} bytes of page-locked memory)"),
            cuMemHostAlloc(&mut ptr, bytes, sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP)
        )?;
        Ok(Pinned { ptr: ptr.cast(), bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = cu!("memory", cuMemFreeHost(self.ptr.cast()));
    }
}

/// A stream that does not wait for the default stream.
pub(crate) struct RawStream(pub(crate) sys::CUstream);

// SAFETY: streams may be used from any thread.
unsafe impl Send for RawStream {}

impl RawStream {
    /// `urgent` streams' kernels are scheduled first.
    pub(crate) fn new(urgent: bool) -> Result<RawStream, EngineError> {
        let (mut least, mut greatest) = (0, 0);
        cu!("stream", cuCtxGetStreamPriorityRange(&mut least, &mut greatest))?;
        let (mut stream, priority) = (std::ptr::null_mut(), if urgent { greatest } else { least });
        cu!("stream", cuStreamCreateWithPriority(&mut stream, sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32, priority))?;
        Ok(RawStream(stream))
    }

    pub(crate) fn synchronize(&self, what: &str) -> Result<(), EngineError> {
        cu!(what, cuStreamSynchronize(self.0))
    }
}

impl Drop for RawStream {
    fn drop(&mut self) {
        let _ = cu!("stream", cuStreamDestroy_v2(self.0));
    }
}

/// An event.
pub(crate) struct RawEvent(pub(crate) sys::CUevent);

// SAFETY: events may be used from any thread.
unsafe impl Send for RawEvent {}
// SAFETY: a handle that nothing here changes; the driver's functions on events may be called from several threads at once.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    /// For order alone, without a clock: recording costs nearly nothing.
    pub(crate) fn new() -> Result<RawEvent, EngineError> {
        let mut event = std::ptr::null_mut();
        cu!("event", cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32))?;
        Ok(RawEvent(event))
    }
    /// As [`RawEvent::new`], for a thread that sleeps while it waits: another thread needs its core.
    pub(crate) fn blocking() -> Result<RawEvent, EngineError> {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 | sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32;
        let mut event = std::ptr::null_mut();
        cu!("event", cuEventCreate(&mut event, flags))?;
        Ok(RawEvent(event))
    }
    /// With a clock, for [`elapsed_ms`].
    pub(crate) fn timed() -> Result<RawEvent, EngineError> {
        let mut event = std::ptr::null_mut();
        cu!("event", cuEventCreate(&mut event, sys::CUevent_flags::CU_EVENT_DEFAULT as u32))?;
        Ok(RawEvent(event))
    }
    pub(crate) fn record(&self, stream: &RawStream) -> Result<(), EngineError> {
        cu!("event", cuEventRecord(self.0, stream.0))
    }
    pub(crate) fn synchronize(&self) -> Result<(), EngineError> {
        cu!("event", cuEventSynchronize(self.0))
    }
    /// Whether the work before the last recording is done.
    pub(crate) fn done(&self) -> bool {
        // SAFETY: the event is alive; the answer is a status.
        unsafe { sys::cuEventQuery(self.0) == sys::CUresult::CUDA_SUCCESS }
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        let _ = cu!("event", cuEventDestroy_v2(self.0));
    }
}

type Elapsed = unsafe extern "C" fn(*mut f32, sys::CUevent, sys::CUevent) -> sys::CUresult;

/// The driver's function of CUDA 12.0. The headers of CUDA 13 know its successor alone, which drivers before 12.8 lack.
fn elapsed_function() -> Option<Elapsed> {
    static FUNCTION: OnceLock<Option<Elapsed>> = OnceLock::new();
    *FUNCTION.get_or_init(|| {
        let mut address: *mut c_void = std::ptr::null_mut();
        let mut found = sys::CUdriverProcAddressQueryResult::CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
        cu!("events", cuGetProcAddress_v2(c"cuEventElapsedTime".as_ptr(), &mut address, 12000, 0, &mut found)).ok()?;
        // SAFETY: the driver's address of the function of this name and version, whose signature `Elapsed` is.
        (!address.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Elapsed>(address) })
    })
}

/// Milliseconds from one event to a later one, both done and made by [`RawEvent::timed`].
pub(crate) fn elapsed_ms(from: &RawEvent, to: &RawEvent) -> Result<f32, EngineError> {
    let f = elapsed_function().ok_or_else(|| EngineError::internal("the CUDA driver has no cuEventElapsedTime"))?;
    let mut ms = 0f32;
    // SAFETY: a pointer to a live local, and two events that are alive.
    check(unsafe { f(&mut ms, from.0, to.0) }, || "events: cuEventElapsedTime".to_owned())?;
    Ok(ms)
}

/// Loaded machine code.
pub(crate) struct Module(sys::CUmodule);

// SAFETY: modules may be used from any thread.
unsafe impl Send for Module {}

/// A kernel of a module that lives as long as the device.
#[derive(Clone, Copy)]
pub(crate) struct Function(pub(crate) sys::CUfunction);

// SAFETY: functions may be used from any thread.
unsafe impl Send for Function {}

impl Module {
    pub(crate) fn load(cubin: &[u8], what: &str) -> Result<Module, EngineError> {
        let mut module = std::ptr::null_mut();
        cu!(what, cuModuleLoadData(&mut module, cubin.as_ptr().cast()))?;
        Ok(Module(module))
    }

    pub(crate) fn function(&self, name: &str) -> Result<Function, EngineError> {
        let symbol = CString::new(name).map_err(EngineError::internal)?;
        let mut function = std::ptr::null_mut();
        cu!(name, cuModuleGetFunction(&mut function, self.0, symbol.as_ptr()))?;
        Ok(Function(function))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _ = cu!("module", cuModuleUnload(self.0));
    }
}

impl Function {
    /// Allows `bytes` of dynamic shared memory.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<(), EngineError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        cu!("kernel", cuFuncSetAttribute(self.0, attribute, bytes as i32))
    }
}
