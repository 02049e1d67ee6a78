//! Requests of the protocol, checked and turned into the engine's terms.

use super::{Context, invalid};
use crate::access::Caller;
use crate::access::paths::Use;
use crate::supervisor::{Message, Refusal};
use ramtorch_job::{DataFormat, Precision};
use ramtorch_proto::v1 as pb;
use ramtorch_worker as api;
use std::path::{Path, PathBuf};

/// Bounds of what may be asked for at once.
const PROMPTS_MAX: usize = 1024;
const NEW_TOKENS_MAX: u32 = 1 << 20;
const VALUES_MAX: u32 = 1 << 20;
const SEQUENCE_MAX: u32 = 1 << 24;

/// An absolute path.
pub fn absolute(what: &str, path: &str) -> Result<PathBuf, Refusal> {
    if !Path::new(path).is_absolute() {
        return Err(invalid(format!("{what} `{path}` is not absolute; the daemon's current folder is not the caller's")));
    }
    Ok(path.into())
}

/// fp32, bf16, or nothing for the default.
pub fn precision(text: &str) -> Result<Option<Precision>, Refusal> {
    match text {
        "" => Ok(None),
        "fp32" => Ok(Some(Precision::Fp32)),
        "bf16" => Ok(Some(Precision::Bf16)),
        _ => Err(invalid(format!("`{text}` is no number format; it is fp32 or bf16"))),
    }
}

/// Where a model is read from: a path that may be read, or a job of the caller's.
pub async fn source(context: &Context, caller: &Caller, model: Option<pb::ModelSource>) -> Result<api::Source, Refusal> {
    let source = match model.and_then(|m| m.source) {
        Some(pb::model_source::Source::Path(path)) => api::Source::Path(absolute("model path", &path)?),
        Some(pb::model_source::Source::Job(id)) => {
            let id = context.own(caller, id).await?;
            context.handle.ask(|reply| Message::Source { id, reply }).await?
        }
        None => return Err(invalid("name a model: a folder (`path`) or a `job`")),
    };
    // What a job wrote was allowed when it was submitted; what is there now may be something else.
    if let api::Source::Path(path) = &source {
        let path = path.clone();
        context.allowed(move |roots| roots.check("the model", &path, Use::Read)).await?;
    }
    Ok(source)
}

/// Sampling.
pub fn generate(r: &pb::GenerateRequest) -> Result<api::GenerateRequest, Refusal> {
    if r.prompts.is_empty() || r.prompts.len() > PROMPTS_MAX {
        return Err(invalid(format!("{} prompts; give 1 to {PROMPTS_MAX}", r.prompts.len())));
    }
    if r.max_new_tokens == 0 || r.max_new_tokens > NEW_TOKENS_MAX {
        return Err(invalid(format!("max_new_tokens {} is not between 1 and {NEW_TOKENS_MAX}", r.max_new_tokens)));
    }
    if !(r.temperature >= 0.0 && r.temperature.is_finite()) {
        return Err(invalid(format!("temperature {} must be zero or more", r.temperature)));
    }
    if !(0.0..=1.0).contains(&r.top_p) {
        return Err(invalid(format!("top_p {} is not between 0 and 1", r.top_p)));
    }
    Ok(api::GenerateRequest {
        prompts: r.prompts.clone(),
        max_new_tokens: r.max_new_tokens as usize,
        temperature: r.temperature,
        top_k: r.top_k as usize,
        top_p: if r.top_p == 0.0 { 1.0 } else { r.top_p },
        seed: r.seed,
        chat: r.chat,
        precision: precision(&r.precision)?,
    })
}

/// Evaluation.
pub fn eval(r: &pb::EvalRequest, cache_dir: PathBuf) -> Result<api::EvalRequest, Refusal> {
    let format = match r.data_format.as_str() {
        "text" => DataFormat::Text,
        "jsonl" => DataFormat::Jsonl,
        "parquet" => DataFormat::Parquet,
        "tokens" => DataFormat::Tokens,
        "tensors" => DataFormat::Tensors,
        other => return Err(invalid(format!("`{other}` is no data format; it is text, jsonl, parquet, tokens or tensors"))),
    };
    if r.files.is_empty() {
        return Err(invalid("name at least one data file"));
    }
    for file in &r.files {
        absolute("data file", file)?;
    }
    if r.sequence_length == 0 || r.sequence_length > SEQUENCE_MAX {
        return Err(invalid(format!("sequence_length {} is not between 1 and {SEQUENCE_MAX}", r.sequence_length)));
    }
    Ok(api::EvalRequest {
        format,
        files: r.files.clone(),
        sequence_length: r.sequence_length as usize,
        micro_batch_size: r.micro_batch_size.max(1) as usize,
        max_tokens: r.max_tokens,
        precision: precision(&r.precision)?,
        cache_dir,
    })
}

/// Checks how many values of each tensor are asked for.
pub fn values(n: u32) -> Result<usize, Refusal> {
    if n > VALUES_MAX {
        return Err(invalid(format!("{n} values a tensor; at most {VALUES_MAX}")));
    }
    Ok(n as usize)
}

/// A tensor, described.
pub fn tensor(t: api::TensorSummary) -> pb::TensorInfo {
    pb::TensorInfo {
        name: t.name,
        shape: t.shape,
        dtype: t.dtype,
        block: t.block,
        parameters: t.parameters,
        mean: t.mean,
        std: t.std,
        min: t.min,
        max: t.max,
        nonfinite: t.nonfinite,
        values: t.values,
        pages: t.pages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> pb::GenerateRequest {
        pb::GenerateRequest { prompts: vec!["a".into()], max_new_tokens: 5, top_p: 0.0, ..Default::default() }
    }

    #[test]
    fn sampling_is_checked() {
        assert_eq!(generate(&good()).unwrap().top_p, 1.0, "0 turns it off");
        type Change = fn(&mut pb::GenerateRequest);
        let bad: [Change; 6] = [
            |r| r.prompts.clear(),
            |r| r.max_new_tokens = 0,
            |r| r.temperature = f64::NAN,
            |r| r.temperature = -1.0,
            |r| r.top_p = 1.5,
            |r| r.precision = "fp8".into(),
        ];
        for change in bad {
            let mut request = good();
            change(&mut request);
            assert!(generate(&request).is_err(), "{request:?}");
        }
    }

    #[test]
    fn evaluation_is_checked() {
        let good = pb::EvalRequest { data_format: "text".into(), files: vec!["/a*.txt".into()], sequence_length: 8, ..Default::default() };
        assert_eq!(eval(&good, "/c".into()).unwrap().micro_batch_size, 1);
        assert!(eval(&pb::EvalRequest { data_format: "csv".into(), ..good.clone() }, "/c".into()).is_err());
        assert!(eval(&pb::EvalRequest { files: vec!["a.txt".into()], ..good.clone() }, "/c".into()).is_err());
        assert!(eval(&pb::EvalRequest { sequence_length: 0, ..good }, "/c".into()).is_err());
    }
}
