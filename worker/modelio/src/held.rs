//! A folder that is held open while something is written in it: what leads to it by name later, a link that somebody puts in the
//! way, changes nothing.
//!
//! ```text
//!   /a/b/c ──► / ─► a ─► b ─► c, each opened in the one before it, no link followed, made where it is missing
//!   from then on: /proc/self/fd/N/name, whatever /a/b/c is by now
//! ```

use crate::durable::{self, parent};
use crate::error::ModelError;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// See the module.
pub(crate) struct HeldFolder {
    fd: OwnedFd,
    path: PathBuf,
}

/// Names in it can be looked up, whatever may be read of it.
const FOLDER: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

impl HeldFolder {
    /// Opens `folder`, an absolute path without links, and makes what is missing of it, durably.
    ///
    /// # Errors
    /// There is a link on the way, or something else that is no folder; it cannot be made.
    pub(crate) fn make(folder: &Path) -> Result<HeldFolder, ModelError> {
        let at = Path::new("/");
        let fd = open(at, FOLDER, Mode::empty()).map_err(|e| ModelError::read(at, e.into()))?;
        let mut held = HeldFolder { fd, path: at.to_owned() };
        for part in folder.components() {
            match part {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => held = held.enter(Path::new(name))?,
                Component::ParentDir | Component::Prefix(_) => {
                    return Err(ModelError::Exists { path: folder.to_owned(), message: "is not a plain path".into() });
                }
            }
        }
        Ok(held)
    }

    /// A folder that is there, itself no link, whatever is on the way to it.
    ///
    /// # Errors
    /// It is a link, or no folder.
    pub(crate) fn of(folder: &Path) -> Result<HeldFolder, ModelError> {
        match open(folder, FOLDER, Mode::empty()) {
            Ok(fd) => Ok(HeldFolder { fd, path: folder.to_owned() }),
            Err(Errno::ELOOP | Errno::ENOTDIR) => Err(refused(folder)),
            Err(e) => Err(ModelError::read(folder, e.into())),
        }
    }

    /// A folder in this one, made where it is missing.
    pub(crate) fn enter(&self, name: &Path) -> Result<HeldFolder, ModelError> {
        let path = self.path.join(name);
        let mut entered = openat(&self.fd, name, FOLDER, Mode::empty());
        if matches!(entered, Err(Errno::ENOENT)) {
            match durable::step().and_then(|()| Ok(mkdirat(&self.fd, name, Mode::from_bits_truncate(0o777))?)) {
                Ok(()) => durable::sync_folder(&self.through()).map_err(|e| self.named(e))?,
                // Somebody else was quicker.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(ModelError::write(&path, e)),
            }
            entered = openat(&self.fd, name, FOLDER, Mode::empty());
        }
        match entered {
            Ok(fd) => Ok(HeldFolder { fd, path }),
            Err(Errno::ELOOP | Errno::ENOTDIR) => Err(refused(&path)),
            Err(e) => Err(ModelError::read(&path, e.into())),
        }
    }

    /// A path of this very folder, for as long as it is held. Where there is no /proc, it is the name that led here.
    pub(crate) fn through(&self) -> PathBuf {
        let path = PathBuf::from(format!("/proc/self/fd/{}", self.fd.as_raw_fd()));
        if path.exists() { path } else { self.path.clone() }
    }

    /// Whether this folder still has this name.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        let id = |m: &std::fs::Metadata| (m.dev(), m.ino());
        match (self.through().metadata(), path.symlink_metadata()) {
            (Ok(held), Ok(there)) => id(&held) == id(&there),
            _ => false,
        }
    }

    /// An error in terms of the name that led here.
    pub(crate) fn named(&self, e: ModelError) -> ModelError {
        e.renamed(&self.through(), &self.path)
    }
}

/// Why a path that is no folder, or leads to one elsewhere, is not written to.
pub(crate) fn refused(path: &Path) -> ModelError {
    // Without a slash behind it, which would have a link followed.
    let path: PathBuf = path.components().collect();
    let what = match path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
        true => "is a link, and was none when this was asked for; nothing is written through it. Remove it, or name another folder",
        false => "is no folder; name another one",
    };
    ModelError::Exists { path, message: what.into() }
}

/// The folder of `target`, held.
pub(crate) fn parent_of(target: &Path) -> Result<HeldFolder, ModelError> {
    HeldFolder::make(parent(target))
}
