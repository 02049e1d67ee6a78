//! Reading a Hugging Face `config.json`.
//!
//! Defaults are those of the configuration classes in `transformers`. What would change the model's arithmetic and is not
//! implemented is refused by name; what only regularises training (dropout) is ignored with a warning.

mod fields;
mod rope;
#[cfg(test)]
mod tests;

use crate::arch::{Architecture, Family, HiddenAct, TransformerConfig};
use crate::error::ModelError;
use fields::Fields;
use ramtorch_job::Precision;
use std::path::Path;

/// Longest config.json that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A configuration file, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct ParsedConfig {
    /// The model.
    pub config: TransformerConfig,
    /// Number format that the file declares for the weights, if it is one that is written here.
    pub dtype: Option<Precision>,
    /// What was ignored, in sentences for the user.
    pub warnings: Vec<String>,
}

impl Architecture {
    /// Read a config.json.
    ///
    /// # Errors
    /// The file cannot be read or is no JSON object; a field has the wrong type or an impossible value; the model type or
    /// an option is not supported.
    pub fn from_config_file(path: &Path) -> Result<(Architecture, ParsedConfig), ModelError> {
        let bytes = crate::files::read_limited(path, MAX_CONFIG_BYTES)?;
        let parsed = parse_config(&bytes, path)?;
        Ok((Architecture::Transformer(parsed.config.clone()), parsed))
    }
}

/// Understand the text of a config.json. `origin` is named in errors.
///
/// # Errors
/// As [`Architecture::from_config_file`].
pub fn parse_config(bytes: &[u8], origin: &Path) -> Result<ParsedConfig, ModelError> {
    let value: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|e| ModelError::format(origin, format_args!("not valid JSON: {e}")))?;
    let serde_json::Value::Object(map) = value else {
        return Err(ModelError::format(origin, "the file must hold a JSON object"));
    };
    let mut f = Fields::new(&map, origin);
    let family = family(&f)?;
    refuse_unsupported(&f)?;
    let config = if family == Family::Gpt2 { gpt2(&mut f)? } else { llama_like(&mut f, family)? };
    crate::validate::transformer(&config).map_err(|e| ModelError::format(origin, e))?;
    let dtype = declared_dtype(&f);
    Ok(ParsedConfig { config, dtype, warnings: f.warnings })
}

fn family(f: &Fields<'_>) -> Result<Family, ModelError> {
    let supported = "llama, mistral, qwen2, qwen3, gpt2";
    let Some(name) = f.text("model_type")? else {
        return Err(f.error("model_type", format_args!("is missing; one of {supported} is needed")));
    };
    let family = Family::ALL.into_iter().find(|family| family.model_type() == name);
    family.ok_or_else(|| f.unsupported(format_args!("model_type \"{name}\" is not supported; supported are {supported}")))
}

fn refuse_unsupported(f: &Fields<'_>) -> Result<(), ModelError> {
    if f.present("quantization_config") {
        return Err(f.unsupported("quantization_config: quantised weights cannot be trained; use the unquantised model"));
    }
    for key in ["is_encoder_decoder", "add_cross_attention", "use_bidirectional_attention"] {
        if f.flag(key, false)? {
            return Err(f.unsupported(format_args!("{key} = true is not supported: only causal decoders are")));
        }
    }
    for key in ["is_causal", "scale_attn_weights"] {
        if !f.flag(key, true)? {
            return Err(f.unsupported(format_args!("{key} = false is not supported")));
        }
    }
    if f.flag("scale_attn_by_inverse_layer_idx", false)? {
        return Err(f.unsupported("scale_attn_by_inverse_layer_idx = true is not supported"));
    }
    if let Some(classes) = f.list("architectures")? {
        for class in classes.iter().filter_map(|c| c.as_str()) {
            if class.contains("For") && !class.ends_with("ForCausalLM") && !class.ends_with("ForConditionalGeneration") {
                return Err(f.unsupported(format_args!("architectures names {class}; only language models (…ForCausalLM) are supported")));
            }
        }
    }
    Ok(())
}

