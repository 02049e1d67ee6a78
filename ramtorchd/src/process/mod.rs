//! Worker processes from the outside: who they are, how they are started, watched and ended.

mod identity;
mod spawner;

pub use identity::{EndError, Identity};
pub use spawner::{Ended, Event, ProcKey, SpawnRequest, Spawner, Status};

/// Environment variable with the path of the workers' socket.
pub const SOCKET_VARIABLE: &str = "RAMTORCH_WORKER_SOCKET";
/// Environment variable with the secret of this spawn.
pub const TOKEN_VARIABLE: &str = "RAMTORCH_WORKER_TOKEN";
/// Environment variable with the pid of the daemon that started the worker.
pub const PARENT_VARIABLE: &str = "RAMTORCH_WORKER_PARENT";
