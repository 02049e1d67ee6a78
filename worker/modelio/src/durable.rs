//! Files that are on the disk when they are said to be: every write is followed by `fsync` of the file and of the folder
//! that names it, before anything else relies on it.
//!
//! All changes to the file system go through here, so that tests can let the n-th of them fail, or kill the writer there.

use crate::error::ModelError;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, FallocateFlags, Flock, FlockArg, PosixFadviseAdvice, RenameFlags, fallocate, posix_fadvise, renameat2};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A new file that is being written.
pub(crate) struct DurableFile {
    file: File,
    path: PathBuf,
}

/// Create a file that must not exist.
pub(crate) fn create(path: &Path) -> Result<DurableFile, ModelError> {
    let open = || OpenOptions::new().write(true).create_new(true).open(path);
    let file = step().and_then(|()| open()).map_err(|e| ModelError::write(path, e))?;
    Ok(DurableFile { file, path: path.to_owned() })
}

/// Open a file that another writer created, to write into it at given places.
pub(crate) fn open(path: &Path) -> Result<DurableFile, ModelError> {
    let file = OpenOptions::new().write(true).open(path).map_err(|e| ModelError::write(path, e))?;
    Ok(DurableFile { file, path: path.to_owned() })
}

impl DurableFile {
    /// Reserve room for `bytes` bytes, where the file system can, so that a full disk is known at once.
    pub(crate) fn reserve(&mut self, bytes: u64) -> Result<(), ModelError> {
        let failed = |source| ModelError::write(&self.path, source);
        step().map_err(failed)?;
        let Ok(length) = i64::try_from(bytes) else {
            return Err(ModelError::Invalid(format!("{}: a file of {bytes} bytes is not possible", self.path.display())));
        };
        // fallocate and not posix_fallocate: the latter writes zeros where the file system cannot reserve.
        match fallocate(&self.file, FallocateFlags::empty(), 0, length.max(1)) {
            Ok(()) | Err(Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EINTR) => Ok(()),
            Err(e) => Err(failed(e.into())),
        }
    }

    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        step().and_then(|()| self.file.write_all(bytes)).map_err(|e| ModelError::write(&self.path, e))
    }

    /// Give the file its final length before there is content.
    pub(crate) fn set_len(&self, bytes: u64) -> Result<(), ModelError> {
        step().and_then(|()| self.file.set_len(bytes)).map_err(|e| ModelError::write(&self.path, e))
    }

    /// Write at a given place; several threads and processes may write into one file.
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), ModelError> {
        step().and_then(|()| self.file.write_all_at(bytes, offset)).map_err(|e| ModelError::write(&self.path, e))
    }

    /// Bring what was written so far to the disk, and let the page cache go: without it, the kernel collects a share of
    /// RAM in unwritten bytes, and writes all of it when the end is waited for.
    pub(crate) fn write_back(&self) -> Result<(), ModelError> {
        step().and_then(|()| self.file.sync_data()).map_err(|e| ModelError::write(&self.path, e))?;
        // Advice: where it is not taken, nothing is lost.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
        Ok(())
    }

    /// Make the content durable. The name becomes so with [`sync_folder`].
    pub(crate) fn finish(self) -> Result<(), ModelError> {
        self.sync()
    }

    /// As [`DurableFile::finish`], of all that was written so far.
    pub(crate) fn sync(&self) -> Result<(), ModelError> {
        step().and_then(|()| self.file.sync_all()).map_err(|e| ModelError::write(&self.path, e))
    }
}

/// Write a small file whole. Its name becomes durable with [`sync_folder`].
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let mut file = create(path)?;
    file.write_all(bytes)?;
    file.finish()
}

/// Suffix of a file that is to replace another.
pub(crate) const ASIDE: &str = ".new";

/// Replace a small file: written aside, made durable, renamed over the old one.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(ASIDE);
    let aside = PathBuf::from(aside);
    remove_file(&aside)?;
    write_file(&aside, bytes)?;
    rename(&aside, path)?;
    sync_folder(parent(path))
}

/// Create a folder that will be renamed: its final name becomes durable with [`sync_folder`] then. Nothing may be there, no link
/// to another folder either.
pub(crate) fn create_temporary_folder(path: &Path) -> Result<(), ModelError> {
    step().and_then(|()| std::fs::create_dir(path)).map_err(|e| ModelError::write(path, e))
}

/// Create a folder and those above it, durably: what is in it later is found only where its own name is.
pub(crate) fn create_folder(path: &Path) -> Result<(), ModelError> {
    let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).collect();
    step().and_then(|()| std::fs::create_dir_all(path)).map_err(|e| ModelError::write(path, e))?;
    missing.into_iter().rev().try_for_each(|made| sync_folder(parent(made)))
}

/// Could `folder` be created and written to? Tried out in the nearest folder above it that is there; nothing is left.
pub(crate) fn check_writable(folder: &Path) -> Result<(), ModelError> {
    let mut at = folder;
    while std::fs::symlink_metadata(at).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
        at = parent(at);
    }
    let probe = at.join(format!(".ramtorch-write-test-{}", std::process::id()));
    let tried = std::fs::create_dir(&probe).and_then(|()| std::fs::remove_dir(&probe));
    tried.map_err(|e| ModelError::write(folder, e))
}

/// Make the names in a folder durable.
pub(crate) fn sync_folder(path: &Path) -> Result<(), ModelError> {
    step().and_then(|()| File::open(path)?.sync_all()).map_err(|e| ModelError::write(path, e))
}

