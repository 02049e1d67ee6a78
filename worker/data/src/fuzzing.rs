//! Ways in for fuzz targets.

use crate::{Source, cache};
use std::path::{Path, PathBuf};

/// Where the cache with this key lies.
pub fn cache_path(dir: &Path, key: &[u8; 32]) -> PathBuf {
    cache::path_of(dir, &blake3::Hash::from_bytes(*key))
}

/// The sound cache with this key.
pub fn find_cache(dir: &Path, key: &[u8; 32]) -> Option<Source> {
    cache::find(dir, &blake3::Hash::from_bytes(*key)).map(|found| found.0)
}

/// Makes the checksums of a cache right.
pub fn seal_cache(bytes: &mut [u8]) {
    cache::seal(bytes);
}
