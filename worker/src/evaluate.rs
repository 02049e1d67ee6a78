//! Perplexity of a model on data.

use crate::api::*;
use crate::batch::{Part, Reader};
use crate::errors;
use crate::inference::LoadedModel;
use crate::model::Model;
use crate::plan;
use crate::session::Session;
use ramtorch_device::Dtype;
use ramtorch_job::{DataSpec, OneOrMany, Precision};
use std::time::Instant;

pub(crate) fn run(a: &Assignment, source: &Source, request: &EvalRequest, control: &dyn Control) -> Result<EvalResult, EngineError> {
    control.heartbeat(0, "loading");
    let loaded = LoadedModel::open(source, control)?;
    let config =
        loaded.architecture.transformer().ok_or_else(|| EngineError::input("eval is for language models; a plain stack has no tokens"))?;
    if config.rope.is_none() && request.sequence_length > config.max_positions {
        return Err(EngineError::input(format!(
            "sequences of {} tokens are longer than the model's {} learned positions",
            request.sequence_length, config.max_positions
        )));
    }
    let spec = DataSpec {
        format: request.format,
        train: OneOrMany::Many(request.files.clone()),
        validation: None,
        validation_fraction: 0.0,
        sequence_length: request.sequence_length,
        shuffle: false,
        seed: 0,
        document_mask: false,
        cache: None,
        column: None,
    };
    let progress = |what: &str, done: u64, total: u64| control.progress(what, done, total);
    let dataset =
        ramtorch_data::prepare(&spec, loaded.tokenizer(), Some(config.vocab_size), &request.cache_dir, &progress).map_err(errors::data)?;
    let data = dataset.open().map_err(errors::data)?;
    let store = loaded.private_store(control)?;
    let dtype = match (request.precision, a.device.kind) {
        (Some(Precision::Fp32), _) | (None, DeviceKind::Cpu) => Dtype::F32,
        _ => Dtype::Bf16,
    };
    let model = Model::new(&loaded.architecture, store.layout(), dtype)?;
    let micro_batch = if request.micro_batch_size > 0 { request.micro_batch_size } else { (2048 / request.sequence_length).max(1) };
    let reader = Reader { data: &data, seq: request.sequence_length, document_mask: false, padding: None };
    let mut sequences = reader.len(Part::Train);
    if request.max_tokens > 0 {
        sequences = sequences.min((request.max_tokens / request.sequence_length as u64).max(1));
    }
    let together = (sequences as usize).div_ceil(micro_batch).max(1);
    let (store_spec, memory) = (store.layout().spec(), a.device.memory_bytes);
    let plan = plan::inference(&model, store_spec, micro_batch, request.sequence_length, memory, a.device.kind, together)?;
    tracing::info!(
        "{} of {} blocks stay on the device, {} micro-batches of {micro_batch} sequences go through each together",
        plan.resident.iter().filter(|stays| **stays).count(),
        model.len(),
        plan.group_len
    );
    let dev = crate::device::open(&a.device, dtype, plan.uses.allocated(), true)?;
    let mut session = Session::new(dev, model, store, &plan, false)?;
    let begin = Instant::now();
    let (mut sum, mut weight) = (0f64, 0f64);
    let all: Vec<u64> = (0..sequences).collect();
    for (i, some) in all.chunks(plan.sequences).enumerate() {
        control.heartbeat(i as u64, "evaluating");
        control.progress("evaluating", (i * plan.sequences) as u64, sequences);
        session.evaluate(&reader, Part::Train, some, some.len(), plan.micro_batches, 0, &mut sum)?;
        for micro in some.chunks(micro_batch) {
            weight += reader.weight(Part::Train, micro)?;
        }
    }
    let loss = sum / weight.max(1.0);
    Ok(EvalResult { loss, perplexity: loss.exp(), tokens: weight as u64, seconds: begin.elapsed().as_secs_f64() })
}
