//! The durable list of segments. Shared memory outlives its processes, so what nobody owns any more has to be found and
//! removed; only what is registered here is ever touched.
//!
//! ```text
//!   register (on disk) ──▶ segment made ──▶ in use ──▶ segment unlinked ──▶ forget
//!        │                     │               │              │
//!        └──────── a death anywhere here is seen by the next sweep ┘
//! ```
//! One file a segment, named after it, replaced by renaming: a reader sees an old or a new registration, never half of
//! one, and damage to one leaves the others.

use crate::error::StoreError;
use crate::mapping::Mapping;
use crate::name::SegmentName;
use crate::process::ProcessIdentity;
use ramtorch_failpoint::{Point, check, hit};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const EXTENSION: &str = "segment.json";

/// A segment in the registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Name of the segment, with the slash.
    pub name: String,
    /// Job that it belongs to.
    pub job: String,
    /// Generation of the job's gang when it was registered.
    pub generation: u64,
    /// Bytes of the segment.
    pub bytes: u64,
    /// Process that registered it.
    pub owner: ProcessIdentity,
}

/// A folder of registrations.
#[derive(Debug, Clone)]
pub struct Registry {
    folder: PathBuf,
}

impl Registry {
    /// Opens a registry, making its folder (mode 0700) where it is missing.
    ///
    /// # Errors
    /// [`StoreError::System`] when the folder cannot be made.
    pub fn open(folder: impl Into<PathBuf>) -> Result<Registry, StoreError> {
        let folder = folder.into();
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder);
        made.map_err(|e| StoreError::system(format!("make the folder {}", folder.display()), e))?;
        Ok(Registry { folder })
    }

    /// Puts a segment on the list, durably, as this process's. An earlier registration of the name is replaced, which is
    /// how a successor takes a segment over. To be called before the segment is made, so that none is ever unlisted.
    ///
    /// # Errors
    /// A name that is none, or a file that cannot be written.
    pub fn register(&self, name: &str, job: &str, generation: u64, bytes: u64) -> Result<(), StoreError> {
        let name = SegmentName::new(name)?;
        let registration =
            Registration { name: name.to_string(), job: job.to_owned(), generation, bytes, owner: ProcessIdentity::current()? };
        let path = self.path(&name);
        // The leading dot keeps a file that was never finished out of the list.
        let unfinished = self.folder.join(format!(".{}.{}.{EXTENSION}", name.stem(), std::process::id()));
        let write = || -> io::Result<()> {
            check(Point::RegistryBegun)?;
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(&serde_json::to_vec_pretty(&registration)?)?;
            file.sync_all()?;
            check(Point::RegistryWritten)?;
            fs::rename(&unfinished, &path)?;
            hit(Point::RegistryRenamed);
            sync_folder(&self.folder)?;
            hit(Point::RegistryDurable);
            Ok(())
        };
        write().map_err(|e| {
            let _ = fs::remove_file(&unfinished);
            StoreError::system(format!("write the registration {}", path.display()), e)
        })
    }

    /// Takes a segment off the list, durably; one that is not on it is fine. To be called after the segment is unlinked.
    ///
    /// # Errors
    /// A name that is none, or a file that cannot be removed.
    pub fn forget(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(&SegmentName::new(name)?);
        hit(Point::RegistryForgetting);
        let removed = match fs::remove_file(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => Err(e),
            Ok(()) => sync_folder(&self.folder),
        };
        hit(Point::RegistryForgotten);
        removed.map_err(|e| StoreError::system(format!("remove the registration {}", path.display()), e))
    }

    /// All registrations, by name. A file that cannot be understood is named in the log and left alone.
    ///
    /// # Errors
    /// [`StoreError::System`] when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<Registration>, StoreError> {
        let unreadable = |e| StoreError::system(format!("read the folder {}", self.folder.display()), e);
        let mut registrations = Vec::new();
        for item in fs::read_dir(&self.folder).map_err(unreadable)? {
            let path = item.map_err(unreadable)?.path();
            let Some(stem) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(&format!(".{EXTENSION}"))) else {
                continue;
            };
            if stem.starts_with('.') {
                continue;
            }
            match read(&path, stem) {
                Ok(Some(registration)) => registrations.push(registration),
                Ok(None) => {} // forgotten by another process since the folder was read
                Err(error) => tracing::warn!(%error, "a registration is skipped; unlink its segment in /dev/shm and remove the file"),
            }
        }
        registrations.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(registrations)
    }

    /// Removes what writers left that died before they could rename it.
    fn remove_unfinished(&self) {
        for item in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = item.file_name();
            // .STEM.PID.segment.json
            let stem = name.to_str().and_then(|n| n.strip_prefix('.')).and_then(|n| n.strip_suffix(&format!(".{EXTENSION}")));
            let Some(pid) = stem.and_then(|s| s.rsplit_once('.')).and_then(|(_, pid)| pid.parse::<u32>().ok()) else { continue };
            // A writer that lives, or another process that got its pid: left for the next sweep.
            if matches!(ProcessIdentity::of(pid), Ok(None)) {
                let _ = fs::remove_file(item.path());
            }
        }
    }

    /// Unlinks and forgets every segment for which `keep` says no; as a rule that is `|r| r.owner.is_alive()`, but for
    /// those that the caller takes over. Returns what was removed. Goes on after a failure, and returns the first.
    ///
    /// # Errors
    /// A folder that cannot be read, a segment that cannot be unlinked, a file that cannot be removed.
    pub fn sweep(&self, mut keep: impl FnMut(&Registration) -> bool) -> Result<Vec<Registration>, StoreError> {
        self.remove_unfinished();
        let (mut removed, mut failure) = (Vec::new(), None);
        for registration in self.list()? {
            if keep(&registration) {
                continue;
            }
            let gone =
                SegmentName::new(&registration.name).and_then(|name| Mapping::unlink(&name)).and_then(|()| self.forget(&registration.name));
            match gone {
                Ok(()) => {
                    tracing::info!(
                        segment = registration.name,
                        job = registration.job,
                        bytes = registration.bytes,
                        "left-over segment removed"
                    );
                    removed.push(registration);
                }
                Err(e) => {
                    tracing::warn!(segment = registration.name, error = %e, "left-over segment not removed");
                    failure.get_or_insert(e);
                }
            }
        }
        failure.map_or(Ok(removed), Err)
    }

    fn path(&self, name: &SegmentName) -> PathBuf {
        self.folder.join(format!("{}.{EXTENSION}", name.stem()))
    }
}

