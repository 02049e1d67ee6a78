//! Unix sockets that are never half made: bound under another name, given their mode, then renamed into place.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tokio::net::{UnixListener, UnixStream};

/// Longest path of a unix socket on Linux, in bytes (sun_path less its terminator).
pub const PATH_MAX_BYTES: usize = 107;

/// Why a socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("another daemon answers on {}; stop it, or give this one a --socket and --state-dir of its own", .0.display())]
    InUse(PathBuf),
    /// A file of another kind is in the way.
    #[error("{} exists and is no socket; remove it or choose another --socket", .0.display())]
    NotASocket(PathBuf),
    /// Too long for the operating system.
    #[error("the socket path {} has more than {PATH_MAX_BYTES} bytes; choose a shorter --socket or --state-dir", .0.display())]
    TooLong(PathBuf),
    /// The operating system refused.
    #[error("cannot {what} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

/// A bound socket. Dropping it removes the file, unless another socket has taken its place.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
    inode: (u64, u64),
}

impl Socket {
    /// Listens on `path` with `mode`, replacing the stale socket of a dead daemon.
    ///
    /// # Errors
    /// The socket is alive, the path is unusable.
    pub async fn bind(path: &Path, mode: u32) -> Result<(Socket, UnixListener), SocketError> {
        let io = |what: &'static str| move |source| SocketError::Io { what, path: path.to_path_buf(), source };
        // Twelve more bytes for the name under which it is bound first.
        if path.as_os_str().len() + 12 > PATH_MAX_BYTES {
            return Err(SocketError::TooLong(path.into()));
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(parent).map_err(io("create the folder of"))?;
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("look at")(e)),
            Ok(m) if !m.file_type().is_socket() => return Err(SocketError::NotASocket(path.into())),
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => return Err(SocketError::InUse(path.into())),
                Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused || e.kind() == std::io::ErrorKind::NotFound => {}
                // Full backlog, no permission: somebody may well be there.
                Err(_) => return Err(SocketError::InUse(path.into())),
            },
        }
        let mut first = path.as_os_str().to_owned();
        first.push(format!(".{}", std::process::id()));
        let first = PathBuf::from(first);
        let _ = std::fs::remove_file(&first);
        let listener = UnixListener::bind(&first).map_err(io("bind"))?;
        let placed = std::fs::set_permissions(&first, std::fs::Permissions::from_mode(mode)).and_then(|()| std::fs::rename(&first, path));
        if let Err(e) = placed {
            let _ = std::fs::remove_file(&first);
            return Err(io("put in place")(e));
        }
        let meta = std::fs::symlink_metadata(path).map_err(io("look at"))?;
        Ok((Socket { path: path.into(), inode: (meta.dev(), meta.ino()) }, listener))
    }

    /// Lets a group use it.
    ///
    /// # Errors
    /// Text: there is no such group, or this user may not give files to it.
    pub fn give_to(&self, group: &str) -> Result<(), String> {
        let found = nix::unistd::Group::from_name(group).map_err(|e| format!("cannot look up the group {group}: {e}"))?;
        let gid = found.ok_or_else(|| format!("there is no group {group} on this machine"))?.gid;
        nix::unistd::chown(&self.path, None, Some(gid)).map_err(|e| {
            format!("cannot give {} to the group {group}: {e}; the daemon's user has to be a member of it", self.path.display())
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x/d.sock");
        let (socket, listener) = Socket::bind(&path, 0o660).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(matches!(Socket::bind(&path, 0o660).await, Err(SocketError::InUse(_))));
        drop(listener);
        let (second, _listener) = Socket::bind(&path, 0o600).await.unwrap();
        drop(socket);
        assert!(path.exists(), "the first must not remove the second's file");
        drop(second);
        assert!(!path.exists());
        assert_eq!(std::fs::read_dir(dir.path().join("x")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn other_files_and_long_paths_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(matches!(Socket::bind(&file, 0o660).await, Err(SocketError::NotASocket(_))));
        let long = dir.path().join("y".repeat(100));
        assert!(matches!(Socket::bind(&long, 0o660).await, Err(SocketError::TooLong(_))));
    }
}
