//! Reading and writing small safetensors files.

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;

/// A tensor in memory. Its debug form has no values: a test that fails must not print megabytes.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its type in the file.
    pub dtype: Dtype,
    /// Its bytes, little-endian, row-major.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}{:?}", self.dtype, self.shape)
    }
}

impl Tensor {
    /// fp32 values of this shape.
    pub fn f32(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor { shape: shape.to_vec(), dtype: Dtype::F32, bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }

    /// 64-bit integers of this shape.
    pub fn i64(shape: &[usize], values: &[i64]) -> Tensor {
        Tensor { shape: shape.to_vec(), dtype: Dtype::I64, bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }

    fn view(&self) -> TensorView<'_> {
        TensorView::new(self.dtype, self.shape.clone(), &self.bytes).expect("the shape fits the bytes")
    }

    /// The values of an fp32 or bf16 tensor.
    ///
    /// # Panics
    /// It has another type.
    pub fn values(&self) -> Vec<f64> {
        match self.dtype {
            Dtype::F32 => self.bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect(),
            Dtype::BF16 => self.bytes.chunks_exact(2).map(|b| f64::from(f32::from_le_bytes([0, 0, b[0], b[1]]))).collect(),
            other => panic!("values of a {other:?} tensor"),
        }
    }
}

/// All tensors of a file, or of all safetensors files of a folder.
///
/// # Panics
/// One cannot be read, or the folder has none.
#[track_caller]
pub fn read_tensors(path: &Path) -> BTreeMap<String, Tensor> {
    let files: Vec<_> = if path.is_dir() {
        let entries = std::fs::read_dir(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).flatten();
        entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "safetensors")).collect()
    } else {
        vec![path.to_path_buf()]
    };
    assert!(!files.is_empty(), "{}: no safetensors file", path.display());
    let mut all = BTreeMap::new();
    for file in files {
        let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let tensors = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        for (name, t) in tensors.iter() {
            all.insert(name.to_owned(), Tensor { shape: t.shape().to_vec(), dtype: t.dtype(), bytes: t.data().to_vec() });
        }
    }
    all
}

/// Checks that two models have the same tensors, bit for bit.
///
/// # Panics
/// They do not; the tensors that differ are named.
#[track_caller]
pub fn assert_same_tensors(ours: &BTreeMap<String, Tensor>, theirs: &BTreeMap<String, Tensor>, what: &str) {
    assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{what}: the names differ");
    let different: Vec<_> = ours.iter().zip(theirs.values()).filter(|((_, a), b)| a != b).map(|((n, a), b)| (n, a, b)).collect();
    assert!(different.is_empty(), "{what}: {} of {} tensors differ: {:?}", different.len(), ours.len(), different);
}

/// Writes a file.
pub fn write_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) {
    let views = tensors.iter().map(|(name, tensor)| (name, tensor.view()));
    safetensors::serialize_to_file(views, None, path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let file = tempfile::NamedTempFile::with_suffix(".safetensors").unwrap();
        let tensors = BTreeMap::from([
            ("a".to_owned(), Tensor::f32(&[2, 2], &[1.0, -2.5, 0.0, 4.0])),
            ("b".to_owned(), Tensor::i64(&[3], &[1, 2, 3])),
        ]);
        write_tensors(file.path(), &tensors);
        assert_eq!(read_tensors(file.path()), tensors);
        assert_eq!(tensors["a"].values(), [1.0, -2.5, 0.0, 4.0]);
    }
}
