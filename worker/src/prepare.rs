//! The first thing a job does: look at all its files, once, in a process of its own.

use crate::api::*;
use crate::{checkpoint, errors, rates};
use ramtorch_data::{TargetLayout, TokenizerSource};
use ramtorch_job::{DataFormat, JobSpec, StackLoss};
use ramtorch_modelio::{Architecture, StackConfig, check_checkpoint_folder, check_export_folder, open_weights, resolve};
use std::path::Path;

/// Tokenizer of a model: the one the job names, or the one beside the model.
pub(crate) fn tokenizer_source(spec: &ramtorch_job::ModelSpec) -> Option<TokenizerSource> {
    match (&spec.tokenizer, &spec.path, &spec.config) {
        (Some(t), _, _) => Some(TokenizerSource::beside(t)),
        (None, Some(folder), _) => TokenizerSource::find(folder),
        (None, None, Some(config)) => TokenizerSource::find(config.parent().unwrap_or(Path::new("."))),
        _ => None,
    }
}

pub(crate) fn run(
    a: &Assignment,
    spec: &JobSpec,
    cache_dir: &Path,
    gpus: rates::Gpus,
    noted: Option<&Path>,
    control: &dyn Control,
) -> Result<Prepared, EngineError> {
    if a.device.kind == DeviceKind::Cuda {
        ramtorch_cuda::check_peers(gpus.all)?;
    }
    control.heartbeat(0, "reading the model");
    let input = resolve(&spec.model).map_err(errors::model)?;
    for w in &input.warnings {
        control.event(Level::Warn, w);
    }
    let architecture = input.architecture;
    // Opening checks names, shapes and sizes of every tensor; nothing is read yet.
    drop(open_weights(&architecture, input.weights.as_deref(), spec.model.seed).map_err(errors::model)?);
    control.heartbeat(0, "reading the data");
    let classes = match &architecture {
        Architecture::Transformer(c) => Some(c.vocab_size),
        Architecture::Stack(s) if s.loss == StackLoss::CrossEntropy => s.widths.last().copied(),
        Architecture::Stack(_) => None,
    };
    let progress = |what: &str, done: u64, total: u64| control.progress(what, done, total);
    let dataset =
        ramtorch_data::prepare(&spec.data, tokenizer_source(&spec.model).as_ref(), classes, cache_dir, &progress).map_err(errors::data)?;
    match &architecture {
        Architecture::Stack(s) => check_stack(s, &dataset)?,
        Architecture::Transformer(c) if c.rope.is_none() && spec.data.sequence_length > c.max_positions => {
            return Err(EngineError::new(
                ErrorKind::JobFile,
                format!("data.sequence_length is {}, but the model has {} learned positions", spec.data.sequence_length, c.max_positions),
            ));
        }
        Architecture::Transformer(c) if spec.data.sequence_length > c.max_positions => {
            let text =
                format!("sequences of {} tokens are longer than the {} the model was made for", spec.data.sequence_length, c.max_positions);
            control.event(Level::Warn, &text);
        }
        Architecture::Transformer(_) => {}
    }
    if dataset.train_sequences == 0 {
        return Err(EngineError::input("there is no training data left after the validation split"));
    }
    // Better said now than after days of training.
    if let Some(path) = &spec.output.path {
        check_export_folder(path).map_err(errors::model)?;
    }
    if let Some(path) = &spec.checkpoint.path {
        check_checkpoint_folder(path).map_err(errors::model)?;
    }
    control.heartbeat(0, "looking for checkpoints");
    let (resume, skipped) = checkpoint::find(spec, &architecture)?;
    if let (None, true, Some(noted)) = (&resume, spec.checkpoint.resume, noted) {
        checkpoint::FirstCheckpoint::at(noted).check(spec)?;
    }
    if let Some(path) = &spec.output.metrics {
        crate::metrics::check(path, resume.as_ref().map_or(0, |r| r.step))?;
    }
    for s in &skipped {
        control.event(Level::Warn, s);
    }
    if let Some(r) = &resume {
        control.event(Level::Info, &format!("resuming from step {} ({})", r.step, r.path.display()));
    }
    let steps = match (spec.train.steps, spec.train.epochs) {
        (Some(s), _) => s,
        (None, Some(e)) => ((dataset.train_sequences as f64 * e / spec.train.batch_size as f64).ceil() as u64).max(1),
        (None, None) => return Err(EngineError::new(ErrorKind::JobFile, "`train`: give `steps` or `epochs`")),
    };
    if spec.schedule.warmup_steps > steps {
        return Err(EngineError::new(
            ErrorKind::JobFile,
            format!(
                "`schedule.warmup_steps`: {} is more than the {steps} steps that {} epochs take",
                spec.schedule.warmup_steps,
                spec.train.epochs.unwrap_or(0.0)
            ),
        ));
    }
    control.heartbeat(0, "measuring");
    let sequence_length = if spec.data.format == DataFormat::Tensors { 1 } else { dataset.sequence_length };
    let rates = rates::for_job(a, spec, &architecture, sequence_length, cache_dir, gpus);
    Ok(Prepared {
        description: architecture.describe(),
        architecture: serde_json::to_value(&architecture).map_err(EngineError::internal)?,
        weights: input.weights,
        resume,
        train_sequences: dataset.train_sequences,
        validation_sequences: dataset.validation_sequences,
        sequence_length,
        steps,
        dataset: serde_json::to_value(&dataset).map_err(EngineError::internal)?,
        rates,
    })
}

fn check_stack(s: &StackConfig, dataset: &ramtorch_data::Dataset) -> Result<(), EngineError> {
    let Some(t) = dataset.tensors else { return Err(EngineError::internal("a stack without a tensors file")) };
    let (first, last) = (s.widths[0], s.widths[s.widths.len() - 1]);
    if t.input_width != first {
        return Err(EngineError::input(format!("`inputs` has {} columns, but the first layer takes {first}", t.input_width)));
    }
    match (s.loss, t.target) {
        (StackLoss::Mse, TargetLayout::Values { width }) if width == last => Ok(()),
        (StackLoss::Mse, TargetLayout::Values { width }) => {
            Err(EngineError::input(format!("`targets` has {width} columns, but the last layer gives {last}")))
        }
        (StackLoss::Mse, TargetLayout::Classes) => {
            Err(EngineError::input("loss = \"mse\" needs f32 `targets` [rows, outputs]; the file has class indices"))
        }
        (StackLoss::CrossEntropy, TargetLayout::Classes) => Ok(()),
        (StackLoss::CrossEntropy, TargetLayout::Values { .. }) => {
            Err(EngineError::input("loss = \"cross-entropy\" needs integer `targets` [rows]; the file has floats"))
        }
    }
}
