//! Limits and relations of a model's sizes, whatever they were read from.

use crate::arch::{RopeScaling, StackConfig, TransformerConfig};

/// Largest size of one dimension, so that the product of two is far below 2^64.
pub(crate) const MAX_DIMENSION: u64 = 1 << 31;
/// Most decoder layers.
pub(crate) const MAX_LAYERS: u64 = 1 << 16;
/// Most parameters: the parameter store's limit.
const MAX_PARAMETERS: u128 = 1 << 46;

pub(crate) fn transformer(c: &TransformerConfig) -> Result<(), String> {
    let sizes = [
        ("vocab_size", c.vocab_size),
        ("hidden_size", c.hidden_size),
        ("intermediate_size", c.intermediate_size),
        ("num_hidden_layers", c.layers),
        ("num_attention_heads", c.heads),
        ("num_key_value_heads", c.kv_heads),
        ("head_dim", c.head_dim),
        ("max_position_embeddings", c.max_positions),
    ];
    for (name, size) in sizes {
        if !(1..=MAX_DIMENSION).contains(&(size as u64)) {
            return Err(format!("{name} is {size}, a whole number from 1 to {MAX_DIMENSION} is needed"));
        }
    }
    if c.layers as u64 > MAX_LAYERS {
        return Err(format!("num_hidden_layers is {}, at most {MAX_LAYERS} are possible", c.layers));
    }
    if !c.heads.is_multiple_of(c.kv_heads) {
        return Err(format!("num_attention_heads ({}) is not a multiple of num_key_value_heads ({})", c.heads, c.kv_heads));
    }
    if c.rope.is_some() && !c.head_dim.is_multiple_of(2) {
        return Err(format!("head_dim ({}) is odd; rotary positions need pairs", c.head_dim));
    }
    if c.layer_windows.len() != c.layers {
        return Err(format!("{} layers have {} attention windows", c.layers, c.layer_windows.len()));
    }
    if c.layer_windows.iter().flatten().chain(&c.sliding_window).any(|&w| w == 0) {
        return Err("sliding_window is 0, at least 1 is needed".into());
    }
    for (name, value) in [("the norm's epsilon", c.norm_eps), ("initializer_range", c.initializer_range)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(format!("{name} is {value}, a number from 0 is needed"));
        }
    }
    if let Some(rope) = &c.rope {
        scaling(rope.theta, &rope.scaling)?;
    }
    // Published configurations name special tokens that the embedding does not have; that matters only to generation. A
    // padding index outside the embedding is an error in torch too.
    if let Some(pad) = c.padding_idx.filter(|&pad| pad as usize >= c.vocab_size) {
        return Err(format!("pad_token_id ({pad}) is not below vocab_size ({})", c.vocab_size));
    }
    let mul = |a: usize, b: usize| a as u128 * b as u128;
    let width = 2 * mul(c.heads, c.head_dim) + 2 * mul(c.kv_heads, c.head_dim);
    let layer = width * c.hidden_size as u128 + 3 * mul(c.hidden_size, c.intermediate_size);
    let embeddings = 2 * mul(c.vocab_size, c.hidden_size) + mul(c.max_positions, c.hidden_size);
    // Widths are at most 2^64 here and layers at most 2^16, so nothing wraps.
    if width > u128::from(u32::MAX) || layer * c.layers as u128 + embeddings > MAX_PARAMETERS {
        return Err("the model would have more than 70 trillion parameters; its sizes cannot be right".into());
    }
    Ok(())
}

fn scaling(theta: f64, scaling: &RopeScaling) -> Result<(), String> {
    let positive = |name: &str, x: f64| {
        if x.is_finite() && x > 0.0 { Ok(()) } else { Err(format!("{name} is {x}, a positive number is needed")) }
    };
    if !(theta > 1.0 && theta <= 1e30) {
        return Err(format!("rope_theta is {theta}, a number above 1 and up to 1e30 is needed"));
    }
    match *scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => positive("factor", factor),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            positive("factor", factor)?;
            positive("low_freq_factor", low_freq_factor)?;
            positive("high_freq_factor", high_freq_factor)?;
            positive("original_max_position_embeddings", original_max_positions as f64)?;
            if high_freq_factor <= low_freq_factor {
                return Err(format!("high_freq_factor is {high_freq_factor}, more than low_freq_factor ({low_freq_factor}) is needed"));
            }
            Ok(())
        }
        RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor, .. } => {
            positive("factor", factor)?;
            positive("original_max_position_embeddings", original_max_positions as f64)?;
            positive("beta_fast", beta_fast)?;
            positive("beta_slow", beta_slow)?;
            positive("attention_factor", attention_factor)
        }
    }
}

pub(crate) fn stack(c: &StackConfig) -> Result<(), String> {
    if c.widths.len() < 2 || c.widths.len() as u64 > MAX_LAYERS {
        return Err(format!("a stack needs from 2 to {MAX_LAYERS} widths, it has {}", c.widths.len()));
    }
    if let Some(width) = c.widths.iter().find(|&&w| !(1..=MAX_DIMENSION).contains(&(w as u64))) {
        return Err(format!("a width of the stack is {width}, a whole number from 1 to {MAX_DIMENSION} is needed"));
    }
    let total: u128 = c.widths.windows(2).map(|w| (w[0] as u128 + 1) * w[1] as u128).sum();
    if total > MAX_PARAMETERS {
        return Err("the stack would have more than 70 trillion parameters; its widths cannot be right".into());
    }
    Ok(())
}
