//! Ways in for fuzz targets.

use crate::api::EngineError;
use std::path::Path;

/// Opens a metrics file as the first rank of a gang does; returns the step of the last line that was kept.
///
/// # Errors
/// The file cannot be read or shortened, or holds what is not ours.
pub fn recover_metrics(path: &Path, committed: u64) -> Result<u64, EngineError> {
    crate::metrics::recover(path, committed)
}
