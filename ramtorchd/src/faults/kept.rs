//! Devices that an error took out of use, in a file of the state folder: a daemon that starts again, after a death or with a new
//! version, must not give a broken GPU to a job. A boot ends it all, since it resets GPUs; an operator who has reset or replaced
//! one removes the file and starts the daemon again.

use super::GpuError;
use ramtorch_worker::DeviceSpec;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// A device that had an error which calls for an operator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Its name.
    pub device: String,
    /// Its address on the bus, where it is known: names are given anew when a GPU is gone.
    #[serde(default)]
    pub bus_id: Option<String>,
    /// Boot in which it had the error.
    pub boot_id: String,
    /// Who told of the error (`cuda` or `xid`).
    pub source: String,
    /// Its code there.
    pub code: u32,
    /// The error in words.
    #[serde(default)]
    pub error: String,
    /// When, in milliseconds since 1970.
    pub unix_ms: i64,
}

impl Fault {
    /// An error of this device.
    pub fn new(spec: &DeviceSpec, error: &GpuError, boot_id: &str, unix_ms: i64) -> Fault {
        Fault {
            device: spec.to_string(),
            bus_id: spec.bus_id.clone(),
            boot_id: boot_id.into(),
            source: error.source.name().into(),
            code: error.code,
            error: error.describe(),
            unix_ms,
        }
    }

    /// Whether it is this device's.
    pub fn is_of(&self, spec: &DeviceSpec) -> bool {
        match (&self.bus_id, &spec.bus_id) {
            (Some(ours), Some(its)) => ours == its,
            _ => self.device == spec.to_string(),
        }
    }
}

/// Reads the file; one that is not there holds none.
///
/// # Errors
/// It cannot be read, or makes no sense: a text for the log.
pub fn read(path: &Path) -> Result<Vec<Fault>, String> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(format!("cannot read {}: {e}", path.display())),
    };
    serde_json::from_slice(&text).map_err(|e| format!("{} makes no sense: {e}", path.display()))
}
