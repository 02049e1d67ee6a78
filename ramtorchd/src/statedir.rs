//! The state folder: one daemon at a time, and a place for everything.
//!
//! ```text
//! STATE_DIR/lock                    flock'd while a daemon lives; holds its pid
//! STATE_DIR/run/worker.sock         socket of the workers, folder mode 0700
//! STATE_DIR/segments/               registry of shared-memory segments
//! STATE_DIR/cache/                  token caches
//! STATE_DIR/jobs/ID/job.json        the job, replaced atomically
//! STATE_DIR/jobs/ID/metrics.jsonl   its metrics, a line a step, written by its first rank
//! STATE_DIR/jobs/ID/logs/           output of its workers, a file a rank and generation
//! STATE_DIR/quarantine.json         devices that an error took out of use, while there are any
//! STATE_DIR/outputs.jsonl           which user's job made what, appended
//! STATE_DIR/oneoff/                 logs of one-off work, removed with it
//! ```

use nix::fcntl::{Flock, FlockArg};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Why a state folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateDirError {
    /// Another daemon has it.
    #[error(
        "another ramtorchd{} uses the state folder {}; stop it, or give this one a --state-dir and --socket of its own",
        pid.as_ref().map(|p| format!(" (pid {p})")).unwrap_or_default(), .dir.display()
    )]
    InUse {
        /// The folder.
        dir: PathBuf,
        /// Who, as the lock file says.
        pid: Option<String>,
    },
    /// The operating system refused.
    #[error("cannot {what} {}: {source}; give --state-dir a folder that this user may write", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// A locked state folder. The lock ends with this value, or with the process however it ends.
#[derive(Debug)]
pub struct StateDir {
    dir: PathBuf,
    lock: Flock<File>,
}

impl StateDir {
    /// Creates the folder where need be (mode 0750), and locks it.
    ///
    /// # Errors
    /// Another daemon holds it, or it cannot be written.
    pub fn lock(dir: &Path) -> Result<StateDir, StateDirError> {
        make_dir(dir, 0o750)?;
        let path = dir.join("lock");
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(&path);
        let mut file = open.map_err(io("open", &path))?;
        let mut pid = String::new();
        let _ = file.read_to_string(&mut pid);
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
                let pid = Some(pid.trim().to_string()).filter(|p| !p.is_empty());
                return Err(StateDirError::InUse { dir: dir.into(), pid });
            }
            Err((_, e)) => return Err(io("lock", &path)(e.into())),
        };
        let state = StateDir { dir: dir.into(), lock };
        let mut file: &File = &state.lock;
        // The pid is for messages only; the lock is what counts.
        let noted = file.set_len(0).and_then(|()| std::io::Seek::rewind(&mut file)).and_then(|()| writeln!(file, "{}", std::process::id()));
        noted.map_err(io("write", &path))?;
        for (name, mode) in [("run", 0o700), ("segments", 0o750), ("cache", 0o750), ("jobs", 0o750), ("oneoff", 0o750)] {
            make_dir(&dir.join(name), mode)?;
        }
        Ok(state)
    }

    /// Folder of the workers' socket.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// Folder of the segment registry.
    pub fn segments(&self) -> PathBuf {
        self.dir.join("segments")
    }

    /// Folder of all jobs.
    pub fn jobs(&self) -> PathBuf {
        self.dir.join("jobs")
    }

    /// Devices that an error took out of use.
    pub fn quarantine(&self) -> PathBuf {
        self.dir.join("quarantine.json")
    }

    /// Which user's job made what.
    pub fn outputs(&self) -> PathBuf {
        self.dir.join("outputs.jsonl")
    }

    /// Logs of one-off work; emptied here, since nothing in it outlives a daemon.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn empty_one_offs(&self) -> Result<PathBuf, StateDirError> {
        let dir = self.dir.join("oneoff");
        std::fs::remove_dir_all(&dir).map_err(io("empty", &dir))?;
        make_dir(&dir, 0o750)?;
        Ok(dir)
    }
}

/// Creates a folder and those above it; sets the mode of the last one.
///
/// # Errors
/// It is no folder, or cannot be made.
pub fn make_dir(dir: &Path, mode: u32) -> Result<(), StateDirError> {
    DirBuilder::new().recursive(true).mode(mode).create(dir).map_err(io("create the folder", dir))?;
    let now = std::fs::metadata(dir).map_err(io("look at", dir))?.permissions().mode() & 0o777;
    // An operator's stricter mode stays.
    if now & !mode != 0 {
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(now & mode)).map_err(io("set the mode of", dir))?;
    }
    Ok(())
}

fn io(what: &'static str, path: &Path) -> impl Fn(std::io::Error) -> StateDirError {
    let path = path.to_path_buf();
    move |source| StateDirError::Io { what, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_and_names_the_holder() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let held = StateDir::lock(&state).unwrap();
        let e = StateDir::lock(&state).unwrap_err().to_string();
        assert!(e.contains(&format!("pid {}", std::process::id())), "{e}");
        drop(held);
        StateDir::lock(&state).unwrap();
    }

    #[test]
    fn folders_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let held = StateDir::lock(dir.path()).unwrap();
        let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&held.run_dir()), 0o700);
        std::fs::write(dir.path().join("oneoff/x"), "").unwrap();
        assert_eq!(std::fs::read_dir(held.empty_one_offs().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn a_file_in_the_way_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        assert!(StateDir::lock(&path).unwrap_err().to_string().contains("file"));
    }
}
