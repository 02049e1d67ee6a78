use super::*;
use crate::dtype::Dtype;
use crate::testing::empty_folder;
use proptest::prelude::*;
use std::io::Write;

fn planned(tensors: &[(&str, Dtype, &[u64])]) -> Vec<PlannedTensor> {
    tensors.iter().map(|(name, dtype, shape)| PlannedTensor { name: (*name).into(), dtype: *dtype, shape: shape.to_vec() }).collect()
}

/// A file of three tensors, element `i` of each being `i + 0.5`.
fn sample(folder: &Path) -> PathBuf {
    let path = folder.join("sample.safetensors");
    let tensors = planned(&[("a \"quoted\"", Dtype::F32, &[3, 5]), ("scalar", Dtype::F32, &[]), ("b", Dtype::BF16, &[2, 2, 2])]);
    let mut out = StreamWriter::create(&path, &tensors, &[("format", "pt".to_owned())]).unwrap();
    for t in &tensors {
        let values: Vec<f32> = (0..t.elements()).map(|i| i as f32 + 0.5).collect();
        let mut bytes = vec![0; t.bytes() as usize];
        t.dtype.encode(&values, &mut bytes);
        out.write_all(&bytes).unwrap();
    }
    assert_eq!(out.finish().unwrap(), std::fs::metadata(&path).unwrap().len());
    path
}

#[test]
fn the_reference_library_reads_what_is_written() {
    let folder = empty_folder();
    let path = sample(folder.path());
    let bytes = std::fs::read(&path).unwrap();
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ours = TensorFile::open(&path).unwrap();
    assert_eq!(theirs.len(), 3);
    assert_eq!(ours.metadata(), [("format".to_owned(), "pt".to_owned())]);
    for tensor in ours.tensors() {
        let view = theirs.tensor(&tensor.name).unwrap();
        assert_eq!(view.shape().iter().map(|&d| d as u64).collect::<Vec<_>>(), tensor.shape);
        let mut raw = vec![0; tensor.bytes() as usize];
        ours.read_bytes(tensor, 0, &mut raw).unwrap();
        assert_eq!(view.data(), raw);
        assert_eq!(tensor.offset % tensor.dtype.size(), 0, "{} is not aligned", tensor.name);
    }
}

#[test]
fn any_range_is_read() {
    let folder = empty_folder();
    let file = TensorFile::open(&sample(folder.path())).unwrap();
    for tensor in file.tensors() {
        for start in 0..tensor.elements {
            for end in start..=tensor.elements {
                let mut out = vec![0.0; (end - start) as usize];
                file.read(tensor, start, &mut out).unwrap();
                assert!(out.iter().zip(start..).all(|(&x, i)| x == i as f32 + 0.5));
            }
        }
        assert!(file.read(tensor, tensor.elements, &mut [0.0]).is_err());
        assert!(file.read(tensor, u64::MAX, &mut [0.0]).is_err());
        assert!(file.read(tensor, u64::MAX / 4 + 1, &mut [0.0]).is_err());
    }
}

fn with_header(folder: &Path, header: &str, data: usize) -> Result<TensorFile, ModelError> {
    let path = folder.join("made.safetensors");
    let mut file = File::create(&path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&vec![0; data]).unwrap();
    TensorFile::open(&path)
}

#[test]
fn damaged_headers_are_told() {
    let folder = empty_folder();
    for (header, data, says) in [
        (r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#, 7, "truncated: tensor `w`"),
        (r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#, 9, "its tensors end at"),
        (r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}}"#, 7, "cannot have 7 bytes"),
        (r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}"#, 8, "ends before it begins"),
        (r#"{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}"#, 8, "leaves a gap"),
        (r#"{"w": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}"#, 0, "cannot have 0 bytes"),
        (r#"{"w": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}"#, 8, "unknown type F31"),
        (
            r#"{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}"#,
            8,
            "twice",
        ),
        (
            r#"{"v": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}"#,
            12,
            "overlaps",
        ),
        (r#"{"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}"#, 8, "tensor `w`"),
        (r#"{"w": {"dtype": "F32", "shape": [2]}}"#, 8, "data_offsets"),
        (r#"{"w": 3}"#, 8, "tensor `w`"),
        (r#"[]"#, 0, "object of tensors"),
        (r#"{"#, 0, "damaged"),
    ] {
        let error = with_header(folder.path(), header, data).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("made.safetensors"), "{header}: {error}");
    }
    let whole = r#"{"__metadata__": null, "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "i": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]}}"#;
    let file = with_header(folder.path(), whole, 16).unwrap();
    assert_eq!((file.tensors().len(), file.other_tensors().contains("i")), (1, true));
}

#[test]
fn what_is_no_safetensors_file_is_told() {
    let folder = empty_folder();
    let path = folder.path().join("x");
    std::fs::write(&path, b"abc").unwrap();
    assert!(TensorFile::open(&path).unwrap_err().to_string().contains("3 bytes long"));
    std::fs::write(&path, b"<html><body>Not found</body></html>").unwrap();
    assert!(TensorFile::open(&path).unwrap_err().to_string().contains("not a safetensors file"));
    assert!(TensorFile::open(folder.path()).unwrap_err().to_string().contains("not a regular file"));
    assert!(matches!(TensorFile::open(&folder.path().join("none")), Err(ModelError::Read { .. })));
}

#[test]
fn a_file_that_shrinks_while_open_is_an_error() {
    let folder = empty_folder();
    let path = sample(folder.path());
    let file = TensorFile::open(&path).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let mut out = vec![0.0; 8];
    let error = file.read(file.tensor("b").unwrap(), 0, &mut out).unwrap_err();
    assert!(error.to_string().contains("tensor `b` is cut off"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]
    #[test]
    fn no_damage_panics(changes in proptest::collection::vec((0usize..400, any::<u8>()), 1..6), cut in proptest::option::of(0usize..400)) {
        let folder = empty_folder();
        let path = sample(folder.path());
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, byte) in changes {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut);
        }
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(file) = TensorFile::open(&path) {
            let held: u64 = file.tensors().iter().map(TensorInfo::bytes).sum();
            prop_assert!(held < bytes.len() as u64);
            for tensor in file.tensors() {
                let mut out = vec![0.0; tensor.elements as usize];
                prop_assert!(file.read(tensor, 0, &mut out).is_ok());
            }
        }
    }
}
