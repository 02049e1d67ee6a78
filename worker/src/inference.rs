//! A model that is only run forward: where its weights come from, and a store of its own for them.

use crate::api::*;
use crate::errors;
use crate::prepare::tokenizer_source;
use ramtorch_data::TokenizerSource;
use ramtorch_job::{ModelSpec, Precision};
use ramtorch_modelio::{Architecture, Dtype as FileDtype, ModelAssets, OpenModel, StoreWeights, WeightSource, fill_page, resolve};
use ramtorch_store::{GradientFormat, GradientLog, MomentFormat, Store, StoreSpec};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model from a folder, a checkpoint or a live store.
pub(crate) struct LoadedModel {
    pub architecture: Architecture,
    pub assets: ModelAssets,
    pub step: u64,
    pub dtype: FileDtype,
    weights: Weights,
    tokenizer: Option<TokenizerSource>,
}

enum Weights {
    Files(Box<dyn WeightSource + Send + Sync>),
    /// A live store, attached read-only.
    Live(Arc<Store>),
}

#[derive(serde::Deserialize)]
struct Metadata {
    architecture: Architecture,
    model: ModelSpec,
}

impl LoadedModel {
    pub fn open(source: &Source, control: &dyn Control) -> Result<Self, EngineError> {
        match source {
            Source::Path(path) => {
                let m = OpenModel::open(path).map_err(errors::model)?;
                for w in &m.warnings {
                    control.event(Level::Warn, w);
                }
                for s in &m.skipped {
                    control.event(Level::Warn, &format!("checkpoint {} is not used: {}", s.path.display(), s.reason));
                }
                // A folder of checkpoints: the tokenizer lies in the checkpoint that is used.
                let tokenizer = tokenizer_folder(path, m.step).and_then(|f| TokenizerSource::find(&f));
                Ok(LoadedModel {
                    architecture: m.architecture,
                    assets: m.assets,
                    step: m.step.unwrap_or(0),
                    dtype: m.dtype,
                    weights: Weights::Files(m.weights),
                    tokenizer,
                })
            }
            Source::Segment(name) => {
                let store = Store::attach_read_only(name).map_err(errors::store)?;
                let meta: Metadata = serde_json::from_str(&store.layout().spec().metadata)
                    .map_err(|e| EngineError::input(format!("{name} is not a segment of this version: {e}")))?;
                let input = resolve(&meta.model).map_err(errors::model)?;
                let dtype = match input.dtype {
                    Some(Precision::Bf16) => FileDtype::BF16,
                    _ => FileDtype::F32,
                };
                Ok(LoadedModel {
                    architecture: meta.architecture,
                    assets: input.assets,
                    step: store.record().step,
                    dtype,
                    tokenizer: tokenizer_source(&meta.model),
                    weights: Weights::Live(Arc::new(store)),
                })
            }
        }
    }

    /// Runs `f` over the weights. In a live store they may change meanwhile; each page is consistent.
    pub fn with_weights<R>(&self, f: impl FnOnce(&dyn WeightSource, Option<&Store>) -> R) -> R {
        match &self.weights {
            Weights::Files(w) => f(w.as_ref(), None),
            Weights::Live(store) => f(&StoreWeights::live(store), Some(store)),
        }
    }

    pub fn tokenizer(&self) -> Option<&TokenizerSource> {
        self.tokenizer.as_ref()
    }

    /// Copies the weights into a store of this process alone. Its name is gone before anything is loaded, so that
    /// nothing is left behind however this process ends.
    pub fn private_store(&self, control: &dyn Control) -> Result<Arc<Store>, EngineError> {
        let spec = StoreSpec {
            blocks: self.architecture.blocks(),
            world_size: 1,
            moments: MomentFormat::None,
            gradients: GradientFormat::None,
            page_parameters: None,
            spare_pages_per_rank: 1,
            exchange_bytes: 0,
            log: GradientLog::NONE,
            metadata: String::from("{}"),
        };
        let name = format!("/ramtorch-infer-{}", std::process::id());
        let store = Store::create(&name, &spec).map_err(errors::store)?;
        Store::unlink(&name).map_err(errors::store)?;
        let mut owner = store.claim(0).map_err(errors::store)?;
        let pages: Vec<u32> = owner.pages().collect();
        self.with_weights(|w, _| {
            for (i, page) in pages.iter().enumerate() {
                fill_page(&mut owner, store.layout(), *page, 0, w).map_err(errors::model)?;
                if i % 16 == 0 {
                    control.progress("loading weights", i as u64, pages.len() as u64);
                }
            }
            Ok::<(), EngineError>(())
        })?;
        drop(owner);
        Ok(Arc::new(store))
    }
}

fn tokenizer_folder(path: &Path, step: Option<u64>) -> Option<PathBuf> {
    if path.join("tokenizer.json").is_file() {
        return Some(path.to_path_buf());
    }
    step.map(|s| path.join(ramtorch_modelio::checkpoint_folder_name(s))).filter(|p| p.is_dir())
}
