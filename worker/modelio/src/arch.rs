//! What a model is made of: a decoder-only transformer of one of five families, or a plain stack of Linear layers.

use serde::{Deserialize, Serialize};

/// A model, without its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Architecture {
    /// A decoder-only language model.
    Transformer(TransformerConfig),
    /// Linear layers with an activation between them.
    Stack(StackConfig),
}

/// Linear → activation → Linear → … → Linear, each with a bias.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StackConfig {
    /// Width of the input, then of each layer's output; at least two.
    pub widths: Vec<usize>,
    /// Between the layers; none after the last.
    pub activation: ramtorch_job::Activation,
    /// What is minimised.
    pub loss: ramtorch_job::StackLoss,
}

/// Model families, by their Hugging Face `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `llama`
    Llama,
    /// `mistral`
    Mistral,
    /// `qwen2`
    Qwen2,
    /// `qwen3`
    Qwen3,
    /// `gpt2`
    Gpt2,
}

impl Family {
    /// All families.
    pub const ALL: [Family; 5] = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3, Family::Gpt2];

    /// `model_type` in config.json.
    pub fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mistral => "mistral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Gpt2 => "gpt2",
        }
    }

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Family::Llama => "Llama",
            Family::Mistral => "Mistral",
            Family::Qwen2 => "Qwen2",
            Family::Qwen3 => "Qwen3",
            Family::Gpt2 => "GPT-2",
        }
    }

    /// Class in `transformers`, as config.json's `architectures` names it.
    pub fn class(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
            Family::Gpt2 => "GPT2LMHeadModel",
        }
    }
}

/// Activation of the feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenAct {
    /// x · sigmoid(x).
    Silu,
    /// GELU by its tanh approximation (`gelu_new`, `gelu_pytorch_tanh`).
    GeluTanh,
    /// GELU by the error function.
    Gelu,
}

/// A decoder-only transformer.
///
/// Llama-like families (all but GPT-2) use RMSNorm, rotary positions, grouped-query attention and a gated feed-forward
/// layer; GPT-2 uses LayerNorm with bias, learned positions, fused qkv and a plain feed-forward layer whose matrices are
/// stored `[in, out]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransformerConfig {
    /// Family.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; need not be `hidden_size / heads`.
    pub head_dim: usize,
    /// Longest sequence that the model was made for; for GPT-2 the rows of `wpe`.
    pub max_positions: usize,
    /// Epsilon of the norms.
    pub norm_eps: f64,
    /// Rotary positions; `None` for learned ones (GPT-2).
    pub rope: Option<Rope>,
    /// The head uses the embedding's matrix.
    pub tie_embeddings: bool,
    /// Biases of the q, k and v projections.
    pub attention_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Biases of the feed-forward projections.
    pub mlp_bias: bool,
    /// RMSNorm on each query and key head (Qwen3).
    pub qk_norm: bool,
    /// Window of the layers that `layer_windows` marks: a token attends to itself and the `window - 1` before it.
    pub sliding_window: Option<usize>,
    /// Window of each layer, `layers` entries; `None` is full causal attention.
    pub layer_windows: Vec<Option<usize>>,
    /// Activation of the feed-forward layer.
    pub hidden_act: HiddenAct,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens.
    pub eos_token_ids: Vec<u32>,
    /// `padding_idx` of the input embedding, as `transformers` sets it from `pad_token_id` (never for GPT-2): looking
    /// this token up gives its row of the embedding no gradient. A tied head's gradient is not affected.
    pub padding_idx: Option<u32>,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// Stretching of rotary frequencies; every optional setting is resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum RopeScaling {
    /// `default`
    None,
    /// `linear`: all frequencies divided by `factor`.
    Linear {
        /// Stretch.
        factor: f64,
    },
    /// `llama3`: low frequencies divided by `factor`, high ones kept, a smooth passage between.
    Llama3 {
        /// Stretch.
        factor: f64,
        /// Wavelengths above `original_max_positions / low_freq_factor` are stretched.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_positions / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context of the pretraining.
        original_max_positions: usize,
    },
    /// `yarn`
    Yarn {
        /// Stretch.
        factor: f64,
        /// Context of the pretraining.
        original_max_positions: usize,
        /// Rotations above which a frequency is kept.
        beta_fast: f64,
        /// Rotations below which a frequency is stretched.
        beta_slow: f64,
        /// Cosines and sines are multiplied by this.
        attention_factor: f64,
        /// Round the bounds of the passage to whole dimensions.
        truncate: bool,
    },
}

