//! Small models and stores for the tests of this crate.

use crate::arch::Architecture;
use crate::config::parse_config;
use crate::fill::fill_page;
use crate::source::WeightSource;
use ramtorch_store::{GradientFormat, GradientLog, MomentFormat, Store, StoreSpec};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// An empty folder in memory, where `fsync` costs nothing: these tests make thousands.
pub(crate) fn empty_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// The folder of a committed tiny model.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/models").join(name)
}

/// An architecture from the text of a config.json.
pub(crate) fn architecture(config: &str) -> Architecture {
    let parsed = parse_config(config.as_bytes(), Path::new("config.json")).unwrap();
    Architecture::Transformer(parsed.config)
}

/// A tiny Llama of 1,896 parameters in five blocks.
pub(crate) fn tiny_llama() -> Architecture {
    architecture(TINY_LLAMA)
}

/// Its config.json.
pub(crate) const TINY_LLAMA: &str = r#"{
    "model_type": "llama", "vocab_size": 37, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": false
}"#;

/// A store that is unlinked when the test ends.
pub(crate) struct TestStore(Store);

impl Deref for TestStore {
    type Target = Store;
    fn deref(&self) -> &Store {
        &self.0
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        let _ = Store::unlink(self.0.name());
    }
}

/// What a store for `architecture` is laid out from: small pages, no gradients.
pub(crate) fn store_spec(architecture: &Architecture, ranks: u32, moments: MomentFormat) -> StoreSpec {
    StoreSpec {
        blocks: architecture.blocks(),
        world_size: ranks,
        moments,
        gradients: GradientFormat::None,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 0,
        log: GradientLog::NONE,
        metadata: String::new(),
    }
}

/// A store for `architecture`, every page filled from `source` at `step`.
pub(crate) fn store(architecture: &Architecture, ranks: u32, moments: MomentFormat, step: u64, source: &dyn WeightSource) -> TestStore {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("/ramtorch-modelio-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let store = TestStore(Store::create(&name, &store_spec(architecture, ranks, moments)).unwrap());
    fill(&store, step, source).unwrap();
    store
}

/// Fill every page of a store.
pub(crate) fn fill(store: &Store, step: u64, source: &dyn WeightSource) -> Result<(), crate::ModelError> {
    for rank in 0..store.layout().spec().world_size {
        let mut owner = store.claim(rank).unwrap();
        let pages: Vec<_> = owner.pages().collect();
        for page in pages {
            fill_page(&mut owner, store.layout(), page, step, source)?;
        }
    }
    Ok(())
}

/// Every tensor of a source, in the order of the architecture.
pub(crate) fn read_all(architecture: &Architecture, source: &dyn WeightSource) -> Vec<Vec<f32>> {
    let blocks = architecture.blocks();
    let tensors = crate::hf::inventory(&blocks);
    tensors
        .map(|(name, shape)| {
            let mut out = vec![0.0; shape.iter().product::<u64>() as usize];
            source.read(name, 0, &mut out).unwrap();
            out
        })
        .collect()
}

/// Both moments of every tensor; none where the source has none.
pub(crate) fn read_all_moments(architecture: &Architecture, source: &dyn WeightSource) -> Option<Vec<(Vec<f32>, Vec<f32>)>> {
    let blocks = architecture.blocks();
    let tensors = crate::hf::inventory(&blocks);
    tensors
        .map(|(name, shape)| {
            let n = shape.iter().product::<u64>() as usize;
            let (mut first, mut second) = (vec![0.0; n], vec![0.0; n]);
            source.read_moments(name, 0, &mut first, &mut second).unwrap().then_some((first, second))
        })
        .collect()
}

/// Bits of values, so that comparisons are exact.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// A source with moments: numbers that depend on the tensor's name, the element and a salt.
pub(crate) struct Synthetic {
    pub(crate) salt: u32,
    pub(crate) moments: bool,
}

impl Synthetic {
    fn value(&self, tensor: &str, part: u32, i: u64) -> f32 {
        let mut hash = crc32c::crc32c(tensor.as_bytes()) ^ self.salt.wrapping_mul(0x9E37_79B9) ^ part << 7;
        hash = crc32c::crc32c_append(hash, &i.to_le_bytes());
        // Exact in bf16, so that one source serves every format of moments.
        f32::from_bits((hash & 0x007f_0000) | 0x3f00_0000) - 0.75
    }
}

impl WeightSource for Synthetic {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), crate::ModelError> {
        for (i, x) in out.iter_mut().enumerate() {
            // Low bits too: the master weight is fp32.
            *x = self.value(tensor, 0, start + i as u64) * 1.000_123;
        }
        Ok(())
    }

    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, crate::ModelError> {
        if !self.moments {
            return Ok(false);
        }
        for (part, out) in [(1, first), (2, second)] {
            for (i, x) in out.iter_mut().enumerate() {
                *x = self.value(tensor, part, start + i as u64).abs();
            }
        }
        Ok(true)
    }
}
