//! What stands in `checkpoint.json` and in the notes that ranks leave for the one that commits.

use crate::arch::Architecture;
use ramtorch_store::MomentFormat;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Version of the format; a reader refuses others.
pub const VERSION: u32 = 1;
/// What the `format` field holds.
pub(super) const FORMAT: &str = "ramtorch-checkpoint";
/// Suffixes of the three parts of a tensor: master weight, first and second moment.
pub(super) const PART_SUFFIXES: [&str; 3] = ["", ".exp_avg", ".exp_avg_sq"];

/// What the engine says of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointMeta {
    /// Last committed step.
    pub step: u64,
    /// The run that wrote it: a search can be limited to one run's checkpoints.
    pub run: String,
    /// The model.
    pub architecture: Architecture,
    /// Facts of the job that a resumed run needs or compares; the engine's own.
    pub job: serde_json::Value,
    /// Values of the step record, restored bit for bit.
    #[serde(with = "exact_floats")]
    pub values: Vec<f64>,
}

/// `checkpoint.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Manifest {
    pub(super) format: String,
    pub(super) version: u32,
    #[serde(flatten)]
    pub(super) meta: CheckpointMeta,
    pub(super) parameters: u64,
    pub(super) moments: MomentFormat,
    pub(super) piece_elements: u64,
    pub(super) shards: Vec<ShardInfo>,
}

/// One file of a checkpoint, as the rank that wrote it describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardInfo {
    /// Number of the shard, from 0.
    pub shard: u32,
    /// Shards in all.
    pub shards: u32,
    /// Step of the state in it.
    pub step: u64,
    /// Which writer it belongs to; notes of a dead one are refused.
    pub writer: String,
    /// Format of the moments in it.
    pub moments: MomentFormat,
    /// File name.
    pub file: String,
    /// Size of the file.
    pub bytes: u64,
    /// Its tensors.
    pub tensors: Vec<TensorChecksums>,
}

/// Checksums of a tensor: CRC-32C of every 262,144 elements of each of its parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorChecksums {
    /// Name of the tensor.
    pub name: String,
    /// Of the fp32 master weight.
    pub weight: Vec<u32>,
    /// Of the first moment; empty without moments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exp_avg: Vec<u32>,
    /// Of the second moment; empty without moments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exp_avg_sq: Vec<u32>,
}

impl TensorChecksums {
    pub(super) fn part(&self, part: usize) -> &Vec<u32> {
        [&self.weight, &self.exp_avg, &self.exp_avg_sq][part]
    }

    pub(super) fn part_mut(&mut self, part: usize) -> &mut Vec<u32> {
        match part {
            0 => &mut self.weight,
            1 => &mut self.exp_avg,
            _ => &mut self.exp_avg_sq,
        }
    }
}

/// JSON has no numbers for what is not finite; those are written as the hexadecimal bits of the f64.
mod exact_floats {
    use super::*;
    use serde::de::Error;

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Float {
        Number(f64),
        Bits(String),
    }

    pub(super) fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        let write = |&x: &f64| if x.is_finite() { Float::Number(x) } else { Float::Bits(format!("{:016x}", x.to_bits())) };
        serializer.collect_seq(values.iter().map(write))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let read = |float| match float {
            Float::Number(x) => Ok(x),
            Float::Bits(hex) => {
                u64::from_str_radix(&hex, 16).map(f64::from_bits).map_err(|_| D::Error::custom(format_args!("\"{hex}\" is no number")))
            }
        };
        Vec::<Float>::deserialize(deserializer)?.into_iter().map(read).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::StackConfig;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn record_values_return_bit_for_bit(bits in proptest::collection::vec(any::<u64>(), 0..24)) {
            let stack = StackConfig { widths: vec![2, 1], activation: Default::default(), loss: Default::default() };
            let meta = CheckpointMeta {
                step: 3,
                run: "r".into(),
                architecture: Architecture::Stack(stack),
                job: serde_json::json!({ "seed": 1 }),
                values: bits.iter().map(|&b| f64::from_bits(b)).collect(),
            };
            let back: CheckpointMeta = serde_json::from_str(&serde_json::to_string(&meta).unwrap()).unwrap();
            prop_assert_eq!(back.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), bits);
        }
    }
}
