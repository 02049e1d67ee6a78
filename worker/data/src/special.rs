//! Special tokens: what the files of a model folder say about them, in the order in which they are believed.

use crate::{DataError, TokenizerSource};
use serde_json::Value;
use std::path::Path;

/// Special tokens as text and id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Specials {
    pub(crate) bos: Option<(String, u32)>,
    pub(crate) eos: Option<(String, u32)>,
    /// `unk_token`, `pad_token` and others by name, for chat templates.
    pub(crate) others: Vec<(String, String)>,
}

/// Names that end a document, for a tokenizer.json that comes without any configuration.
const WELL_KNOWN_EOS: [&str; 7] = ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]"];

pub(crate) fn read_json(path: &Path) -> Result<Value, DataError> {
    let bytes = std::fs::read(path).map_err(DataError::read(path))?;
    serde_json::from_slice(&bytes).map_err(|e| DataError::Tokenizer { path: path.to_path_buf(), reason: format!("not valid JSON: {e}") })
}

/// Finds the special tokens. tokenizer_config.json is believed first, then special_tokens_map.json, then the ids in
/// config.json and generation_config.json, then well-known names among the tokenizer's own special tokens.
/// Also returns every id that ends a generated text.
pub(crate) fn resolve(
    inner: &tokenizers::Tokenizer,
    source: &TokenizerSource,
    config: Option<&Value>,
) -> Result<(Specials, Vec<u32>), DataError> {
    let map = source.special_tokens_map.as_deref().map(read_json).transpose()?;
    let model = source.model_config.as_deref().map(read_json).transpose()?;
    let generation = source.generation_config.as_deref().map(read_json).transpose()?;

    let named = |key: &str| -> Result<Option<(String, u32)>, DataError> {
        for (value, path) in [(config, &source.tokenizer_config), (map.as_ref(), &source.special_tokens_map)] {
            let Some(text) = value.and_then(|v| v.get(key)).and_then(token_text) else { continue };
            return match inner.token_to_id(text) {
                Some(id) => Ok(Some((text.to_string(), id))),
                None => Err(DataError::Tokenizer {
                    path: path.clone().unwrap_or_default(),
                    reason: format!(
                        "`{key}` is {text:?}, which {} does not have; the two files do not belong together",
                        source.tokenizer_json.display()
                    ),
                }),
            };
        }
        Ok(None)
    };
    let by_id = |key: &str| {
        let id = [&model, &generation].into_iter().flatten().flat_map(|v| ids(v.get(key))).next()?;
        inner.id_to_token(id).map(|text| (text, id))
    };
    let bos = named("bos_token")?.or_else(|| by_id("bos_token_id"));
    let eos = named("eos_token")?.or_else(|| by_id("eos_token_id")).or_else(|| {
        let known = |name: &&str| inner.token_to_id(name).map(|id| (name.to_string(), id));
        if source.tokenizer_config.is_none() && source.special_tokens_map.is_none() { WELL_KNOWN_EOS.iter().find_map(known) } else { None }
    });
    let mut others = Vec::new();
    for key in ["unk_token", "sep_token", "pad_token", "cls_token", "mask_token"] {
        let text = [config, map.as_ref()].into_iter().flatten().find_map(|v| v.get(key).and_then(token_text));
        others.extend(text.map(|t| (key.to_string(), t.to_string())));
    }
    let mut eos_ids: Vec<u32> = eos.iter().map(|(_, id)| *id).collect();
    for value in [&generation, &model].into_iter().flatten() {
        for id in ids(value.get("eos_token_id")) {
            if !eos_ids.contains(&id) {
                eos_ids.push(id);
            }
        }
    }
    Ok((Specials { bos, eos, others }, eos_ids))
}

/// A token in a configuration file: a string, or an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str()).filter(|s| !s.is_empty())
}

/// A token id or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(v) => id(v).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The chat template in tokenizer_config.json: a string, or a list of named ones of which `default` is taken (or the
/// only one).
pub(crate) fn template_of(config: &Value, path: &Path) -> Result<Option<String>, DataError> {
    let bad = |reason: String| DataError::Tokenizer { path: path.to_path_buf(), reason };
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.clone())),
        Some(Value::Array(list)) => {
            let named: Vec<(&str, &str)> =
                list.iter().filter_map(|t| Some((t.get("name")?.as_str()?, t.get("template")?.as_str()?))).collect();
            match named.iter().find(|(name, _)| *name == "default").or(if named.len() == 1 { named.first() } else { None }) {
                Some((_, template)) => Ok(Some(template.to_string())),
                None if list.is_empty() => Ok(None),
                None => Err(bad(
                    "`chat_template` is a list without a template named `default`; put the one to use into chat_template.jinja".into(),
                )),
            }
        }
        Some(_) => Err(bad("`chat_template` is neither a string nor a list of named templates".into())),
    }
}

/// The special tokens that the tokenizer's post-processor puts before and after a single text.
pub(crate) fn around(inner: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    // Some text that becomes at least one token, so that what is before it can be told from what is after it.
    let vocab = inner.get_vocab(false);
    let probes = ["a", "the", "0", " "].into_iter().map(str::to_string).chain(vocab.keys().take(64).cloned());
    for probe in probes {
        let with = inner.encode(probe, true)?;
        let is_body = |&mask: &u32| mask == 0;
        let mask = with.get_special_tokens_mask();
        if let (Some(first), Some(last)) = (mask.iter().position(is_body), mask.iter().rposition(is_body)) {
            return Ok((with.get_ids()[..first].to_vec(), with.get_ids()[last + 1..].to_vec()));
        }
    }
    Ok((inner.encode("", true)?.get_ids().to_vec(), Vec::new()))
}
