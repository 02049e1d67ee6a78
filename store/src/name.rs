//! Names of segments.

use crate::error::StoreError;
use std::fmt;

/// A name that shm_open takes: a slash, then letters, digits, dots, dashes and underscores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SegmentName(String);

impl SegmentName {
    /// Checks a name; the slash in front may be missing.
    pub fn new(name: &str) -> Result<SegmentName, StoreError> {
        const BYTES_MAX: usize = 200;
        let refuse = |reason| Err(StoreError::Name { name: name.to_owned(), reason });
        let stem = name.strip_prefix('/').unwrap_or(name);
        if stem.is_empty() || stem.len() > BYTES_MAX {
            return refuse("it must have 1 to 200 characters behind the slash");
        }
        if stem.starts_with('.') {
            return refuse("it must not begin with a dot");
        }
        if !stem.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c)) {
            return refuse("only letters, digits, dots, dashes and underscores are allowed");
        }
        Ok(SegmentName(format!("/{stem}")))
    }

    /// With the slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Without the slash: usable as a file name.
    pub fn stem(&self) -> &str {
        &self.0[1..]
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_is_added_where_it_is_missing() {
        assert_eq!(SegmentName::new("job-1.2_x").unwrap().as_str(), "/job-1.2_x");
        assert_eq!(SegmentName::new("/a").unwrap().stem(), "a");
    }

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in ["", "/", "//a", "a/b", "../a", "/..", ".", ".hidden", "a b", "a\0", "ä", &"x".repeat(201)] {
            assert!(matches!(SegmentName::new(name), Err(StoreError::Name { .. })), "{name:?}");
        }
    }
}
