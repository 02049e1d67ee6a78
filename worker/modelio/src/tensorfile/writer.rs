//! Writing a safetensors file as a stream: all names, types and shapes are known first, then the values follow in order.

use crate::dtype::Dtype;
use crate::durable::{self, DurableFile};
use crate::error::ModelError;
use serde_json::{Map, Value, json};
use std::path::Path;

/// A tensor that is going to be written.
#[derive(Debug, Clone)]
pub(crate) struct PlannedTensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
}

impl PlannedTensor {
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size()
    }
}

/// A safetensors file under construction.
pub(crate) struct StreamWriter {
    file: DurableFile,
    left: u64,
    size: u64,
}

impl StreamWriter {
    /// Create the file, reserve its room and write the header. The tensors' bytes must follow in this order, F64 first,
    /// then F32, then the 2-byte formats, so that every tensor is aligned to its element.
    pub(crate) fn create(path: &Path, tensors: &[PlannedTensor], metadata: &[(&str, String)]) -> Result<StreamWriter, ModelError> {
        let head = head(tensors, metadata);
        let data: u64 = tensors.iter().map(PlannedTensor::bytes).sum();
        let size = head.len() as u64 + data;
        let mut file = durable::create(path)?;
        file.reserve(size)?;
        file.write_all(&head)?;
        Ok(StreamWriter { file, left: data, size })
    }

    /// Append the next bytes.
    pub(crate) fn write_all(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.left =
            self.left.checked_sub(bytes.len() as u64).ok_or_else(|| ModelError::Invalid("more tensor bytes than announced".into()))?;
        self.file.write_all(bytes)
    }

    /// Make the file durable. Returns its size in bytes.
    pub(crate) fn finish(self) -> Result<u64, ModelError> {
        if self.left != 0 {
            return Err(ModelError::Invalid(format!("{} tensor bytes fewer than announced", self.left)));
        }
        self.file.finish()?;
        Ok(self.size)
    }
}

/// What stands before the tensors' bytes, which follow in this order: F64 first, then F32, then the 2-byte formats.
pub(crate) fn head(tensors: &[PlannedTensor], metadata: &[(&str, String)]) -> Vec<u8> {
    debug_assert!(tensors.is_sorted_by_key(|t| std::cmp::Reverse(t.dtype.size())));
    let text = header_text(tensors, metadata);
    let mut head = (text.len() as u64).to_le_bytes().to_vec();
    head.extend_from_slice(&text);
    head
}

fn header_text(tensors: &[PlannedTensor], metadata: &[(&str, String)]) -> Vec<u8> {
    let mut map = Map::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        let pairs: Map<String, Value> = metadata.iter().map(|(k, v)| ((*k).to_owned(), Value::String(v.clone()))).collect();
        map.insert("__metadata__".to_owned(), Value::Object(pairs));
    }
    let mut at = 0;
    for t in tensors {
        let end = at + t.bytes();
        map.insert(t.name.clone(), json!({ "dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut text = Value::Object(map).to_string().into_bytes();
    // The data begins at a multiple of eight bytes; spaces are what the format pads with.
    text.resize(text.len().next_multiple_of(8), b' ');
    text
}
