//! Where the daemon listens.

use std::path::{Path, PathBuf};

/// Environment variable that names the daemon's socket.
pub const SOCKET_VARIABLE: &str = "RAMTORCH_SOCKET";

const FILE_NAME: &str = "ramtorch/ramtorchd.sock";

/// Environment variable that names the address of a daemon on another machine, as `host:port`.
pub const ADDRESS_VARIABLE: &str = "RAMTORCH_ADDRESS";

/// Where a daemon may listen.
///
/// [`Endpoint::default`] is `$RAMTORCH_SOCKET` alone where it is set, else
/// `$XDG_RUNTIME_DIR/ramtorch/ramtorchd.sock`, `/run/ramtorch/ramtorchd.sock` and
/// `/var/lib/ramtorch/ramtorchd.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Unix sockets, in the order in which they are tried; the first that answers is taken. Never empty.
    Unix(Vec<PathBuf>),
    /// A daemon on another machine.
    Tcp(TcpEndpoint),
}

/// A daemon that is reached over TCP. Both sides show certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpEndpoint {
    /// `host:port`
    pub address: String,
    /// Certificates (PEM) of those who may have issued the daemon's.
    pub ca: PathBuf,
    /// The caller's own certificate chain (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// Name in the daemon's certificate (default: the host of `address`).
    pub server_name: Option<String>,
}

impl Endpoint {
    /// Exactly this socket.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Endpoint::Unix(vec![path.into()])
    }

    fn from_environment(socket: Option<PathBuf>, runtime_dir: Option<PathBuf>) -> Self {
        let set = |path: &PathBuf| !path.as_os_str().is_empty();
        if let Some(path) = socket.filter(set) {
            return Endpoint::unix(path);
        }
        // A relative XDG_RUNTIME_DIR is invalid by its specification and ignored, as other programs do.
        let runtime = runtime_dir.filter(|dir| dir.is_absolute());
        let folders = runtime.into_iter().chain([PathBuf::from("/run"), PathBuf::from("/var/lib")]);
        Endpoint::Unix(folders.map(|dir| dir.join(FILE_NAME)).collect())
    }
}

impl Default for Endpoint {
    fn default() -> Self {
        let variable = |name| std::env::var_os(name).map(PathBuf::from);
        Endpoint::from_environment(variable(SOCKET_VARIABLE), variable("XDG_RUNTIME_DIR"))
    }
}

impl From<&Path> for Endpoint {
    fn from(path: &Path) -> Self {
        Endpoint::unix(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variable_stands_alone() {
        let endpoint = Endpoint::from_environment(Some("/tmp/a.sock".into()), Some("/run/user/1000".into()));
        assert_eq!(endpoint, Endpoint::Unix(vec!["/tmp/a.sock".into()]));
    }

    #[test]
    fn the_users_runtime_folder_comes_first() {
        let endpoint = Endpoint::from_environment(Some("".into()), Some("/run/user/1000".into()));
        let expected = ["/run/user/1000/ramtorch/ramtorchd.sock", "/run/ramtorch/ramtorchd.sock", "/var/lib/ramtorch/ramtorchd.sock"];
        assert_eq!(endpoint, Endpoint::Unix(expected.map(PathBuf::from).into()));
    }

    #[test]
    fn a_relative_or_absent_runtime_folder_is_ignored() {
        let expected = ["/run/ramtorch/ramtorchd.sock", "/var/lib/ramtorch/ramtorchd.sock"].map(PathBuf::from);
        let expected = Endpoint::Unix(expected.into());
        assert_eq!(Endpoint::from_environment(None, Some("run".into())), expected);
        assert_eq!(Endpoint::from_environment(None, None), expected);
    }
}
