//! Opening the device that an assignment names.

use crate::api::{DeviceKind, DeviceSpec, EngineError};
use ramtorch_cpu::CpuDevice;
use ramtorch_device::{Device, Dtype};

/// Opens `spec` with at most `memory_bytes` of device memory.
pub(crate) fn open(spec: &DeviceSpec, dtype: Dtype, memory_bytes: u64, deterministic: bool) -> Result<Box<dyn Device>, EngineError> {
    Ok(match spec.kind {
        DeviceKind::Cpu => Box::new(CpuDevice::open(spec.index, dtype, spec.threads, memory_bytes)?),
        DeviceKind::Cuda => Box::new(ramtorch_cuda::CudaDevice::open(spec.index, dtype, memory_bytes, deterministic)?),
    })
}