/// `None`: no such file.
fn read(path: &Path, stem: &str) -> Result<Option<Registration>, StoreError> {
    const BYTES_MAX: u64 = 1 << 20;
    let bad = |reason: String| StoreError::Registration { path: path.to_path_buf(), reason };
    let text = match fs::metadata(path).and_then(|m| if m.len() > BYTES_MAX { Err(ErrorKind::FileTooLarge.into()) } else { fs::read(path) })
    {
        Ok(text) => text,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(bad(e.to_string())),
    };
    let registration: Registration = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
    // What is swept is what the file is named after, so a file cannot speak for another segment.
    match SegmentName::new(&registration.name) {
        Ok(name) if name.stem() == stem => Ok(Some(registration)),
        _ => Err(bad(format!("it speaks of segment {:?}", registration.name))),
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let folder = tempfile::tempdir().unwrap();
        let registry = Registry::open(folder.path().join("state/segments")).unwrap();
        (folder, registry)
    }

    #[test]
    fn registrations_come_back_and_are_replaced_and_forgotten() {
        let (_folder, registry) = registry();
        registry.register("/b", "job 2", 7, 1 << 40).unwrap();
        registry.register("a", "job 1", 1, 4096).unwrap();
        registry.register("/b", "job 2", 8, 1 << 40).unwrap();
        let me = ProcessIdentity::current().unwrap();
        let one = |name: &str, job: &str, generation, bytes| Registration {
            name: name.into(),
            job: job.into(),
            generation,
            bytes,
            owner: me.clone(),
        };
        let list = Registry::open(&registry.folder).unwrap().list().unwrap();
        assert_eq!(list, [one("/a", "job 1", 1, 4096), one("/b", "job 2", 8, 1 << 40)]);
        registry.forget("/a").unwrap();
        registry.forget("/a").unwrap();
        assert_eq!(registry.list().unwrap().len(), 1);
    }

    #[test]
    fn damaged_and_unfinished_files_are_left_alone() {
        let (_folder, registry) = registry();
        registry.register("/good", "job", 1, 1).unwrap();
        let put = |name: &str, text: &[u8]| fs::write(registry.folder.join(name), text).unwrap();
        let good = fs::read(registry.folder.join("good.segment.json")).unwrap();
        put("torn.segment.json", &good[..good.len() / 2]);
        put("other.segment.json", &good);
        put(".x.1.segment.json", &good);
        put("notes.txt", b"not ours");
        assert_eq!(registry.list().unwrap().iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["/good"]);
        assert_eq!(registry.sweep(|_| false).unwrap().len(), 1);
        assert_eq!(fs::read_dir(&registry.folder).unwrap().count(), 4);
    }

    #[test]
    fn a_sweep_removes_what_a_dead_writer_left() {
        let (_folder, registry) = registry();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let left = registry.folder.join(format!(".a.b.{}.segment.json", child.id()));
        let live = registry.folder.join(format!(".a.b.{}.segment.json", std::process::id()));
        fs::write(&left, b"half").unwrap();
        fs::write(&live, b"half").unwrap();
        registry.sweep(|_| true).unwrap();
        assert!(!left.exists() && live.exists());
    }

    #[test]
    fn names_that_leave_the_folder_are_refused() {
        let (_folder, registry) = registry();
        assert!(registry.register("../x", "job", 1, 1).is_err());
        assert!(registry.forget("/../x").is_err());
    }
}
