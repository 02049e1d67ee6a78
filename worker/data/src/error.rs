//! What can be wrong with training data, in words for the person who has to mend it.

use std::path::{Path, PathBuf};

/// Class of a [`DataError`], for exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataErrorKind {
    /// The job's `[data]` section asks for something that cannot be.
    Spec,
    /// A file that was read is missing, damaged or does not fit.
    Input,
    /// A file could not be written: the cache folder is not writable, or the disk is full.
    Output,
}

/// Why data cannot be used: the file, the place in it, and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A glob or file name that matches nothing.
    #[error("`{key}`: {pattern}: {}", if *is_glob { "no file matches this pattern" } else { "there is no such file" })]
    NoMatch {
        /// Job file key.
        key: &'static str,
        /// What was asked for.
        pattern: String,
        /// Whether it holds wildcards.
        is_glob: bool,
    },
    /// A key of `[data]` that cannot work with the rest.
    #[error("`{key}`: {reason}")]
    Spec {
        /// Job file key.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The data is text, and nothing says how to make tokens of it.
    #[error(
        "{format:?} data needs a tokenizer, but the model folder has no tokenizer.json; put it there, name one in `model.tokenizer`, or train on ready tokens (format = \"tokens\")"
    )]
    NoTokenizer {
        /// Format of the data.
        format: ramtorch_job::DataFormat,
    },
    /// The operating system refused to open or read a file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: std::io::Error,
    },
    /// A file without content.
    #[error("{}: the file is empty; remove it from the list or put data into it", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Text that is not UTF-8.
    #[error("{}: not UTF-8 at byte {offset}; convert the file to UTF-8 (for example with iconv)", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Offset of the first byte that is wrong, from 0.
        offset: u64,
    },
    /// A line of a JSON Lines file.
    #[error("{}:{line}: {reason}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A row of a Parquet or tensors file.
    #[error("{}: row {row}: {reason}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Row number, from 0.
        row: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that as a whole is damaged or not what the job says.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        reason: String,
    },
    /// A token id outside of the model's vocabulary.
    #[error(
        "{}: token {position} (byte {}) is {id}, but the model's vocabulary ends at {}; the file was made with another tokenizer, or is not little-endian u32",
        path.display(), position * 4, vocab_size.saturating_sub(1)
    )]
    TokenRange {
        /// The file.
        path: PathBuf,
        /// Index of the token in the file, from 0.
        position: u64,
        /// The id found there.
        id: u32,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// The tokenizer makes ids that the model has no embedding for.
    #[error("{}: the tokenizer makes token id {id}, but the model's vocabulary ends at {}; use the tokenizer that belongs to the model", path.display(), vocab_size.saturating_sub(1))]
    TokenizerRange {
        /// tokenizer.json.
        path: PathBuf,
        /// The id.
        id: u32,
        /// Size of the model's vocabulary.
        vocab_size: usize,
    },
    /// A tokenizer file that does not load.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// tokenizer.json or tokenizer_config.json.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A chat template that does not compile or refuses a conversation.
    #[error("chat template: {reason}")]
    Template {
        /// The template's own message, with its line.
        reason: String,
    },
    /// Not enough data for one sequence.
    #[error(
        "{split} data: {tokens} tokens are too few for one sequence of {sequence_length} (it needs {}); add data or lower `data.sequence_length`",
        sequence_length + 1
    )]
    TooShort {
        /// `training` or `validation`.
        split: &'static str,
        /// Tokens there are.
        tokens: u64,
        /// Tokens a sequence.
        sequence_length: usize,
    },
    /// A file that is not what it was when the data was prepared.
    #[error("{}: {reason}; it changed after the data was prepared. Leave data files alone while a job uses them, and submit the job again", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// The cache cannot be written.
    #[error("cannot write the token cache {}: {source}; free some space, or name another folder in `data.cache`", path.display())]
    Write {
        /// File or folder.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

impl DataError {
    /// Its class.
    pub fn kind(&self) -> DataErrorKind {
        match self {
            DataError::Write { .. } => DataErrorKind::Output,
            DataError::Spec { .. } => DataErrorKind::Spec,
            _ => DataErrorKind::Input,
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
        |source| DataError::Read { path: path.to_path_buf(), source }
    }

    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> DataError + '_ {
        |source| DataError::Write { path: path.to_path_buf(), source }
    }

    pub(crate) fn file(path: &Path, reason: impl Into<String>) -> DataError {
        DataError::File { path: path.to_path_buf(), reason: reason.into() }
    }
}
