//! What can go wrong with model files, and whose fault it is.

use std::path::{Path, PathBuf};

/// A model file, checkpoint or export that cannot be used or written.
///
/// Every variant names the file, and the tensor where there is one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused to read a file.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// File or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The operating system refused to write a file.
    #[error("cannot write {}: {}", path.display(), write_reason(source))]
    Write {
        /// File or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Too little room for what is about to be written.
    #[error("{} has {free} bytes free, {needed} are needed: free some space or choose another folder", path.display())]
    DiskSpace {
        /// Folder on the file system.
        path: PathBuf,
        /// Bytes that were about to be written.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// A file's content is not what its format prescribes.
    #[error("{}: {message}", path.display())]
    Format {
        /// File.
        path: PathBuf,
        /// What is wrong, and where in the file.
        message: String,
    },
    /// A model's configuration asks for something that is not implemented.
    #[error("{}: {message}", path.display())]
    Unsupported {
        /// Configuration file.
        path: PathBuf,
        /// The option, its value, and what would be accepted.
        message: String,
    },
    /// A tensor of the model is in none of its files.
    #[error("{}: tensor `{tensor}` is missing", path.display())]
    MissingTensor {
        /// File or folder that should hold it.
        path: PathBuf,
        /// Its name.
        tensor: String,
    },
    /// A file holds a tensor that the model does not have.
    #[error("{}: tensor `{tensor}` does not belong to this model ({model})", path.display())]
    ExtraTensor {
        /// File that holds it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The model in words.
        model: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("{}: tensor `{tensor}` has shape {found:?}, the model needs {expected:?}", path.display())]
    Shape {
        /// File that holds it.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// Shape in the file.
        found: Vec<u64>,
        /// Shape that the configuration gives.
        expected: Vec<u64>,
    },
    /// Bytes of a checkpoint are not the ones that were written.
    #[error("{}: tensor `{tensor}` is damaged (its checksum does not match)", path.display())]
    Damaged {
        /// File that holds it.
        path: PathBuf,
        /// Its name, with `.exp_avg` or `.exp_avg_sq` for the moments.
        tensor: String,
    },
    /// A folder that would be replaced must not be.
    #[error("{}: {message}", path.display())]
    Exists {
        /// Folder.
        path: PathBuf,
        /// Why it is left alone, and what to do.
        message: String,
    },
    /// The live parameter store cannot be read or written.
    #[error(transparent)]
    Store(#[from] ramtorch_store::StoreError),
    /// The user asked for something that does not exist or cannot be.
    #[error("{0}")]
    Request(String),
    /// The calling code asked for something that contradicts itself.
    #[error("{0}")]
    Invalid(String),
}

/// Whose fault an error is; callers turn it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A file that came in is missing, damaged or does not fit, or the user's request cannot be met.
    Input,
    /// A file could not be written.
    Output,
    /// A defect.
    Internal,
}

impl ModelError {
    /// Class of the error.
    pub fn fault(&self) -> Fault {
        match self {
            ModelError::Write { .. } | ModelError::DiskSpace { .. } | ModelError::Exists { .. } => Fault::Output,
            ModelError::Store(_) | ModelError::Invalid(_) => Fault::Internal,
            _ => Fault::Input,
        }
    }

    /// The same error of a file below `from`, told as below `to`.
    pub(crate) fn renamed(mut self, from: &Path, to: &Path) -> Self {
        use ModelError::*;
        if let Read { path, .. } | Write { path, .. } | DiskSpace { path, .. } | Format { path, .. } | Exists { path, .. } = &mut self
            && let Ok(rest) = path.strip_prefix(from)
        {
            // Joining nothing would put a slash behind.
            *path = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
        }
        self
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        ModelError::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        ModelError::Write { path: path.to_owned(), source }
    }

    pub(crate) fn format(path: &Path, message: impl std::fmt::Display) -> Self {
        ModelError::Format { path: path.to_owned(), message: message.to_string() }
    }

    pub(crate) fn unsupported(path: &Path, message: impl std::fmt::Display) -> Self {
        ModelError::Unsupported { path: path.to_owned(), message: message.to_string() }
    }
}

fn write_reason(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::StorageFull => format!("{error}: free some space or choose another folder"),
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => {
            format!("{error}: check the folder's owner and mode")
        }
        _ => error.to_string(),
    }
}
