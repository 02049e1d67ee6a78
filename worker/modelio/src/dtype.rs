//! Number formats of stored tensors, and conversion to and from fp32.

use half::{bf16, f16};
use ramtorch_job::Precision;
use serde::{Deserialize, Serialize};

/// Number format of a tensor in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// 8 bytes.
    F64,
    /// 4 bytes.
    F32,
    /// 2 bytes: the upper half of an F32.
    BF16,
    /// 2 bytes: IEEE half precision.
    F16,
}

impl Dtype {
    /// Its name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::BF16 => "BF16",
            Dtype::F16 => "F16",
        }
    }

    /// Its name in PyTorch, and so in a config.json.
    pub fn torch_name(self) -> &'static str {
        match self {
            Dtype::F64 => "float64",
            Dtype::F32 => "float32",
            Dtype::BF16 => "bfloat16",
            Dtype::F16 => "float16",
        }
    }

    /// The format with that name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Dtype> {
        [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16].into_iter().find(|d| d.name() == name)
    }

    /// Bytes of one element.
    pub fn size(self) -> u64 {
        match self {
            Dtype::F64 => 8,
            Dtype::F32 => 4,
            Dtype::BF16 | Dtype::F16 => 2,
        }
    }

    /// Convert little-endian elements to fp32. `bytes` holds exactly `out.len()` elements. F64 is rounded to nearest.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        debug_assert_eq!(bytes.len() as u64, out.len() as u64 * self.size());
        match self {
            Dtype::F64 => each(bytes, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
            Dtype::F32 => each(bytes, out, f32::from_le_bytes),
            Dtype::BF16 => each(bytes, out, |b: [u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            Dtype::F16 => each(bytes, out, |b: [u8; 2]| f16::from_le_bytes(b).to_f32()),
        }
    }

    /// Convert fp32 to little-endian elements, rounded to nearest even. `out` has room for exactly `values.len()` of them.
    pub(crate) fn encode(self, values: &[f32], out: &mut [u8]) {
        debug_assert_eq!(out.len() as u64, values.len() as u64 * self.size());
        match self {
            Dtype::F64 => put(values, out, |x| f64::from(x).to_le_bytes()),
            Dtype::F32 => put(values, out, f32::to_le_bytes),
            Dtype::BF16 => put(values, out, |x| round_bf16(x).to_le_bytes()),
            Dtype::F16 => put(values, out, |x| f16::from_f32(x).to_le_bytes()),
        }
    }
}

impl From<Precision> for Dtype {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::Fp32 => Dtype::F32,
            Precision::Bf16 => Dtype::BF16,
        }
    }
}

/// bf16 bits nearest to `x`, ties to even, as PyTorch rounds.
pub(crate) fn round_bf16(x: f32) -> u16 {
    bf16::from_f32(x).to_bits()
}

fn each<const N: usize>(bytes: &[u8], out: &mut [f32], f: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (x, &element) in out.iter_mut().zip(elements) {
        *x = f(element);
    }
}

fn put<const N: usize>(values: &[f32], out: &mut [u8], f: impl Fn(f32) -> [u8; N]) {
    let (elements, _) = out.as_chunks_mut::<N>();
    for (element, &x) in elements.iter_mut().zip(values) {
        *element = f(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_returns_what_it_can_hold() {
        let values = [0.0, -0.0, 1.0, -2.5, 0.15625, 65504.0, f32::INFINITY];
        for dtype in [Dtype::F64, Dtype::F32, Dtype::BF16, Dtype::F16] {
            let exact: Vec<f32> = if dtype == Dtype::BF16 {
                values.iter().map(|&x| if x == 65504.0 { 65536.0 } else { x }).collect()
            } else {
                values.to_vec()
            };
            let mut bytes = vec![0; values.len() * dtype.size() as usize];
            dtype.encode(&values, &mut bytes);
            let mut back = [0.0; 7];
            dtype.decode(&bytes, &mut back);
            assert_eq!(back.map(f32::to_bits).to_vec(), exact.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), "{dtype:?}");
            assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        }
    }

    #[test]
    fn bf16_ties_go_to_even_and_nan_stays() {
        assert_eq!(round_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(round_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert!(bf16::from_bits(round_bf16(f32::from_bits(0x7fff_ffff))).is_nan());
    }
}
