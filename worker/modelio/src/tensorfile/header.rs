//! The JSON header of a safetensors file.

use crate::dtype::Dtype;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its number format.
    pub dtype: Dtype,
    /// Its dimensions; none for a scalar.
    pub shape: Vec<u64>,
    /// Elements.
    pub elements: u64,
    /// Where its bytes begin, from the beginning of the file.
    pub(crate) offset: u64,
}

impl TensorInfo {
    /// Bytes of its elements.
    pub fn bytes(&self) -> u64 {
        self.elements * self.dtype.size()
    }
}

/// A checked header.
#[derive(Debug, Default)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<TensorInfo>,
    /// Names of the tensors whose type no weight has.
    pub(crate) others: HashSet<String>,
    pub(crate) metadata: Vec<(String, String)>,
}

/// Check a header. `data_start` is where the tensors' bytes begin in a file of `file_bytes` bytes.
///
/// Tensors of a type that no weight has (integers, masks) keep their place in the checks, but are listed by name only.
pub(crate) fn parse(text: &[u8], data_start: u64, file_bytes: u64) -> Result<Header, String> {
    let raw: RawHeader = serde_json::from_slice(text).map_err(|e| format!("the safetensors header is damaged: {e}"))?;
    let data_bytes = file_bytes.checked_sub(data_start).ok_or("the safetensors header is longer than the file")?;
    let mut places: Vec<(u64, u64, &str)> = Vec::with_capacity(raw.tensors.len());
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    let mut others = HashSet::new();
    for (name, entry) in &raw.tensors {
        let damaged = |text: &str| format!("the safetensors header is damaged: tensor `{name}` {text}");
        let [from, to] = entry.data_offsets;
        if from > to {
            return Err(damaged(&format!("ends before it begins ({from} to {to})")));
        }
        if to > data_bytes {
            return Err(format!(
                "truncated: tensor `{name}` needs the file to have {} bytes, it has {file_bytes}",
                u128::from(to) + u128::from(data_start)
            ));
        }
        let bits = element_bits(&entry.dtype).ok_or_else(|| damaged(&format!("has the unknown type {}", entry.dtype)))?;
        let elements = entry.shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        let bytes = elements.and_then(|n| n.checked_mul(bits)).filter(|bits| bits % 8 == 0).map(|bits| bits / 8);
        if bytes != Some(to - from) {
            return Err(damaged(&format!("of shape {:?} and type {} cannot have {} bytes", entry.shape, entry.dtype, to - from)));
        }
        places.push((from, to, name));
        match (Dtype::from_name(&entry.dtype), elements) {
            (Some(dtype), Some(elements)) => {
                tensors.push(TensorInfo { name: name.clone(), dtype, shape: entry.shape.clone(), elements, offset: data_start + from });
            }
            _ => drop(others.insert(name.clone())),
        }
    }
    places.sort_unstable();
    let mut end = 0;
    for (from, to, name) in places {
        if from != end {
            let what = if from < end { "overlaps another tensor" } else { "leaves a gap before it" };
            return Err(format!("the safetensors header is damaged: tensor `{name}` {what} (bytes {from} to {to})"));
        }
        end = to;
    }
    if end != data_bytes {
        return Err(format!("is {file_bytes} bytes long, its tensors end at {}: not the file that was written", data_start + end));
    }
    Ok(Header { tensors, others, metadata: raw.metadata })
}

/// Bits of one element of a type that safetensors knows.
fn element_bits(dtype: &str) -> Option<u64> {
    match dtype {
        "F4" => Some(4),
        "F6_E2M3" | "F6_E3M2" => Some(6),
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => Some(8),
        "I16" | "U16" | "F16" | "BF16" => Some(16),
        "I32" | "U32" | "F32" => Some(32),
        "C64" | "F64" | "I64" | "U64" => Some(64),
        _ => None,
    }
}

/// The header as JSON, duplicate names refused.
struct RawHeader {
    tensors: Vec<(String, Entry)>,
    metadata: Vec<(String, String)>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut seen = HashSet::new();
                let mut header = RawHeader { tensors: Vec::new(), metadata: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("`{name}` stands there twice")));
                    }
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Metadata>()?.0;
                    } else {
                        let entry = map.next_value().map_err(|e| A::Error::custom(format_args!("tensor `{name}`: {e}")))?;
                        header.tensors.push((name, entry));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(V)
    }
}

/// Pairs of strings; null, which some writers leave there, is none.
struct Metadata(Vec<(String, String)>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Metadata;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }
            fn visit_unit<E>(self) -> Result<Metadata, E> {
                Ok(Metadata(Vec::new()))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry::<String, String>()? {
                    pairs.push(pair);
                }
                Ok(Metadata(pairs))
            }
        }
        deserializer.deserialize_any(V)
    }
}
