//! Export and inspection of models.

use crate::api::*;
use crate::errors;
use crate::inference::LoadedModel;
use ramtorch_job::Precision;
use ramtorch_modelio::{Dtype, ExportOptions, StoreWeights, export_hf, inspect};
use std::path::Path;

pub(crate) fn export(
    source: &Source,
    path: &Path,
    dtype: Option<Precision>,
    overwrite: bool,
    control: &dyn Control,
) -> Result<Exported, EngineError> {
    control.heartbeat(0, "exporting");
    let model = LoadedModel::open(source, control)?;
    // The daemon has followed all links, and looked at what is allowed there.
    let options = ExportOptions { follow_links: false, ..ExportOptions::new(dtype.map_or(model.dtype, Dtype::from), overwrite) };
    let bytes = model
        .with_weights(|weights, live| match live {
            // A running job: the folder has to be of one step. Training moves on meanwhile, so this may take a few tries.
            Some(store) => {
                let mut tries = 0;
                loop {
                    let step = store.record().step;
                    let written = export_hf(path, &model.architecture, &model.assets, &StoreWeights::at_step(store, step), &options);
                    tries += 1;
                    if written.is_ok() || tries == 3 {
                        return written;
                    }
                }
            }
            None => export_hf(path, &model.architecture, &model.assets, weights, &options),
        })
        .map_err(|e| match source {
            Source::Segment(_) => {
                let e = errors::model(e);
                EngineError::new(
                    e.kind,
                    format!("{e}; the job goes on training while it is read: write a checkpoint (`ramtorch checkpoint`) and export that"),
                )
            }
            Source::Path(_) => errors::model(e),
        })?;
    Ok(Exported { path: path.to_path_buf(), step: model.step, bytes })
}

pub(crate) fn describe(source: &Source, names: &[String], values: usize, control: &dyn Control) -> Result<Inspected, EngineError> {
    control.heartbeat(0, "inspecting");
    let model = LoadedModel::open(source, control)?;
    let tensors = model
        .with_weights(|weights, live| inspect(&model.architecture, weights, names, values, live.map(|s| s.layout())))
        .map_err(|e| match e {
            // A name that matches nothing is the user's.
            ramtorch_modelio::ModelError::Invalid(text) => EngineError::input(text),
            e => errors::model(e),
        })?;
    Ok(Inspected { step: model.step, tensors })
}
