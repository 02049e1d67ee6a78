//! How fast the GPUs of a gang reach one another, measured before the plan: it decides whether they share the loading of weights.

use super::gpu::{cached, remember};
use super::together::{self, Sizes};
use crate::api::{EngineError, GpuRates, Rates, Together};
use ramtorch_device::{Device, Dtype};
use std::path::Path;

/// Part of every key in the cache: a new one whenever what is measured changes.
const VERSION: u32 = 1;

fn key(name: &str, driver: u32, gpus: &[u32]) -> String {
    format!("peers {VERSION} {name} driver {driver} world {} of {gpus:?}", gpus.len())
}

/// What [`Rates::peer_bytes`] is for these GPUs: from the cache, or taken now where they are `free`. A job plans by the same number
/// each time, so that its plan stays the same.
pub(super) fn bytes_per_second(gpus: &[u32], free: bool, cache: &Path) -> Result<f64, EngineError> {
    let known = ramtorch_cuda::available()?;
    let Some(first) = gpus.first().and_then(|g| known.iter().find(|k| k.ordinal == *g)) else { return Ok(0.0) };
    with(&key(&first.name, first.driver_version, gpus), free, cache, || ramtorch_cuda::peer_bytes_per_second(gpus))
}

/// What [`Rates::together`] is for these GPUs, which have `memory` bytes each for it: from the cache, or taken now where they are
/// `free`.
pub(super) fn together(gpus: &[u32], free: bool, memory: u64, cache: &Path) -> Result<Option<Together>, EngineError> {
    let known = ramtorch_cuda::available()?;
    let Some(first) = gpus.first().and_then(|g| known.iter().find(|k| k.ordinal == *g)) else { return Ok(None) };
    let key = format!("together {}", key(&first.name, first.driver_version, gpus));
    if let Some(found) = cached(cache, &key) {
        return Ok(found.together);
    }
    let bytes = Sizes::GPU.bytes(Dtype::Bf16.size());
    if !free || gpus.len() < 2 || bytes > memory {
        return Ok(None);
    }
    let open = |rank: usize| -> Result<Box<dyn Device>, EngineError> {
        Ok(Box::new(ramtorch_cuda::CudaDevice::open(gpus[rank], Dtype::Bf16, bytes, true)?))
    };
    let taken = together::measure(gpus.len(), Sizes::GPU, &open)?;
    remember(cache, &key, &Rates { together: Some(taken), gpu: Some(GpuRates::default()), ..Default::default() });
    Ok(Some(taken))
}

fn with(key: &str, free: bool, cache: &Path, take: impl FnOnce() -> Result<f64, EngineError>) -> Result<f64, EngineError> {
    if let Some(found) = cached(cache, key) {
        return Ok(found.peer_bytes);
    }
    if !free {
        return Ok(0.0);
    }
    let peer_bytes = take()?;
    // Entries of the cache are of GPUs.
    remember(cache, key, &Rates { peer_bytes, gpu: Some(GpuRates::default()), ..Default::default() });
    Ok(peer_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_measured_once_and_only_where_they_are_free() {
        let folder = tempfile::tempdir().unwrap();
        let never = || -> Result<f64, EngineError> { panic!("measured") };
        let (two, four) = (key("H100", 13000, &[0, 1]), key("H100", 13000, &[0, 1, 2, 3]));
        assert_eq!(with(&two, false, folder.path(), never).unwrap(), 0.0, "somebody works there");
        assert!(with(&two, true, folder.path(), || Err(EngineError::internal("no"))).is_err(), "and nothing is kept");
        assert_eq!(with(&two, true, folder.path(), || Ok(1.5e10)).unwrap(), 1.5e10);
        assert_eq!(with(&two, true, folder.path(), never).unwrap(), 1.5e10);
        assert_eq!(with(&two, false, folder.path(), never).unwrap(), 1.5e10);
        assert_eq!(with(&four, true, folder.path(), || Ok(9e10)).unwrap(), 9e10, "another gang");
        assert_ne!(two, key("H100", 13000, &[2, 3]), "another pair may have other links");
    }
}
