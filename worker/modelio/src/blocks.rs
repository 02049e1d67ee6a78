//! Tensor inventories: which tensors a model has, under their Hugging Face names, in the order in which they lie in the
//! parameter store.
//!
//! | block      | Llama-like                                                                     | GPT-2                   |
//! |------------|--------------------------------------------------------------------------------|-------------------------|
//! | `embed`    | `embed_tokens`                                                                 | `wte`, `wpe`            |
//! | `layers.N` | input norm; q+k+v (biases after them); q and k norm; o; post norm; gate+up; down | ln_1, attn, ln_2, mlp |
//! | `head`     | final norm, `lm_head` when untied                                              | `ln_f`, `lm_head` when untied |
//!
//! `+` marks tensors that follow each other without padding, so that q, k and v (or gate and up) are one matrix product.

use crate::arch::{Architecture, Family, StackConfig, TransformerConfig};
use ramtorch_store::{BlockSpec, TensorSpec};

/// Name of the block with the input embedding.
pub const EMBED: &str = "embed";
/// Name of the block with the final norm and the head.
pub const HEAD: &str = "head";

/// Name of decoder layer (or Linear layer of a stack) `n`, from 0.
pub fn layer_block(n: usize) -> String {
    format!("layers.{n}")
}

impl Architecture {
    /// The blocks in the order of the forward pass. A transformer has `layers + 2`, a stack one for each Linear.
    pub fn blocks(&self) -> Vec<BlockSpec> {
        match self {
            Architecture::Transformer(c) if c.family == Family::Gpt2 => gpt2(c),
            Architecture::Transformer(c) => llama_like(c),
            Architecture::Stack(c) => stack(c),
        }
    }
}

/// Collects the tensors of one block.
struct Builder {
    tensors: Vec<TensorSpec>,
    prefix: String,
}

impl Builder {
    fn new(prefix: impl Into<String>) -> Self {
        Builder { tensors: Vec::new(), prefix: prefix.into() }
    }

    fn push(&mut self, name: &str, shape: &[usize], joined: bool) {
        let shape: Vec<u64> = shape.iter().map(|&d| d as u64).collect();
        // Weight decay is for matrices and embeddings; norms and biases have one dimension.
        let decay = shape.len() >= 2;
        self.tensors.push(TensorSpec { name: format!("{}{name}", self.prefix), shape, joined, decay });
    }

    /// A tensor at a place of its own.
    fn own(&mut self, name: &str, shape: &[usize]) {
        self.push(name, shape, false);
    }

    /// Tensors that lie one right after the other.
    fn fused(&mut self, parts: &[(&str, &[usize])]) {
        for (i, (name, shape)) in parts.iter().enumerate() {
            self.push(name, shape, i > 0);
        }
    }

    fn block(self, name: impl Into<String>) -> BlockSpec {
        BlockSpec { name: name.into(), tensors: self.tensors }
    }
}

fn llama_like(c: &TransformerConfig) -> Vec<BlockSpec> {
    let (h, inner, q, kv) = (c.hidden_size, c.intermediate_size, c.query_size(), c.kv_size());
    let mut blocks = Vec::with_capacity(c.layers + 2);

    let mut embed = Builder::new("model.");
    embed.own("embed_tokens.weight", &[c.vocab_size, h]);
    blocks.push(embed.block(EMBED));

    for n in 0..c.layers {
        let mut b = Builder::new(format!("model.layers.{n}."));
        b.own("input_layernorm.weight", &[h]);
        b.fused(&[("self_attn.q_proj.weight", &[q, h]), ("self_attn.k_proj.weight", &[kv, h]), ("self_attn.v_proj.weight", &[kv, h])]);
        if c.attention_bias {
            b.fused(&[("self_attn.q_proj.bias", &[q]), ("self_attn.k_proj.bias", &[kv]), ("self_attn.v_proj.bias", &[kv])]);
        }
        if c.qk_norm {
            b.own("self_attn.q_norm.weight", &[c.head_dim]);
            b.own("self_attn.k_norm.weight", &[c.head_dim]);
        }
        b.own("self_attn.o_proj.weight", &[h, q]);
        if c.output_bias {
            b.own("self_attn.o_proj.bias", &[h]);
        }
        b.own("post_attention_layernorm.weight", &[h]);
        b.fused(&[("mlp.gate_proj.weight", &[inner, h]), ("mlp.up_proj.weight", &[inner, h])]);
        if c.mlp_bias {
            b.fused(&[("mlp.gate_proj.bias", &[inner]), ("mlp.up_proj.bias", &[inner])]);
        }
        b.own("mlp.down_proj.weight", &[h, inner]);
        if c.mlp_bias {
            b.own("mlp.down_proj.bias", &[h]);
        }
        blocks.push(b.block(layer_block(n)));
    }

    let mut head = Builder::new("");
    head.own("model.norm.weight", &[h]);
    if !c.tie_embeddings {
        head.own("lm_head.weight", &[c.vocab_size, h]);
    }
    blocks.push(head.block(HEAD));
    blocks
}

fn gpt2(c: &TransformerConfig) -> Vec<BlockSpec> {
    let (h, inner) = (c.hidden_size, c.intermediate_size);
    let mut blocks = Vec::with_capacity(c.layers + 2);

    let mut embed = Builder::new("transformer.");
    embed.own("wte.weight", &[c.vocab_size, h]);
    embed.own("wpe.weight", &[c.max_positions, h]);
    blocks.push(embed.block(EMBED));

    for n in 0..c.layers {
        let mut b = Builder::new(format!("transformer.h.{n}."));
        b.own("ln_1.weight", &[h]);
        b.own("ln_1.bias", &[h]);
        b.own("attn.c_attn.weight", &[h, 3 * h]);
        b.own("attn.c_attn.bias", &[3 * h]);
        b.own("attn.c_proj.weight", &[h, h]);
        b.own("attn.c_proj.bias", &[h]);
        b.own("ln_2.weight", &[h]);
        b.own("ln_2.bias", &[h]);
        b.own("mlp.c_fc.weight", &[h, inner]);
        b.own("mlp.c_fc.bias", &[inner]);
        b.own("mlp.c_proj.weight", &[inner, h]);
        b.own("mlp.c_proj.bias", &[h]);
        blocks.push(b.block(layer_block(n)));
    }

    let mut head = Builder::new("");
    head.own("transformer.ln_f.weight", &[h]);
    head.own("transformer.ln_f.bias", &[h]);
    if !c.tie_embeddings {
        head.own("lm_head.weight", &[c.vocab_size, h]);
    }
    blocks.push(head.block(HEAD));
    blocks
}

fn stack(c: &StackConfig) -> Vec<BlockSpec> {
    let layers = c.widths.windows(2).enumerate();
    layers
        .map(|(n, width)| {
            // torch.nn.Sequential numbers the activations too, so Linear layers have the even numbers.
            let mut b = Builder::new(format!("{}.", 2 * n));
            b.own("weight", &[width[1], width[0]]);
            b.own("bias", &[width[1]]);
            b.block(layer_block(n))
        })
        .collect()
}
