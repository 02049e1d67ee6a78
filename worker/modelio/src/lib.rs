//! Models on disk: configurations, tensor inventories, weights, checkpoints and exports.
//!
//! [`Architecture`] says what a model is made of and which tensors it has ([`Architecture::blocks`], in the order of the
//! parameter store). A [`WeightSource`] gives their values: a Hugging Face folder ([`HfFolder`]), a seed ([`SeededInit`]),
//! a [`Checkpoint`] or a live store ([`StoreWeights`]). [`fill_page`] writes them into the store, [`CheckpointWriter`] and
//! [`export_hf`] onto disk, [`inspect()`] describes them.
//!
//! ```text
//!  [model] of a job ── resolve ──► ModelInput ── open_weights ──► WeightSource ── fill_page ──► store
//!  path of a user ──── OpenModel::open ─────────────────────────►      │  ▲                       │
//!                                                                      │  └──── StoreWeights ─────┤
//!                                             export_hf, inspect ◄─────┘                          │
//!                                             find_sound ◄── step-N ◄──── CheckpointWriter ◄──────┘
//! ```
//!
//! Nothing that is read from a file is believed before it is checked: sizes, shapes, offsets, names, counts.
#![forbid(unsafe_code)]

mod arch;
mod assets;
mod blocks;
mod checkpoint;
mod config;
mod dtype;
mod durable;
mod error;
mod export;
mod files;
mod fill;
mod held;
mod hf;
mod init;
mod inspect;
mod open;
mod powf;
mod rope;
mod source;
mod stream;
mod tensorfile;
#[cfg(test)]
mod testing;
mod validate;

pub use arch::{Architecture, Family, HiddenAct, Rope, RopeScaling, StackConfig, TransformerConfig};
pub use assets::ModelAssets;
pub use blocks::{EMBED, HEAD, layer_block};
pub use checkpoint::{
    Checkpoint, CheckpointFiles, CheckpointMeta, CheckpointWriter, Committed, FindOptions, LATEST_FILE, MANIFEST_FILE, PartWriter, Piece,
    Search, ShardInfo, Skipped, TensorChecksums, VERSION as CHECKPOINT_VERSION, check_folder as check_checkpoint_folder, encode_pieces,
    find_sound, folder_name as checkpoint_folder_name, holds_unfinished_only, partition, tidy as tidy_checkpoints,
};
pub use config::{MAX_CONFIG_BYTES, ParsedConfig, parse_config};
pub use dtype::Dtype;
pub use error::{Fault, ModelError};
pub use export::{ExportOptions, SHARD_BYTES, STACK_FILE, check_export_folder, export_hf};
pub use fill::fill_page;
pub use hf::{HfFolder, INDEX_FILE, SINGLE_FILE};
pub use init::SeededInit;
pub use inspect::{TensorSummary, inspect};
pub use open::{ModelInput, OpenModel, open_weights, resolve};
pub use source::{StoreWeights, WeightSource, WeightsOnly};
pub use tensorfile::{MAX_HEADER_BYTES, TensorFile, TensorInfo};