impl TransformerConfig {
    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

impl Architecture {
    /// Parameters of the model; tied ones count once.
    pub fn parameter_count(&self) -> u64 {
        self.blocks().iter().flat_map(|b| &b.tensors).map(|t| t.shape.iter().product::<u64>()).sum()
    }

    /// Parameters that take part in matrix products for every token: all matrices but the embeddings, and the head's,
    /// tied or not. Six times this is the arithmetic of a training token without attention scores.
    pub fn matmul_parameters(&self) -> u64 {
        let blocks = self.blocks();
        let matrices = |skip: &str| -> u64 {
            let tensors = blocks.iter().filter(|b| b.name != skip).flat_map(|b| &b.tensors);
            tensors.filter(|t| t.shape.len() >= 2).map(|t| t.shape.iter().product::<u64>()).sum()
        };
        match self {
            Architecture::Transformer(c) => {
                let tied_head = if c.tie_embeddings { c.vocab_size as u64 * c.hidden_size as u64 } else { 0 };
                matrices(crate::blocks::EMBED) + tied_head
            }
            Architecture::Stack(_) => matrices(""),
        }
    }

    /// Family and size in words: "Llama, 8.03 B parameters, 32 layers".
    pub fn describe(&self) -> String {
        let (name, layers) = match self {
            Architecture::Transformer(c) => (c.family.name(), c.layers),
            Architecture::Stack(c) => ("Stack", c.widths.len() - 1),
        };
        let plural = if layers == 1 { "" } else { "s" };
        format!("{name}, {} parameters, {layers} layer{plural}", human_count(self.parameter_count()))
    }

    /// Check the sizes and their relations. Architectures from [`crate::parse_config`] have passed this; one that was read
    /// as JSON has not.
    ///
    /// # Errors
    /// A sentence that names the first field that cannot be.
    pub fn validate(&self) -> Result<(), String> {
        match self {
            Architecture::Transformer(c) => crate::validate::transformer(c),
            Architecture::Stack(c) => crate::validate::stack(c),
        }
    }

    /// The transformer's configuration, if it is one.
    pub fn transformer(&self) -> Option<&TransformerConfig> {
        match self {
            Architecture::Transformer(c) => Some(c),
            Architecture::Stack(_) => None,
        }
    }
}

/// Three significant digits and a suffix: `8.03 B`, `135 M`, `9,408` below ten thousand.
fn human_count(n: u64) -> String {
    let (unit, suffix) = match n {
        0..=9_999 => {
            let digits = n.to_string();
            return if n < 1000 { digits } else { format!("{},{}", &digits[..1], &digits[1..]) };
        }
        10_000..=999_499 => (1e3, "K"),
        999_500..=999_499_999 => (1e6, "M"),
        999_500_000..=999_499_999_999 => (1e9, "B"),
        _ => (1e12, "T"),
    };
    let value = n as f64 / unit;
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$} {suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_read_well() {
        for (n, text) in [
            (7, "7"),
            (9_408, "9,408"),
            (10_000, "10.0 K"),
            (134_515_008, "135 M"),
            (999_499_999, "999 M"),
            (999_999_999, "1.00 B"),
            (8_030_261_248, "8.03 B"),
            (70_553_706_496, "70.6 B"),
        ] {
            assert_eq!(human_count(n), text);
        }
    }
}
