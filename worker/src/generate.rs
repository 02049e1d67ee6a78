//! Sampling text: prompts of any lengths side by side, layers streamed as in training, keys and values cached on the
//! device.
//!
//! ```text
//!   prefill: chunks of the padded prompts, positions 0 … longest ─► first token of each
//!   decode:  one token of every prompt a sweep, until all have ended
//! ```
//! A short prompt's padding writes keys past its end; they are overwritten before anything looks at them, since a
//! token sees only positions up to its own. Texts that have ended give their rows up once half of the rows are theirs.

mod runner;

use crate::api::*;
use crate::errors;
use crate::inference::LoadedModel;
use crate::prepare::tokenizer_source;
use crate::sampling::Sampler;
use ramtorch_data::{TextStream, Tokenizer, TokenizerSource};
use ramtorch_device::Dtype;
use ramtorch_job::{JobSpec, Precision, SampleSpec};
use ramtorch_modelio::{Architecture, TransformerConfig};
use ramtorch_store::Store;
use runner::{Room, Runner};
use std::sync::Arc;
use std::time::Instant;

/// The sample at the end of a job.
pub(crate) fn sample(
    a: &Assignment,
    spec: &JobSpec,
    architecture: &Architecture,
    store: &Arc<Store>,
    dtype: Dtype,
    s: &SampleSpec,
) -> Result<String, EngineError> {
    let source = tokenizer_source(&spec.model)
        .ok_or_else(|| EngineError::new(ErrorKind::JobFile, "`sample` needs a tokenizer; the model has none"))?;
    let request = GenerateRequest {
        prompts: vec![s.prompt.clone()],
        max_new_tokens: s.max_new_tokens,
        temperature: s.temperature,
        top_k: s.top_k,
        top_p: s.top_p,
        seed: s.seed,
        chat: false,
        precision: None,
    };
    let done = generate(&a.device, architecture, store, store.record().step, &source, dtype, &request, &|_, _| {})?;
    Ok(format!("{}{}", s.prompt, done.texts.first().map_or("", String::as_str)))
}

/// [`Task::Generate`].
pub(crate) fn run(a: &Assignment, source: &Source, request: &GenerateRequest, control: &dyn Control) -> Result<Generated, EngineError> {
    control.heartbeat(0, "loading");
    let model = LoadedModel::open(source, control)?;
    let tokenizer =
        model.tokenizer().cloned().ok_or_else(|| EngineError::input("the model has no tokenizer.json, so prompts cannot be read"))?;
    let store = model.private_store(control)?;
    control.heartbeat(0, "generating");
    let dtype = match (request.precision, a.device.kind) {
        (Some(Precision::Fp32), _) | (None, DeviceKind::Cpu) => Dtype::F32,
        _ => Dtype::Bf16,
    };
    generate(&a.device, &model.architecture, &store, 0, &tokenizer, dtype, request, &|i, text| control.token(i, text))
}

