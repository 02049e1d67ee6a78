//! Whether the job's first checkpoint may exist: a note in the job's own folder, durable before that checkpoint gets its name.
//!
//! The supervisor hears of a checkpoint when it has its name. Where everything dies in between, and after a reboot the folder of
//! checkpoints is not there (its file system is not mounted), nothing but this note tells that the job must not begin anew, over the
//! lines and the checkpoints of the steps that it has done:
//!
//! ```text
//!   no note, or half of one ────────────────────────────────────► there is no checkpoint: the job begins
//!   a note; the folder holds an unfinished one and no other ─────► it never got its name: the job begins
//!   a note, and anything else in which no sound one is found ────► there may be one elsewhere: refused
//! ```
//! The note stays as long as the job's folder does. It is taken back where its checkpoint did not get its name.

use crate::api::EngineError;
use ramtorch_job::JobSpec;
use ramtorch_modelio::holds_unfinished_only;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Name of the note, in the job's folder of the state folder.
pub const FIRST_CHECKPOINT: &str = "first-checkpoint.json";

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Noted {
    step: u64,
    folder: PathBuf,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct FirstCheckpoint(PathBuf);

impl FirstCheckpoint {
    /// The note in this file.
    pub fn at(file: &Path) -> FirstCheckpoint {
        FirstCheckpoint(file.to_path_buf())
    }

    /// That of the job whose own metrics are in this file.
    pub fn beside(metrics: &Path) -> FirstCheckpoint {
        FirstCheckpoint(metrics.with_file_name(FIRST_CHECKPOINT))
    }

    /// Notes, durably, that a checkpoint is about to get its name. `false`: one was noted before.
    pub fn note(&self, step: u64, folder: &Path) -> std::io::Result<bool> {
        if self.read()?.is_some() {
            return Ok(false);
        }
        let text = serde_json::to_vec(&Noted { step, folder: folder.to_path_buf() })?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o640).open(&self.0)?;
        file.write_all(&text)?;
        file.sync_all()?;
        self.sync_folder()?;
        Ok(true)
    }

    /// Takes the note back: its checkpoint did not get its name.
    pub fn forget(&self) -> std::io::Result<()> {
        match std::fs::remove_file(&self.0) {
            Ok(()) => self.sync_folder(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Takes it back where the folder shows that its checkpoint did not get its name: before what was left of that is removed.
    pub fn forget_unfinished(&self, spec: &JobSpec) -> std::io::Result<()> {
        match spec.checkpoint.path.as_deref() {
            Some(folder) if holds_unfinished_only(folder, &spec.name) => self.forget(),
            _ => Ok(()),
        }
    }

    /// Refuses to begin anew where no sound checkpoint was found and one may exist.
    ///
    /// # Errors
    /// One may, or the note cannot be read.
    pub fn check(&self, spec: &JobSpec) -> Result<(), EngineError> {
        let Some(folder) = spec.checkpoint.path.as_deref() else { return Ok(()) };
        let unreadable = |e| EngineError::internal(format!("{}: cannot tell whether the job has a checkpoint: {e}", self.0.display()));
        match self.read().map_err(unreadable)? {
            Some(noted) if !holds_unfinished_only(folder, &spec.name) => Err(EngineError::input(format!(
                "the job has written a checkpoint of step {} to {}, or was about to when it died, and no sound checkpoint of `{}` is in {} \
                 now, nor the unfinished folder of one; nothing of the job's files was changed. If that folder's file system is not \
                 mounted, mount it, and submit the job again: it goes on from its newest checkpoint. To begin anew, submit it with \
                 another name, or with [checkpoint] path and [output] metrics elsewhere",
                noted.step,
                noted.folder.display(),
                spec.name,
                folder.display()
            ))),
            _ => Ok(()),
        }
    }

    /// What is noted. Half a note is of a death before the checkpoint had its name.
    fn read(&self) -> std::io::Result<Option<Noted>> {
        match std::fs::read(&self.0) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn sync_folder(&self) -> std::io::Result<()> {
        File::open(self.0.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_decides_whether_a_job_may_begin() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("ck");
        let text = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"text\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n\
                    [checkpoint]\npath = \"ck\"\n";
        let spec = JobSpec::parse(text, dir.path(), "j").unwrap();
        let first = FirstCheckpoint::beside(&dir.path().join("metrics.jsonl"));
        assert!(first.check(&spec).is_ok(), "no note");
        assert!(first.note(4, &folder).unwrap() && !first.note(8, &folder).unwrap());
        // Not mounted: the folder is gone, or another one is there.
        let refused = || first.check(&spec).unwrap_err();
        let e = refused();
        assert!(e.kind == crate::api::ErrorKind::Input && e.message.contains("of step 4") && e.message.contains("mount it"), "{e}");
        std::fs::create_dir(&folder).unwrap();
        refused();
        first.forget_unfinished(&spec).unwrap();
        refused();
        // What shows that it never got its name, and what is something else.
        std::fs::create_dir(folder.join("step-00000004.partial")).unwrap();
        assert!(first.check(&spec).is_ok());
        std::fs::create_dir(folder.join("step-00000008")).unwrap();
        refused();
        first.forget_unfinished(&spec).unwrap();
        refused();
        std::fs::remove_dir(folder.join("step-00000008")).unwrap();
        first.forget_unfinished(&spec).unwrap();
        first.forget().unwrap();
        assert!(first.check(&spec).is_ok() && first.read().unwrap().is_none());
        // Half of one, of a death while it was written.
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&first.0, "{\"step\":4,\"fol").unwrap();
        assert!(first.check(&spec).is_ok());
        assert!(first.note(9, &folder).unwrap());
        assert!(refused().message.contains("of step 9"));
    }
}