fn llama_like(f: &mut Fields<'_>, family: Family) -> Result<TransformerConfig, ModelError> {
    let d = Defaults::of(family);
    let hidden_size = f.size("hidden_size", 4096)?;
    let heads = f.size("num_attention_heads", 32)?;
    let layers = f.layers("num_hidden_layers", 32)?;
    let max_positions = f.size("max_position_embeddings", d.max_positions)?;
    // An absent key takes the class's default, null means one key head for every query head.
    let kv_heads = match f.opt_size("num_key_value_heads")? {
        None => d.kv_heads.unwrap_or(heads),
        Some(None) => heads,
        Some(Some(n)) => n,
    };
    let head_dim = match f.opt_size("head_dim")? {
        Some(Some(n)) => n,
        None if family == Family::Qwen3 => 128,
        _ => {
            if !hidden_size.is_multiple_of(heads) {
                let text = format_args!("is {hidden_size}, not a multiple of num_attention_heads ({heads}), and head_dim is not given");
                return Err(f.error("hidden_size", text));
            }
            hidden_size / heads
        }
    };
    let bias = matches!(family, Family::Llama | Family::Qwen3) && f.flag("attention_bias", false)?;
    let (sliding_window, layer_windows) = windows(f, family, layers)?;
    let rope = rope::parse(f, max_positions)?;
    f.ignored_dropout(&["attention_dropout"])?;
    Ok(TransformerConfig {
        family,
        vocab_size: f.size("vocab_size", d.vocab_size)?,
        hidden_size,
        intermediate_size: f.size("intermediate_size", d.intermediate_size)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        max_positions,
        norm_eps: f.number("rms_norm_eps", 1e-6)?,
        rope: Some(rope),
        tie_embeddings: f.flag("tie_word_embeddings", false)?,
        attention_bias: bias || family == Family::Qwen2,
        output_bias: bias,
        mlp_bias: family == Family::Llama && f.flag("mlp_bias", false)?,
        qk_norm: family == Family::Qwen3,
        sliding_window,
        layer_windows,
        hidden_act: activation(f, "hidden_act", "silu")?,
        initializer_range: f.number("initializer_range", 0.02)?,
        bos_token_id: f.token("bos_token_id", d.bos)?,
        eos_token_ids: f.tokens("eos_token_id", d.eos)?,
        padding_idx: f.token("pad_token_id", None)?,
    })
}

