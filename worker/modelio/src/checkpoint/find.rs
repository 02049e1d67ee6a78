//! Finding the checkpoint to go on from.

use super::{Checkpoint, PARTIAL, REPLACED, folder_name, step_of};
use crate::error::ModelError;
use std::path::{Path, PathBuf};

/// Which checkpoints a search accepts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FindOptions {
    /// Read everything and compare all checksums, not only the files' sizes and headers.
    pub verify: bool,
    /// Only those before this step: the search goes on behind one that turned out to be damaged.
    pub before: Option<u64>,
    /// Only those that this run wrote.
    pub run: Option<String>,
}

/// What a search found.
#[derive(Debug, Default)]
pub struct Search {
    /// The newest sound checkpoint.
    pub found: Option<Checkpoint>,
    /// Newer ones that were passed over.
    pub skipped: Vec<Skipped>,
}

/// A checkpoint that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Its folder.
    pub path: PathBuf,
    /// What is wrong with it, with the file and the tensor where there is one.
    pub reason: String,
}

/// Find the newest sound checkpoint in folder `root`. A folder that does not exist holds none.
///
/// # Errors
/// The folder itself cannot be read, or the operating system refuses to read what is in it: such a checkpoint may be sound, and
/// an older one in its place would lose steps. What is wrong with single checkpoints is told in [`Search::skipped`].
pub fn find_sound(root: &Path, options: &FindOptions) -> Result<Search, ModelError> {
    let mut search = Search::default();
    for (step, path) in list(root)? {
        if options.before.is_some_and(|before| step >= before) {
            continue;
        }
        let opened = Checkpoint::open(&path).and_then(|checkpoint| {
            if checkpoint.step() != step {
                return Err(ModelError::format(&path, format_args!("holds step {}: the folder was renamed", checkpoint.step())));
            }
            if options.verify {
                checkpoint.verify()?;
            }
            Ok(checkpoint)
        });
        match opened {
            Ok(checkpoint) => {
                if options.run.as_ref().is_some_and(|run| *run != checkpoint.meta().run) {
                    continue;
                }
                search.found = Some(checkpoint);
                return Ok(search);
            }
            Err(e) if is_unreadable(&e) => return Err(e),
            Err(e) => search.skipped.push(Skipped { path, reason: e.to_string() }),
        }
    }
    Ok(search)
}

/// Whether the operating system refused (a disk's error, a server that is gone, missing permission), and not the checkpoint is
/// wrong: something is missing in it, or is of another kind.
fn is_unreadable(e: &ModelError) -> bool {
    use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    match e {
        ModelError::Read { source, .. } => {
            source.raw_os_error().is_some() && !matches!(source.kind(), NotFound | NotADirectory | IsADirectory)
        }
        _ => false,
    }
}

/// Whether `root` shows that a first checkpoint of this run never got its name: an unfinished one is there, and none that has its
/// name, but for those of other runs. A folder that cannot be read shows nothing.
pub fn holds_unfinished_only(root: &Path, run: &str) -> bool {
    let Ok(named) = list(root) else { return false };
    if named.iter().any(|(_, path)| super::read::run_of(path).is_none_or(|of| of == run)) {
        return false;
    }
    let unfinished = |name: &str| name.strip_suffix(PARTIAL).is_some_and(|n| step_of(n).is_some());
    std::fs::read_dir(root).into_iter().flatten().flatten().any(|e| e.file_name().to_str().is_some_and(unfinished))
}

/// Checkpoint folders in `root`, newest first. One that was moved aside for a new one of the same step counts while that is
/// not there: the writer died in between.
pub(super) fn list(root: &Path) -> Result<Vec<(u64, PathBuf)>, ModelError> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(ModelError::read(root, e)),
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| ModelError::read(root, e))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(step) = step_of(name) {
            folders.push((step, entry.path()));
        } else if let Some(step) = name.strip_suffix(REPLACED).and_then(step_of)
            && !root.join(folder_name(step)).exists()
        {
            folders.push((step, entry.path()));
        }
    }
    folders.sort_unstable_by_key(|&(step, _)| std::cmp::Reverse(step));
    Ok(folders)
}
