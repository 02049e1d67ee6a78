//! Checkpoints and model folders, as the engine writes and reads them.

use crate::api::*;
use crate::errors;
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::{JobSpec, Precision};
use ramtorch_modelio::{Architecture, Dtype, ExportOptions, StoreWeights, WeightSource, export_hf, fill_page, open_weights, resolve};
use ramtorch_modelio::{Checkpoint, CheckpointMeta, CheckpointWriter, FindOptions, checkpoint_folder_name, find_sound};
use ramtorch_store::{Layout, Owner, Store};
use std::path::{Path, PathBuf};

/// Where a run's first weights come from.
pub(crate) struct FirstWeights {
    source: Box<dyn WeightSource + Send + Sync>,
    tokens_total: u64,
}

impl FirstWeights {
    pub fn fill(&self, owner: &mut Owner<'_>, layout: &Layout, page: u32, step: u64) -> Result<(), EngineError> {
        fill_page(owner, layout, page, step, self.source.as_ref()).map_err(errors::model)
    }

    /// Target tokens trained on before.
    pub fn tokens_total(&self) -> u64 {
        self.tokens_total
    }
}

/// Opens the checkpoint to resume from, or the initial weights.
pub(crate) fn open_source(spec: &JobSpec, prepared: &Prepared, architecture: &Architecture) -> Result<FirstWeights, EngineError> {
    if let Some(point) = &prepared.resume {
        let checkpoint = Checkpoint::open(&point.path).map_err(errors::model)?;
        let tokens_total = checkpoint.meta().job.get("tokens_total").and_then(|v| v.as_u64()).unwrap_or(0);
        return Ok(FirstWeights { source: Box::new(checkpoint), tokens_total });
    }
    let source = open_weights(architecture, prepared.weights.as_deref(), spec.model.seed).map_err(errors::model)?;
    Ok(FirstWeights { source, tokens_total: 0 })
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

/// Writes the checkpoint of committed step `step`; every rank calls it. All ranks return the same success: where it is, and
/// what went wrong once it was safe.
pub(crate) fn write(
    folder: &Path,
    step: u64,
    tokens_total: u64,
    spec: &JobSpec,
    architecture: &Architecture,
    store: &Store,
    comm: &Collectives,
) -> Result<(PathBuf, Vec<String>), EngineError> {
    let leader = comm.rank() == 0;
    // Each stage ends with all ranks knowing whether all were well: nobody is left waiting.
    let agree = |ok: bool| -> Result<bool, EngineError> {
        Ok(comm.gather(Channel::Checkpoint, [f64::from(u8::from(ok)), 0.0, 0.0, 0.0])?.iter().all(|v| v[0] > 0.0))
    };
    let other = || EngineError::new(ErrorKind::Output, "another rank could not write its part");
    let begun = if leader { Some(CheckpointWriter::begin(folder, step).map_err(errors::model)) } else { None };
    hit(Point::CheckpointBegun);
    let mut failure: Option<EngineError> = None;
    let mut writer = None;
    match begun {
        Some(Ok(w)) => writer = Some(w),
        Some(Err(e)) => failure = Some(e),
        None => {}
    }
    if !agree(failure.is_none())? {
        return Err(failure.unwrap_or_else(other));
    }
    if !leader {
        match CheckpointWriter::join(folder, step) {
            Ok(w) => writer = Some(w),
            Err(e) => failure = Some(errors::model(e)),
        }
    }
    if let Some(w) = &writer {
        if let Err(e) = w.write_shard(comm.rank() as u32, comm.world() as u32, store) {
            failure = Some(errors::model(e));
        }
    }
    hit(Point::CheckpointShard);
    if !agree(failure.is_none())? {
        return Err(failure.unwrap_or_else(other)); // dropping the leader's writer removes what was written
    }
    let (mut path, mut warnings) = (folder.join(checkpoint_folder_name(step)), Vec::new());
    if let (true, Some(w)) = (leader, writer.take()) {
        let committed = resolve(&spec.model).and_then(|input| {
            let meta = CheckpointMeta {
                step,
                run: spec.name.clone(),
                architecture: architecture.clone(),
                job: serde_json::json!({ "tokens_total": tokens_total, "batch_size": spec.train.batch_size, "sequence_length": spec.data.sequence_length }),
                values: store.record().values.to_vec(),
            };
            w.commit(&meta, &input.assets, spec.checkpoint.keep)
        });
        match committed {
            Ok(c) => (path, warnings) = (c.path, c.warnings),
            Err(e) => failure = Some(errors::model(e)),
        }
    }
    if !agree(failure.is_none())? {
        return Err(failure.unwrap_or_else(other));
    }
    Ok((path, warnings))
}

/// Writes the model folder of a job that has ended.
pub(crate) fn export_store(store: &Store, spec: &JobSpec, architecture: &Architecture, path: &Path) -> Result<u64, EngineError> {
    let input = resolve(&spec.model).map_err(errors::model)?;
    let dtype = match spec.output.dtype.or(input.dtype) {
        Some(Precision::Bf16) => Dtype::BF16,
        _ => Dtype::F32,
    };
    let weights = StoreWeights::at_step(store, store.record().step);
    export_hf(path, architecture, &input.assets, &weights, &ExportOptions::new(dtype, true)).map_err(errors::model)
}
