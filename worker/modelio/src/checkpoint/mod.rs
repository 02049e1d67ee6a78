//! Checkpoints: the whole training state on disk, written by any number of ranks and read by any number.
//!
//! ```text
//!                 begin                  every rank: its pages, into all files      commit
//!  (nothing) ───────────► step-N.partial ─────────────────────────► ... + notes ─────────► step-N, latest
//!      ▲                  files, headers                                 │                     │
//!      └────────────────────────┴──── abort, error, or death: the next   ┘                     │ only now: older ones
//!                                     begin removes what is left                               ▼ beyond `keep` go
//! ```
//!
//! A folder gets its final name by one rename, after every file in it and the folder itself are on the disk, so a
//! `step-N` is whole or absent, whatever dies when. Files and folders are described in docs/checkpoints.md.

mod find;
mod format;
mod part;
mod partition;
mod pieces;
mod read;
#[cfg(test)]
mod tests;
mod write;

pub use find::{FindOptions, Search, Skipped, find_sound, holds_unfinished_only};
pub use format::{CheckpointMeta, ShardInfo, TensorChecksums, VERSION};
pub use part::PartWriter;
pub use partition::partition;
pub use pieces::{CheckpointFiles, Piece, encode as encode_pieces};
pub use read::Checkpoint;
pub use write::{CheckpointWriter, Committed, check_folder, tidy};

/// Name of the file that describes a checkpoint.
pub const MANIFEST_FILE: &str = "checkpoint.json";
/// Name of the file that names the newest checkpoint, for people and scripts.
pub const LATEST_FILE: &str = "latest";

/// Suffix of a folder that is being written.
const PARTIAL: &str = ".partial";
/// Suffix of a folder that another of the same step replaces, where two names cannot be exchanged.
const REPLACED: &str = ".replaced";

/// Name of the folder of step `step`.
pub fn folder_name(step: u64) -> String {
    format!("step-{step:08}")
}

/// The step of a folder with such a name.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("step-")?;
    if digits.len() < 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let step = digits.parse().ok()?;
    (folder_name(step) == name).then_some(step)
}
