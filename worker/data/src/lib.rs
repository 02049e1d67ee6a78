//! Training data: documents in, fixed-length sequences of tokens out.
//!
//! ```text
//!  text, JSONL, Parquet ──documents──▶ tokenizer, chat template ──▶ token cache (one file, mapped)  ┐
//!  ready token files ─────────────────────────────────────────────checked──────────────────────────┼─▶ Dataset ─▶ Split
//!  safetensors with inputs and targets ───────────────────────────checked──────────────────────────┘
//! ```
//!
//! [`prepare`] runs once for a job: it checks every file, tokenises documents into a cache that is found again by its
//! content, and returns a [`Dataset`], a small description that any process opens with [`Dataset::open`]. Which
//! sequence a step takes is decided by [`Order`] alone. docs/data.md is the user's view of the same.
#![deny(unsafe_code)]

mod cache;
mod chat;
mod dataset;
mod documents;
mod encode;
mod error;
mod file;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod map;
mod order;
mod pieces;
mod prepare;
mod python;
mod special;
mod stream;
mod template;
mod tensors;
mod text_stream;
mod tokenizer;

pub use dataset::{DataKind, Dataset, OpenDataset, Source};
pub use encode::Progress;
pub use error::{DataError, DataErrorKind};
pub use file::DataFile;
pub use order::Order;
pub use prepare::prepare;
pub use stream::Split;
pub use tensors::{TargetLayout, TargetRow, TensorData, TensorLayout};
pub use text_stream::TextStream;
pub use tokenizer::{Tokenizer, TokenizerSource};

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod testing;
