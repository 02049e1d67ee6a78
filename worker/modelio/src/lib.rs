//! Models on disk: configurations, tensor inventories, weights, checkpoints and exports.
//!
//! [`Architecture`] says what a model is made of and which tensors it has ([`Architecture::blocks`], in the order of the
//! parameter store). A [`WeightSource`] gives their values: a Hugging Face folder ([`HfFolder`]), a seed ([`SeededInit`]),
//! a checkpoint or a live store. [`fill_page`] writes them into the store.
#![forbid(unsafe_code)]

mod arch;
mod blocks;
mod config;
mod dtype;
mod durable;
mod error;
mod files;
mod fill;
mod hf;
mod init;
mod rope;
mod source;
mod tensorfile;

pub use arch::{Architecture, Family, HiddenAct, Rope, RopeScaling, StackConfig, TransformerConfig};
pub use blocks::{EMBED, HEAD, layer_block};
pub use config::{MAX_CONFIG_BYTES, ParsedConfig, parse_config};
pub use dtype::Dtype;
pub use error::{Fault, ModelError};
pub use fill::fill_page;
pub use hf::{HfFolder, INDEX_FILE, SINGLE_FILE};
pub use init::SeededInit;
pub use source::WeightSource;
pub use tensorfile::{MAX_HEADER_BYTES, TensorFile, TensorInfo};
