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
    let take = || Ok(Rates { peer_bytes: ramtorch_cuda::peer_bytes_per_second(gpus)?, ..Default::default() });
    Ok(of(&key(&first.name, first.driver_version, gpus), free, cache, take)?.map_or(0.0, |found| found.peer_bytes))
}

/// What [`Rates::together`] is for these GPUs, which have `memory` bytes each for it: from the cache, or taken now where they are
/// `free`.
pub(super) fn together(gpus: &[u32], free: bool, memory: u64, cache: &Path) -> Result<Option<Together>, EngineError> {
    let known = ramtorch_cuda::available()?;
    let Some(first) = gpus.first().and_then(|g| known.iter().find(|k| k.ordinal == *g)) else { return Ok(None) };
    let key = format!("together {}", key(&first.name, first.driver_version, gpus));
    let bytes = Sizes::GPU.bytes(Dtype::Bf16.size());
    let open = |rank: usize| -> Result<Box<dyn Device>, EngineError> {
        Ok(Box::new(ramtorch_cuda::CudaDevice::open(gpus[rank], Dtype::Bf16, bytes, true)?))
    };
    let take = || Ok(Rates { together: Some(together::measure(gpus.len(), Sizes::GPU, &open)?), ..Default::default() });
    Ok(of(&key, free && gpus.len() > 1 && bytes <= memory, cache, take)?.and_then(|found| found.together))
}

/// What the cache has under `key`, or what `take` measures where the GPUs are `free`; nothing where neither is.
fn of(key: &str, free: bool, cache: &Path, take: impl FnOnce() -> Result<Rates, EngineError>) -> Result<Option<Rates>, EngineError> {
    let found = cached(cache, key);
    if found.is_some() || !free {
        return Ok(found);
    }
    // Entries of the cache are of GPUs.
    let taken = Rates { gpu: Some(GpuRates::default()), ..take()? };
    remember(cache, key, &taken);
    Ok(Some(taken))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_measured_once_and_only_where_they_are_free() {
        let folder = tempfile::tempdir().unwrap();
        let with = |key: &str, free: bool, take: &dyn Fn() -> Result<f64, EngineError>| {
            let found = of(key, free, folder.path(), || Ok(Rates { peer_bytes: take()?, ..Default::default() }))?;
            Ok::<_, EngineError>(found.map(|found| found.peer_bytes))
        };
        let never: &dyn Fn() -> Result<f64, EngineError> = &|| panic!("measured");
        let (two, four) = (key("H100", 13000, &[0, 1]), key("H100", 13000, &[0, 1, 2, 3]));
        assert_eq!(with(&two, false, never).unwrap(), None, "somebody works there");
        assert!(with(&two, true, &|| Err(EngineError::internal("no"))).is_err(), "and nothing is kept");
        assert_eq!(with(&two, true, &|| Ok(1.5e10)).unwrap(), Some(1.5e10));
        assert_eq!(with(&two, true, never).unwrap(), Some(1.5e10));
        assert_eq!(with(&two, false, never).unwrap(), Some(1.5e10));
        assert_eq!(with(&four, true, &|| Ok(9e10)).unwrap(), Some(9e10), "another gang");
        assert_ne!(two, key("H100", 13000, &[2, 3]), "another pair may have other links");
    }
}
