//! A safetensors file is refused, or every tensor that it names can be read; the safetensors library agrees on which.

use crate::ramtorch_fuzz::{file, fixture};
use ramtorch_modelio::TensorFile;

fn made(header: &str, bytes: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; bytes]].concat()
}

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    vec![
        made(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}}"#, 32),
        made(
            r#"{"__metadata__":{"format":"pt"},"x":{"dtype":"F16","shape":[],"data_offsets":[0,2]},"i":{"dtype":"I64","shape":[1,1],"data_offsets":[2,10]}}"#,
            10,
        ),
        made(r#"{"z":{"dtype":"F64","shape":[0,5],"data_offsets":[0,0]}}"#, 0),
        fixture("models/gpt2/model.safetensors").into_iter().take(32 << 10).collect(),
    ]
}

/// One input.
pub fn run(data: &[u8]) {
    let path = file("model.safetensors", data);
    let opened = TensorFile::open(&path);
    let Ok(opened) = opened else { return };
    // What we take, the reference takes: the same tensors at the same places.
    let reference = safetensors::SafeTensors::deserialize(data).expect("the library takes it, too");
    let mut out = vec![0.0; 512];
    for tensor in opened.tensors() {
        let theirs = reference.tensor(&tensor.name).expect("the same tensors");
        assert_eq!(theirs.shape().iter().map(|d| *d as u64).collect::<Vec<_>>(), tensor.shape);
        assert_eq!(theirs.data().len() as u64, tensor.bytes());
        let n = tensor.elements.min(512) as usize;
        opened.read(tensor, 0, &mut out[..n]).expect("a tensor of an accepted file");
        opened.read(tensor, tensor.elements - n as u64, &mut out[..n]).expect("its end");
        assert!(opened.read(tensor, tensor.elements, &mut out[..1]).is_err());
        assert!(opened.read(tensor, u64::MAX, &mut out[..1]).is_err());
    }
}
