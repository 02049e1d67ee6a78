//! What `prepare` found out about a job's data, and the same data opened by a worker.

use crate::stream::{Split, Stream, Words};
use crate::tensors::{TensorData, TensorLayout};
use crate::{DataError, DataFile};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What sequences are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// Tokens of a cache that [`crate::prepare`] wrote: with a loss mask and document boundaries.
    Cache,
    /// Ready token files of the user.
    Tokens,
    /// Rows of a tensors file, for plain stacks.
    Tensors,
}

/// One list of files, read as one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Mapped one after the other.
    pub files: Vec<DataFile>,
    /// Tokens in all; rows for tensors.
    pub tokens: u64,
    /// Tokens that count in the loss where they are targets.
    pub loss_tokens: u64,
    /// Documents, where they are known.
    pub documents: u64,
}

/// Prepared data: small, to be sent to workers as JSON. Nothing of it is in memory until [`Dataset::open`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dataset {
    /// What sequences are made of.
    pub kind: DataKind,
    /// Inputs (and targets) of a sequence; 1 for tensors.
    pub sequence_length: usize,
    /// Sequences (rows, for tensors) to train on.
    pub train_sequences: u64,
    /// Sequences (rows) to validate on; 0 without validation.
    pub validation_sequences: u64,
    /// Whether a weight of 0 can occur: chat data, or a document mask.
    pub has_mask: bool,
    /// Attention is to stay inside documents, so the first token of a document is not a target that counts.
    pub document_mask: bool,
    /// Model vocabulary that every token id was checked against.
    pub vocab_size: Option<usize>,
    /// End-of-text token that separates the documents of ready token files, if one is known.
    pub end_of_text: Option<u32>,
    /// Training data.
    pub train: Source,
    /// Validation data in files of its own; otherwise validation sequences are the last ones of `train`.
    pub validation: Option<Source>,
    /// Widths of a tensors file.
    pub tensors: Option<TensorLayout>,
}

impl Dataset {
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Source> {
        std::iter::once(&self.train).chain(&self.validation)
    }

    /// Maps the files, after checking that they are those that were prepared. Loads no tokenizer and reads no data:
    /// memory stays small whatever the size of the files.
    ///
    /// # Errors
    /// A file that is gone, has another length, or was changed to another content.
    pub fn open(&self) -> Result<OpenDataset, DataError> {
        let damaged = |reason: &str| DataError::Spec {
            key: "data",
            reason: format!("the prepared data set does not hold together: {reason}; submit the job again"),
        };
        let own = self.validation.is_some();
        let shared = if own { 0 } else { self.validation_sequences };
        let in_train = self.train_sequences.checked_add(shared).ok_or_else(|| damaged("too many sequences"))?;
        if self.kind == DataKind::Tensors {
            let layout = self.tensors.ok_or_else(|| damaged("no tensor widths"))?;
            let train = TensorData::open(&self.train.files, layout)?;
            let validation = self.validation.as_ref().map(|v| TensorData::open(&v.files, layout)).transpose()?;
            if in_train > train.rows() || validation.as_ref().is_some_and(|v| self.validation_sequences > v.rows()) {
                return Err(damaged("more rows than the files have"));
            }
            let validation = match validation {
                Some(v) => v.slice(0, self.validation_sequences),
                None => train.slice(self.train_sequences, self.validation_sequences),
            };
            return Ok(OpenDataset { splits: None, tensors: Some((train.slice(0, self.train_sequences), validation)) });
        }
        if self.sequence_length == 0 {
            return Err(damaged("sequences of length 0"));
        }
        let words = match self.kind {
            DataKind::Cache => Words::Flagged,
            _ => Words::Plain { end_of_text: self.end_of_text },
        };
        let open = |source: &Source| Stream::open(&source.files, words, self.vocab_size).map(Arc::new);
        let train = open(&self.train)?;
        let validation = self.validation.as_ref().map(open).transpose()?;
        if in_train > sequences(train.tokens(), self.sequence_length)
            || validation.as_ref().is_some_and(|v| self.validation_sequences > sequences(v.tokens(), self.sequence_length))
        {
            return Err(damaged("more sequences than the files have"));
        }
        let split = |stream: &Arc<Stream>, first: u64, len: u64| {
            Split::new(stream.clone(), first..first + len, self.sequence_length, self.document_mask)
        };
        let validation = match &validation {
            Some(v) => split(v, 0, self.validation_sequences),
            None => split(&train, self.train_sequences, self.validation_sequences),
        };
        Ok(OpenDataset { splits: Some((split(&train, 0, self.train_sequences), validation)), tensors: None })
    }
}

/// Sequences of `length` inputs that `tokens` tokens hold: the last target of each is the first input of the next.
pub(crate) fn sequences(tokens: u64, length: usize) -> u64 {
    tokens.saturating_sub(1) / length as u64
}

/// Mapped data of a job.
#[derive(Debug, Clone)]
pub struct OpenDataset {
    splits: Option<(Split, Split)>,
    tensors: Option<(TensorData, TensorData)>,
}

impl OpenDataset {
    /// Sequences to train on; `None` for tensors.
    pub fn train(&self) -> Option<&Split> {
        self.splits.as_ref().map(|s| &s.0)
    }

    /// Sequences to validate on, possibly none; `None` for tensors.
    pub fn validation(&self) -> Option<&Split> {
        self.splits.as_ref().map(|s| &s.1)
    }

    /// Rows to train on; `None` for tokens.
    pub fn train_tensors(&self) -> Option<&TensorData> {
        self.tensors.as_ref().map(|t| &t.0)
    }

    /// Rows to validate on, possibly none; `None` for tokens.
    pub fn validation_tensors(&self) -> Option<&TensorData> {
        self.tensors.as_ref().map(|t| &t.1)
    }
}
