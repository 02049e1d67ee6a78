//! Read-only memory maps of data files. The only unsafe code of this crate.
#![allow(unsafe_code)]

use crate::DataError;
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, mapped; its pages belong to the page cache and can be dropped by the kernel at any time.
#[derive(Debug)]
pub(crate) struct Map(Option<memmap2::Mmap>);

impl Map {
    /// Maps the whole file; an empty file gives an empty map.
    pub(crate) fn of(file: &File, path: &Path) -> Result<Map, DataError> {
        if file.metadata().map_err(DataError::read(path))?.len() == 0 {
            return Ok(Map(None));
        }
        // SAFETY: the map is read-only and private, so this process never writes through it. Another process that
        // changes the file shows up as changed bytes: every reader of a `Map` takes plain integers and floats out of
        // it by value, for which all bit patterns are valid, and checks them before use as an index; no `str` or
        // reference with an invariant is built on it. Another process that truncates the file makes access beyond the
        // new end raise SIGBUS, which ends this process; that is no memory unsafety, and the lengths checked by
        // `Dataset::open` name the file when the worker is started again. Files in the token cache are never written
        // to after they were renamed into place.
        // Safe code will not do: reads through a file descriptor would copy each window and cost a system call for
        // each, and the page cache would not be shared by the ranks of a job.
        let map = unsafe { memmap2::MmapOptions::new().map(file) }.map_err(DataError::read(path))?;
        Ok(Map(Some(map)))
    }
}

impl Deref for Map {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}
