//! The metrics file: one JSON line a committed step.
//!
//! A line is written right after its step is committed, by one process. When that process dies in between, the next
//! gang finds at most the line of the last committed step missing (or torn) and writes it from the step record.

use crate::api::{EngineError, ErrorKind, StepMetrics};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Writer of a metrics file; does nothing without a path.
pub(crate) struct MetricsFile {
    path: PathBuf,
    file: Option<File>,
}

#[derive(serde::Deserialize)]
struct StepOnly {
    step: u64,
}

impl MetricsFile {
    /// Opens the file and cuts off what is past step `committed`: lines of steps that will be run again, and a torn
    /// line. Returns the step of the last line kept.
    pub fn open(path: Option<&Path>, committed: u64) -> Result<(Self, u64), EngineError> {
        let Some(path) = path else { return Ok((MetricsFile { path: PathBuf::new(), file: None }, committed)) };
        let fail = |what: &str, e: std::io::Error| {
            EngineError::new(ErrorKind::Output, format!("metrics file {}: cannot {what}: {e}", path.display()))
        };
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|e| fail("make its folder", e))?;
        }
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(|e| fail("open it", e))?;
        // A pipe or a device has no lines to keep, and may never end.
        if !file.metadata().map_err(|e| fail("look at it", e))?.is_file() {
            return Ok((MetricsFile { path: path.to_path_buf(), file: Some(file) }, committed));
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(|e| fail("read it", e))?;
        let (mut keep, mut last) = (0usize, 0u64);
        for line in text.split_inclusive(|b| *b == b'\n') {
            let whole = line.ends_with(b"\n");
            match serde_json::from_slice::<StepOnly>(line) {
                Ok(s) if whole && s.step <= committed && s.step == last + 1 => {
                    last = s.step;
                    keep += line.len();
                }
                _ => break,
            }
        }
        file.set_len(keep as u64).map_err(|e| fail("shorten it", e))?;
        file.seek(SeekFrom::End(0)).map_err(|e| fail("seek in it", e))?;
        Ok((MetricsFile { path: path.to_path_buf(), file: Some(file) }, last))
    }

    /// Appends a line; returns it.
    pub fn write(&mut self, m: &StepMetrics) -> Result<String, EngineError> {
        let line = serde_json::to_string(m).map_err(EngineError::internal)?;
        if let Some(file) = &mut self.file {
            // One write call, so that a line is torn only by a full disk.
            file.write_all(format!("{line}\n").as_bytes())
                .map_err(|e| EngineError::new(ErrorKind::Output, format!("metrics file {}: {e}", self.path.display())))?;
        }
        Ok(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_past_the_committed_step_and_torn_lines_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m/metrics.jsonl");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4").unwrap();
        let (_, last) = MetricsFile::open(Some(&path), 3).unwrap();
        assert_eq!((last, std::fs::read_to_string(&path).unwrap().lines().count()), (3, 3));
        let (_, last) = MetricsFile::open(Some(&path), 2).unwrap();
        assert_eq!((last, std::fs::read_to_string(&path).unwrap().as_str()), (2, "{\"step\":1}\n{\"step\":2}\n"));
        let (_, last) = MetricsFile::open(Some(&path), 0).unwrap();
        assert_eq!((last, std::fs::read(&path).unwrap().len()), (0, 0));
    }
}
