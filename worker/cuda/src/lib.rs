//! The CUDA device: cudarc for the driver, NVRTC kernels, cuBLASLt matrix products, cuDNN attention, NCCL collectives.
//!
//! Every library is opened at run time, so one binary serves every node: [`ensure_libraries`] at the start of the
//! process, [`available`] to see what there is, [`CudaDevice::open`] to use it. None of them panics on a machine
//! without CUDA.
//!
//! `RAMTORCH_CUDA_SYNC=1` in the environment waits after each operation, so that an error names the operation that
//! caused it and not a later one.

mod attention;
mod copies;
mod cudnn;
mod device;
mod driver;
mod gemm;
mod kernels;
mod library;
mod memory;
mod nvrtc;
mod ops;
mod peer_rate;
mod peers;
mod reader;
mod recording;
mod staging;
mod timing;
mod updater;

pub use device::CudaDevice;
pub use library::ensure_libraries;
pub use peer_rate::peer_bytes_per_second;
pub use peers::check_peers;

use cudarc::driver::sys;
use driver::cu;
use ramtorch_device::{Dtype, EngineError, ErrorKind};
use serde::Serialize;

/// A GPU that can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GpuInfo {
    /// Number in this process.
    pub ordinal: u32,
    /// As the driver calls it.
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// All of its memory.
    pub memory_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// CUDA version of the driver, major · 1000 + minor · 10.
    pub driver_version: u32,
    /// Address on the bus, `0000:1b:00.0`.
    pub bus_id: String,
    /// cuDNN was found and suits; without it attention is much slower.
    pub cudnn: bool,
}

/// The GPUs of this machine, in the driver's order. Makes no context and takes no memory.
///
/// # Errors
/// [`ErrorKind::Resources`] when the driver or a library is missing or too old (the message says which, and where it was
/// looked for), or there is no GPU of compute capability 8.0 or later.
pub fn available() -> Result<Vec<GpuInfo>, EngineError> {
    library::check()?;
    cu!("CUDA driver", cuInit(0))?;
    let (mut count, mut version) = (0, 0);
    cu!("CUDA driver", cuDeviceGetCount(&mut count))?;
    cu!("CUDA driver", cuDriverGetVersion(&mut version))?;
    let cudnn = library::cudnn().is_ok();
    let mut found = Vec::new();
    for ordinal in 0..count.max(0) as u32 {
        let info = describe(ordinal, version as u32, cudnn)?;
        if info.compute_capability >= (8, 0) {
            found.push(info);
        } else {
            tracing::warn!("cuda:{ordinal} ({}) has compute capability {:?}: 8.0 or later is needed", info.name, info.compute_capability);
        }
    }
    if found.is_empty() {
        return Err(EngineError::new(
            ErrorKind::Resources,
            format!("the CUDA driver reports {count} GPUs, none of compute capability 8.0 or later"),
        ));
    }
    Ok(found)
}

/// Whether each of these GPUs, by ordinal, can reach every other's memory; `None` where there is only one. `NCCL_P2P_DISABLE=1` in
/// the environment counts as "no".
///
/// # Errors
/// As [`available`].
pub fn peer_access(gpus: &[u32]) -> Result<Option<bool>, EngineError> {
    if gpus.len() < 2 {
        return Ok(None);
    }
    available()?; // makes the driver ready, or says what it lacks
    if std::env::var_os("NCCL_P2P_DISABLE").is_some_and(|v| v == "1") {
        return Ok(Some(false));
    }
    for a in gpus {
        for b in gpus.iter().filter(|b| *b != a) {
            let (mut from, mut to, mut can) = (0, 0, 0);
            cu!("peer access", cuDeviceGet(&mut from, *a as i32))?;
            cu!("peer access", cuDeviceGet(&mut to, *b as i32))?;
            cu!("peer access", cuDeviceCanAccessPeer(&mut can, from, to))?;
            if can == 0 {
                return Ok(Some(false));
            }
        }
    }
    Ok(Some(true))
}

/// Says in the log of tests that one is skipped. The harness shows what `eprintln` writes for failed tests only.
#[cfg(test)]
fn say_skipped(text: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("skipped: {text}\n").as_bytes());
}

fn describe(ordinal: u32, driver_version: u32, cudnn: bool) -> Result<GpuInfo, EngineError> {
    let what = format!("cuda:{ordinal}");
    let mut device = 0;
    cu!(what, cuDeviceGet(&mut device, ordinal as i32))?;
    let (mut name, mut bus_id, mut memory) = ([0u8; 128], [0u8; 32], 0usize);
    cu!(what, cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device))?;
    cu!(what, cuDeviceGetPCIBusId(bus_id.as_mut_ptr().cast(), bus_id.len() as i32, device))?;
    cu!(what, cuDeviceTotalMem_v2(&mut memory, device))?;
    let attribute = |a: sys::CUdevice_attribute| -> Result<i32, EngineError> {
        let mut value = 0;
        cu!(what, cuDeviceGetAttribute(&mut value, a, device))?;
        Ok(value)
    };
    let text = |bytes: &[u8]| std::ffi::CStr::from_bytes_until_nul(bytes).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(GpuInfo {
        ordinal,
        name: text(&name),
        compute_capability: (
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        memory_bytes: memory as u64,
        multiprocessors: attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        driver_version,
        bus_id: text(&bus_id),
        cudnn,
    })
}

/// Compiles every kernel for a compute capability, without a GPU; returns the bytes of machine code. For checks before a
/// release and for filling the cache.
///
/// # Errors
/// When NVRTC is missing or refuses a source; the message carries its log.
pub fn compile_kernels(compute_capability: (i32, i32), dtype: Dtype) -> Result<usize, EngineError> {
    // SAFETY: opens and closes a library by name.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(EngineError::new(ErrorKind::Resources, "libnvrtc.so cannot be opened: the CUDA run-time compiler is needed"));
    }
    let mut bytes: usize = kernels::compile_all(compute_capability, dtype)?.iter().map(Vec::len).sum();
    bytes += kernels::compile_optimizer(compute_capability)?.len();
    for chunks in [1, 2, 3, 4, 8] {
        bytes += kernels::compile_attention(compute_capability, dtype, chunks)?.len();
    }
    Ok(bytes)
}