/// Where the configuration classes of the Llama-like families differ.
struct Defaults {
    vocab_size: usize,
    intermediate_size: usize,
    kv_heads: Option<usize>,
    max_positions: usize,
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Defaults {
    fn of(family: Family) -> Self {
        let (vocab_size, intermediate_size, kv_heads, max_positions, bos, eos) = match family {
            Family::Mistral => (32_000, 14_336, Some(8), 131_072, Some(1), Some(2)),
            Family::Qwen2 | Family::Qwen3 => (151_936, 22_016, Some(32), 32_768, None, None),
            Family::Llama | Family::Gpt2 => (32_000, 11_008, None, 2_048, Some(1), Some(2)),
        };
        Defaults { vocab_size, intermediate_size, kv_heads, max_positions, bos, eos }
    }
}

/// Sliding windows: the model's and each layer's.
fn windows(f: &mut Fields<'_>, family: Family, layers: usize) -> Result<(Option<usize>, Vec<Option<usize>>), ModelError> {
    let full = || vec![None; layers];
    let configured = f.opt_size("sliding_window")?.unwrap_or(Some(4096));
    match family {
        Family::Mistral => {
            if f.present("layer_types") {
                f.warn("layer_types is ignored: every layer of a Mistral model has the same attention, as in transformers");
            }
            Ok((configured, vec![configured; layers]))
        }
        Family::Qwen2 | Family::Qwen3 => {
            let window = if f.flag("use_sliding_window", false)? { configured } else { None };
            let Some(types) = f.list("layer_types")?.cloned() else {
                let from = f.count("max_window_layers", 28)?;
                let of = |n: usize| if n as u64 >= from { window } else { None };
                return Ok((window, (0..layers).map(of).collect()));
            };
            if types.len() != layers {
                return Err(f.error("layer_types", format_args!("has {} entries for {layers} layers", types.len())));
            }
            let mut windows = Vec::with_capacity(layers);
            for kind in &types {
                windows.push(match kind.as_str() {
                    Some("full_attention") => None,
                    Some("sliding_attention") if window.is_some() => window,
                    Some("sliding_attention") => {
                        return Err(f.error("layer_types", "asks for sliding_attention, but use_sliding_window is not true"));
                    }
                    _ => return Err(f.unsupported(format_args!("layer_types: {kind} is not supported"))),
                });
            }
            Ok((window, windows))
        }
        Family::Llama | Family::Gpt2 => Ok((None, full())),
    }
}

fn gpt2(f: &mut Fields<'_>) -> Result<TransformerConfig, ModelError> {
    let hidden_size = f.aliased_size("n_embd", "hidden_size", 768)?;
    let heads = f.aliased_size("n_head", "num_attention_heads", 12)?;
    let layers = f.layers(if f.present("n_layer") { "n_layer" } else { "num_hidden_layers" }, 12)?;
    let max_positions = f.aliased_size("n_positions", "max_position_embeddings", 1024)?;
    if !hidden_size.is_multiple_of(heads) {
        return Err(f.error("n_embd", format_args!("is {hidden_size}, not a multiple of n_head ({heads})")));
    }
    let intermediate_size = match f.opt_size("n_inner")? {
        Some(Some(n)) => n,
        _ => hidden_size.checked_mul(4).ok_or_else(|| f.error("n_embd", "is too large"))?,
    };
    f.ignored_dropout(&["resid_pdrop", "embd_pdrop", "attn_pdrop"])?;
    Ok(TransformerConfig {
        family: Family::Gpt2,
        vocab_size: f.size("vocab_size", 50_257)?,
        hidden_size,
        intermediate_size,
        layers,
        heads,
        kv_heads: heads,
        head_dim: hidden_size / heads,
        max_positions,
        norm_eps: f.number("layer_norm_epsilon", 1e-5)?,
        rope: None,
        tie_embeddings: f.flag("tie_word_embeddings", true)?,
        attention_bias: true,
        output_bias: true,
        mlp_bias: true,
        qk_norm: false,
        sliding_window: None,
        layer_windows: vec![None; layers],
        hidden_act: activation(f, "activation_function", "gelu_new")?,
        initializer_range: f.number("initializer_range", 0.02)?,
        bos_token_id: f.token("bos_token_id", Some(50_256))?,
        eos_token_ids: f.tokens("eos_token_id", Some(50_256))?,
        padding_idx: None,
    })
}

fn activation(f: &Fields<'_>, key: &str, default: &str) -> Result<HiddenAct, ModelError> {
    match f.text(key)?.unwrap_or(default) {
        "silu" | "swish" => Ok(HiddenAct::Silu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(HiddenAct::GeluTanh),
        "gelu" => Ok(HiddenAct::Gelu),
        other => Err(f.unsupported(format_args!("{key} \"{other}\" is not supported; silu, gelu, gelu_new and gelu_pytorch_tanh are"))),
    }
}

fn declared_dtype(f: &Fields<'_>) -> Option<Precision> {
    let declared = f.get("dtype").or_else(|| f.get("torch_dtype")).and_then(|v| v.as_str());
    match declared {
        Some("float32") => Some(Precision::Fp32),
        Some("bfloat16") => Some(Precision::Bf16),
        _ => None,
    }
}
