//! Checkpoints and model folders, as the engine writes and reads them.
//!
//! [`Checkpoints`] writes checkpoints while training goes on; [`stage`] is where pages wait for the disk.

mod first;
mod link;
mod stage;
mod writer;

pub use first::FIRST_CHECKPOINT;
pub(crate) use first::FirstCheckpoint;
pub(crate) use stage::staging_bytes;
pub(crate) use writer::{Checkpoints, Due};

use crate::api::*;
use crate::errors;
use crate::record::StepNumbers;
use ramtorch_job::{JobSpec, Precision};
use ramtorch_modelio::{Architecture, Dtype, ExportOptions, StoreWeights, WeightSource, export_hf, fill_page, open_weights, resolve};
use ramtorch_modelio::{Checkpoint, FindOptions, find_sound};
use ramtorch_store::{Layout, Owner, Store};
use std::path::Path;

/// Where a run's first weights come from.
pub(crate) struct FirstWeights {
    source: Box<dyn WeightSource + Send + Sync>,
    numbers: StepNumbers,
}

impl FirstWeights {
    pub fn fill(&self, owner: &mut Owner<'_>, layout: &Layout, page: u32, step: u64) -> Result<(), EngineError> {
        fill_page(owner, layout, page, step, self.source.as_ref()).map_err(errors::model)
    }

    /// Those of the step that they are of.
    pub fn numbers(&self) -> StepNumbers {
        self.numbers
    }
}

/// Opens the checkpoint to resume from, or the initial weights.
pub(crate) fn open_source(
    spec: &JobSpec,
    prepared: &Prepared,
    architecture: &Architecture,
    resume: Option<&ResumePoint>,
) -> Result<FirstWeights, EngineError> {
    if let Some(point) = resume {
        let checkpoint = Checkpoint::open(&point.path).map_err(errors::model)?;
        let tokens_total = checkpoint.meta().job.get("tokens_total").and_then(|v| v.as_u64()).unwrap_or(0);
        let numbers = StepNumbers { tokens_total, ..StepNumbers::loaded(point.step, &checkpoint.meta().values) };
        return Ok(FirstWeights { source: Box::new(checkpoint), numbers });
    }
    let source = open_weights(architecture, prepared.weights.as_deref(), spec.model.seed).map_err(errors::model)?;
    Ok(FirstWeights { source, numbers: StepNumbers::loaded(0, &[]) })
}

/// The newest sound checkpoint of this run, and what had to be passed over.
pub(crate) fn find(spec: &JobSpec, architecture: &Architecture) -> Result<(Option<ResumePoint>, Vec<String>), EngineError> {
    let Some(folder) = spec.checkpoint.path.as_deref().filter(|_| spec.checkpoint.resume) else { return Ok((None, Vec::new())) };
    let options = FindOptions { verify: true, run: Some(spec.name.clone()), ..Default::default() };
    let search = find_sound(folder, &options).map_err(errors::model)?;
    let skipped = search.skipped.iter().map(|s| format!("checkpoint {} is not used: {}", s.path.display(), s.reason)).collect();
    let Some(found) = search.found else { return Ok((None, skipped)) };
    if found.meta().architecture != *architecture {
        return Err(EngineError::input(format!(
            "{}: the checkpoint is of another model than [model] names; point [checkpoint] path elsewhere, or set resume = false",
            found.path().display()
        )));
    }
    Ok((Some(ResumePoint { path: found.path().to_path_buf(), step: found.step() }), skipped))
}

/// The newest sound checkpoint that the state in `segment` went through, to go back to. One of this very segment, or, where the
/// job resumes from checkpoints at all, of the run's name.
pub(crate) fn find_to_go_back(spec: &JobSpec, architecture: &Architecture, segment: &str) -> Result<Option<ResumePoint>, EngineError> {
    let Some(folder) = spec.checkpoint.path.as_deref().filter(|f| f.is_dir()) else { return Ok(None) };
    let mut options = FindOptions { verify: true, run: Some(spec.name.clone()), ..Default::default() };
    while let Some(found) = find_sound(folder, &options).map_err(errors::model)?.found {
        let ours = found.meta().job.get("segment").and_then(|v| v.as_str()) == Some(segment);
        if (ours || spec.checkpoint.resume) && found.meta().architecture == *architecture {
            return Ok(Some(ResumePoint { path: found.path().to_path_buf(), step: found.step() }));
        }
        options.before = Some(found.step());
    }
    Ok(None)
}

/// Writes the model folder of a job that has ended.
pub(crate) fn export_store(store: &Store, spec: &JobSpec, architecture: &Architecture, path: &Path) -> Result<u64, EngineError> {
    let input = resolve(&spec.model).map_err(errors::model)?;
    let dtype = match spec.output.dtype.or(input.dtype) {
        Some(Precision::Bf16) => Dtype::BF16,
        _ => Dtype::F32,
    };
    let weights = StoreWeights::at_step(store, store.record().step);
    // Followed when the job started (`places`).
    let options = ExportOptions { follow_links: false, ..ExportOptions::new(dtype, true) };
    export_hf(path, architecture, &input.assets, &weights, &options).map_err(errors::model)
}
