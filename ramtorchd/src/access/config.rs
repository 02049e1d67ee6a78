//! `[access]`, `[limits]`, `[tcp]`, `[paths]` and `[metrics]` of the configuration file.

use crate::config::ConfigError;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// A user by name or number.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum UserRef {
    /// `1000`
    Uid(u32),
    /// `"alice"`
    Name(String),
}

impl UserRef {
    /// Whether this is the user with that id and name.
    pub fn is(&self, uid: u32, name: Option<&str>) -> bool {
        match self {
            UserRef::Uid(id) => *id == uid,
            UserRef::Name(n) => name == Some(n),
        }
    }
}

/// `[access]`: who may use the daemon. Empty: root and the daemon's own user.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessConfig {
    /// Users of the socket.
    pub users: Vec<UserRef>,
    /// Groups whose members may use the socket.
    pub groups: Vec<String>,
    /// Users who may see and end everybody's jobs, and the daemon.
    pub admins: Vec<UserRef>,
    /// Groups of such users.
    pub admin_groups: Vec<String>,
    /// Group of the socket file (default: the daemon's own); its mode is 0660.
    pub socket_group: Option<String>,
}

/// `[limits]`: what one user may ask for. They protect the daemon from a client that runs wild, not from load.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Calls a second and user, in the long run.
    pub calls_per_second: f64,
    /// Calls at once on top of that.
    pub calls_burst: u32,
    /// Open calls (watchers and other streams for the most part) of one user.
    pub open_calls_per_user: usize,
    /// Connections at once, on each of the two ways in.
    pub connections: usize,
    /// A connection without an open call is closed after so long.
    pub connection_idle_seconds: f64,
    /// Largest request, in bytes.
    pub request_bytes: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        LimitsConfig {
            calls_per_second: 1000.0,
            calls_burst: 2000,
            open_calls_per_user: 4096,
            connections: 4096,
            connection_idle_seconds: 600.0,
            request_bytes: 16 << 20,
        }
    }
}

/// `[tcp]`: a second way in, for other machines. Mutual TLS, always.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TcpConfig {
    /// Address and port, as `0.0.0.0:7447`.
    pub listen: SocketAddr,
    /// The daemon's certificate chain (PEM).
    pub certificate: PathBuf,
    /// Its key (PEM).
    pub key: PathBuf,
    /// Certificates (PEM) of those who issue clients' certificates.
    pub client_ca: PathBuf,
    /// Revocation lists (PEM), one of each issuer.
    #[serde(default)]
    pub crl: Option<PathBuf>,
    /// Names in certificates (DNS or URI names), and the local users whom they stand for. Others are refused.
    pub clients: BTreeMap<String, UserRef>,
    /// Names that are refused whatever else holds.
    #[serde(default)]
    pub revoked: Vec<String>,
    /// Whether gRPC reflection is served there.
    #[serde(default)]
    pub reflection: bool,
}

/// `[paths]`: what jobs and calls may name. Both lists empty: whatever the daemon's user can reach.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PathsConfig {
    /// Folders below which files are read.
    pub read: Vec<PathBuf>,
    /// Folders below which files are written (and read).
    pub write: Vec<PathBuf>,
}

/// `[metrics]`: the Prometheus endpoint; none without `listen`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// Address and port, as `127.0.0.1:9477`. There is no authentication: keep it on this machine or on a trusted network.
    pub listen: Option<SocketAddr>,
}

impl LimitsConfig {
    /// `connection_idle_seconds`
    pub fn connection_idle(&self) -> Duration {
        Duration::try_from_secs_f64(self.connection_idle_seconds).unwrap_or(Duration::MAX)
    }

    /// Refuses what cannot work.
    ///
    /// # Errors
    /// The key and what is wrong with it.
    pub fn check(&self) -> Result<(), ConfigError> {
        let value = |key, detail: &str| Err(ConfigError::Value { key, detail: detail.into() });
        if !(self.calls_per_second > 0.0 && self.calls_per_second.is_finite()) {
            return value("limits.calls_per_second", "must be more than 0");
        }
        let counts = [
            ("limits.calls_burst", u64::from(self.calls_burst)),
            ("limits.open_calls_per_user", self.open_calls_per_user as u64),
            ("limits.connections", self.connections as u64),
        ];
        for (key, count) in counts {
            if count == 0 {
                return value(key, "must be at least 1");
            }
        }
        if !(self.connection_idle_seconds >= 1.0 && self.connection_idle_seconds <= 86_400.0) {
            return value("limits.connection_idle_seconds", "must be between 1 and 86400");
        }
        // A job file may have a MiB, and its envelope a little more.
        if self.request_bytes < 2 << 20 || self.request_bytes > 256 << 20 {
            return value("limits.request_bytes", "must be between 2097152 and 268435456");
        }
        Ok(())
    }
}

impl TcpConfig {
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.clients.is_empty() {
            return Err(ConfigError::Value { key: "tcp.clients", detail: "names nobody: nobody could use this way in".into() });
        }
        Ok(())
    }
}

impl PathsConfig {
    /// As there.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self) -> Result<(), ConfigError> {
        let relative = |list: &[PathBuf]| list.iter().find(|p| !p.is_absolute()).cloned();
        for (key, list) in [("paths.read", &self.read), ("paths.write", &self.write)] {
            if let Some(path) = relative(list) {
                return Err(ConfigError::Value { key, detail: format!("{} is not absolute", path.display()) });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_read_and_checked() {
        let tcp = "listen = \"127.0.0.1:1\"\ncertificate = \"/c\"\nkey = \"/k\"\nclient_ca = \"/a\"\n";
        let full: TcpConfig = toml::from_str(&format!("{tcp}clients = {{ \"a.example\" = \"alice\", \"b\" = 7 }}")).unwrap();
        assert!(full.check().is_ok() && !full.reflection);
        assert_eq!(full.clients["b"], UserRef::Uid(7));
        assert!(toml::from_str::<TcpConfig>(tcp).is_err(), "who may come is never left open");
        assert!(toml::from_str::<TcpConfig>(&format!("{tcp}clients = {{}}")).unwrap().check().is_err());
        assert!(toml::from_str::<PathsConfig>("read = [\"data\"]").unwrap().check().is_err());
        assert!(toml::from_str::<LimitsConfig>("calls_per_second = 0.0").unwrap().check().is_err());
        assert!(toml::from_str::<LimitsConfig>("connection_idle_seconds = 0.0").unwrap().check().is_err());
        assert!(toml::from_str::<LimitsConfig>("request_bytes = 5").unwrap().check().is_err());
        assert!(LimitsConfig::default().check().is_ok());
        assert!(toml::from_str::<AccessConfig>("user = []").is_err());
    }
}