/// Rename a file over another, or a folder to a name that is free.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), ModelError> {
    step().and_then(|()| std::fs::rename(from, to)).map_err(|e| ModelError::write(to, e))
}

/// Give `new` the name `place`, in one step where the file system can; what was there is then at `new`.
///
/// Returns whether there was something. Where two names cannot be exchanged, the old folder passes through the name
/// `aside`, and a crash between the two steps leaves it there: [`recover`] undoes that.
pub(crate) fn put_folder(new: &Path, place: &Path, aside: &Path) -> Result<bool, ModelError> {
    if std::fs::symlink_metadata(place).is_err_and(|e| e.kind() == ErrorKind::NotFound) {
        rename(new, place)?;
        return Ok(false);
    }
    match step().and_then(|()| exchange(new, place)) {
        Ok(()) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(nix::libc::EINVAL | nix::libc::ENOSYS | nix::libc::EOPNOTSUPP)) => {
            rename(place, aside)?;
            rename(new, place)?;
            rename(aside, new)?;
            Ok(true)
        }
        Err(e) => Err(ModelError::write(place, e)),
    }
}

fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    #[cfg(test)]
    faults::exchange()?;
    Ok(renameat2(AT_FDCWD, a, AT_FDCWD, b, RenameFlags::RENAME_EXCHANGE)?)
}

/// Undo a [`put_folder`] that was cut off: give the old folder its name back, if nothing has it.
pub(crate) fn recover(place: &Path, aside: &Path) -> Result<(), ModelError> {
    match (aside.exists(), place.exists()) {
        (true, false) => rename(aside, place),
        (true, true) => remove_folder(aside),
        (false, _) => Ok(()),
    }
}

/// Remove a file; one that is not there is fine.
pub(crate) fn remove_file(path: &Path) -> Result<(), ModelError> {
    match step().and_then(|()| std::fs::remove_file(path)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(ModelError::write(path, e)),
        _ => Ok(()),
    }
}

/// Remove a folder and what is in it; one that is not there is fine.
pub(crate) fn remove_folder(path: &Path) -> Result<(), ModelError> {
    match step().and_then(|()| std::fs::remove_dir_all(path)) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(ModelError::write(path, e)),
        _ => Ok(()),
    }
}

/// Keeps other processes from writing into a folder; ends with the process.
pub(crate) struct FolderLock {
    _lock: Option<Flock<File>>,
}

impl FolderLock {
    /// Take the lock of a folder, or return `None` where another process holds it.
    pub(crate) fn take(folder: &Path) -> Result<Option<FolderLock>, ModelError> {
        let file = File::open(folder).map_err(|e| ModelError::read(folder, e))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(FolderLock { _lock: Some(lock) })),
            Err((_, Errno::EWOULDBLOCK)) => Ok(None),
            // Some network file systems do not lock folders; writing there is still safe for one job.
            Err(_) => Ok(Some(FolderLock { _lock: None })),
        }
    }
}

/// Refuse to begin writing `needed` bytes on a file system that has less.
pub(crate) fn check_space(folder: &Path, needed: u64) -> Result<(), ModelError> {
    // A file system that does not say is given the benefit of the doubt: the write itself will tell.
    let Ok(stat) = nix::sys::statvfs::statvfs(folder) else { return Ok(()) };
    let free = stat.blocks_available().saturating_mul(stat.fragment_size());
    if free < needed {
        return Err(ModelError::DiskSpace { path: folder.to_owned(), needed, free });
    }
    Ok(())
}

/// The folder that holds `path`.
pub(crate) fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(not(test))]
pub(crate) fn step() -> std::io::Result<()> {
    ramtorch_failpoint::check(ramtorch_failpoint::Point::FileChange)
}

#[cfg(test)]
pub(crate) use faults::step;

/// Faults for tests: the n-th change of the file system by this thread fails.
#[cfg(test)]
pub(crate) mod faults {
    use std::cell::Cell;
    use std::io::{Error, Result};

    /// What happens at the n-th change.
    #[derive(Debug, Clone, Copy, PartialEq)]
    pub(crate) enum Fault {
        /// It fails for want of room; later ones succeed.
        DiskFull,
        /// It does not happen, nor does any after it: the process is dead.
        Death,
    }

    thread_local! {
        static PLAN: Cell<Option<(u64, Fault)>> = const { Cell::new(None) };
        static COUNT: Cell<u64> = const { Cell::new(0) };
        static EXCHANGE: Cell<bool> = const { Cell::new(true) };
    }

    /// Let change number `n` (from 0) by this thread fail, and count anew. `None`: all succeed.
    pub(crate) fn plan(fault: Option<(u64, Fault)>) {
        PLAN.set(fault);
        COUNT.set(0);
    }

    /// Whether this thread's file system can exchange two names.
    pub(crate) fn allow_exchange(allowed: bool) {
        EXCHANGE.set(allowed);
    }

    pub(super) fn exchange() -> Result<()> {
        if EXCHANGE.get() { Ok(()) } else { Err(Error::from_raw_os_error(nix::libc::EINVAL)) }
    }

    /// Changes since the last [`plan`].
    pub(crate) fn count() -> u64 {
        COUNT.get()
    }

    pub(crate) fn step() -> Result<()> {
        let now = COUNT.get();
        COUNT.set(now + 1);
        match PLAN.get() {
            Some((n, Fault::DiskFull)) if now == n => Err(Error::from_raw_os_error(nix::libc::ENOSPC)),
            Some((n, Fault::Death)) if now >= n => Err(Error::other("the process is dead")),
            _ => Ok(()),
        }
    }
}
