//! Reading files with limits.

use crate::error::ModelError;
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

/// Read a whole file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let file = File::open(path).map_err(|e| ModelError::read(path, e))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| ModelError::read(path, e))?;
    if bytes.len() as u64 > limit {
        return Err(ModelError::format(path, format_args!("is longer than {limit} bytes, which is more than such a file can need")));
    }
    Ok(bytes)
}

/// Whether `name` names a file directly inside a folder: no separator, no `..`, not empty.
pub(crate) fn plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) && !name.contains('/')
}