fn generate(
    device: &DeviceSpec,
    architecture: &Architecture,
    store: &Arc<Store>,
    version: u64,
    tokenizer: &TokenizerSource,
    dtype: Dtype,
    request: &GenerateRequest,
    token: &dyn Fn(usize, &str),
) -> Result<Generated, EngineError> {
    let begin = Instant::now();
    let config = architecture.transformer().ok_or_else(|| EngineError::input("a plain stack generates no text"))?;
    let tokenizer = Tokenizer::load(tokenizer).map_err(errors::data)?;
    let prompts = encode(&tokenizer, config, request)?;
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let capacity = longest + request.max_new_tokens;
    if config.rope.is_none() && capacity > config.max_positions {
        return Err(EngineError::input(format!(
            "{longest} prompt tokens and {} new ones are more than the model's {} positions; ask for fewer",
            request.max_new_tokens, config.max_positions
        )));
    }
    let room = Room { prompts: prompts.len(), longest, capacity };
    let mut runner = Runner::open(device, architecture, store, version, dtype, room)?;
    let sampler = Sampler::new(device.threads.min(prompts.len()))?;
    let ready = Instant::now();
    let mut streams: Vec<TextStream> = prompts.iter().map(|_| tokenizer.stream(true)).collect();
    let mut texts = vec![String::new(); prompts.len()];
    // The texts that have a row.
    let mut rows: Vec<usize> = (0..prompts.len()).collect();
    let mut ended = vec![request.max_new_tokens == 0; prompts.len()];
    let stop = |id: u32| tokenizer.eos_ids().contains(&id) || config.eos_token_ids.contains(&id);
    let first = runner.prefill(&prompts)?;
    let (mut new_tokens, mut first_tokens, mut prefilled) = (0u64, 0u64, Instant::now());
    let mut next = Vec::new();
    for step in 0..request.max_new_tokens {
        let texts_of_rows: Vec<Option<usize>> = rows.iter().map(|i| Some(*i).filter(|i| !ended[*i])).collect();
        let choose = |logits: &[u8]| sampler.next_tokens(logits, dtype, &texts_of_rows, request, step);
        let chosen = if step == 0 { choose(&first)? } else { runner.decode(&next, choose)? };
        next = vec![0u32; rows.len()];
        for (row, id) in chosen.into_iter().enumerate() {
            let (Some(id), i) = (id, rows[row]) else { continue };
            if stop(id) {
                ended[i] = true;
                continue;
            }
            new_tokens += 1;
            next[row] = id;
            let text = streams[i].push(id).map_err(errors::data)?;
            token(i, &text);
            texts[i].push_str(&text);
        }
        if step == 0 {
            (first_tokens, prefilled) = (new_tokens, Instant::now());
        }
        if ended.iter().all(|e| *e) {
            break;
        }
        let live: Vec<usize> = (0..rows.len()).filter(|row| !ended[rows[*row]]).collect();
        if live.len() * 2 <= rows.len() {
            runner.keep(&live)?;
            rows = live.iter().map(|row| rows[*row]).collect();
            next = live.iter().map(|row| next[*row]).collect();
        }
    }
    let decode_seconds = prefilled.elapsed().as_secs_f64();
    for (i, stream) in streams.iter_mut().enumerate() {
        let rest = stream.finish().map_err(errors::data)?;
        token(i, &rest);
        texts[i].push_str(&rest);
    }
    Ok(Generated {
        texts,
        prompt_tokens: prompts.iter().map(|p| p.len() as u64).sum(),
        new_tokens,
        seconds: begin.elapsed().as_secs_f64(),
        prefill_seconds: (prefilled - ready).as_secs_f64(),
        decode_seconds,
        decode_tokens: new_tokens - first_tokens,
    })
}

fn encode(tokenizer: &Tokenizer, config: &TransformerConfig, request: &GenerateRequest) -> Result<Vec<Vec<u32>>, EngineError> {
    if request.prompts.is_empty() {
        return Err(EngineError::input("no prompt"));
    }
    request
        .prompts
        .iter()
        .map(|p| {
            let mut ids = if request.chat {
                let text =
                    tokenizer.apply_chat_template(&[serde_json::json!({ "role": "user", "content": p })], true).map_err(errors::data)?;
                tokenizer.encode(&text, false)
            } else {
                tokenizer.encode(p, true)
            }
            .map_err(errors::data)?;
            if ids.is_empty() {
                // Nothing to go on from: the text begins where a document does.
                ids.extend(tokenizer.bos().or(config.bos_token_id).or(tokenizer.eos()));
            }
            if ids.is_empty() {
                return Err(EngineError::input("an empty prompt needs a beginning-of-sequence token, and the tokenizer has none"));
            }
            match ids.iter().find(|id| **id as usize >= config.vocab_size) {
                Some(id) => Err(EngineError::input(format!("the tokenizer gives id {id}, but the model has {} tokens", config.vocab_size))),
                None => Ok(ids),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_modelio::{fill_page, open_weights, parse_config};
    use ramtorch_store::{GradientFormat, GradientLog, MomentFormat, StoreSpec};
    use std::path::Path;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A model of three layers with random weights, and its store.
    pub(super) fn tiny(tied: bool) -> (Architecture, Arc<Store>) {
        let text = format!(
            r#"{{"model_type":"llama","vocab_size":97,"hidden_size":48,"intermediate_size":80,"num_hidden_layers":3,
                "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5,
                "tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
        );
        let architecture = Architecture::Transformer(parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config);
        let spec = StoreSpec {
            blocks: architecture.blocks(),
            world_size: 1,
            moments: MomentFormat::None,
            gradients: GradientFormat::None,
            page_parameters: None,
            spare_pages_per_rank: 1,
            exchange_bytes: 0,
            log: GradientLog::NONE,
            metadata: String::from("{}"),
        };
        static MADE: AtomicUsize = AtomicUsize::new(0);
        let name = format!("/ramtorch-tiny-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let store = Store::create(&name, &spec).unwrap();
        Store::unlink(&name).unwrap();
        let mut owner = store.claim(0).unwrap();
        let weights = open_weights(&architecture, None, 5).unwrap();
        for page in owner.pages().collect::<Vec<_>>() {
            fill_page(&mut owner, store.layout(), page, 0, weights.as_ref()).unwrap();
        }
        drop(owner);
        (architecture, Arc::new(store))
    }
}
