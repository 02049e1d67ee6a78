//! Rotary settings, in the older spelling (`rope_theta` and `rope_scaling` side by side) and the newer one (everything in
//! `rope_parameters`).

use super::fields::{Fields, short};
use crate::arch::{Rope, RopeScaling};
use crate::error::ModelError;
use serde_json::{Map, Value};
use std::f64;

const DEFAULT_THETA: f64 = 10_000.0;

/// Read the rotary settings of a configuration. `rope_scaling` goes before `rope_parameters` where both are given, and
/// values inside go before those at the top level, as in `transformers`.
pub(super) fn parse(f: &mut Fields<'_>, max_positions: usize) -> Result<Rope, ModelError> {
    let empty = Map::new();
    let key = if non_empty(f, "rope_scaling") { "rope_scaling" } else { "rope_parameters" };
    let map = match f.get(key) {
        None => &empty,
        Some(Value::Object(map)) => map,
        Some(other) => return Err(f.error(key, format_args!("is {}, an object is needed", short(other)))),
    };
    if map.values().any(Value::is_object) {
        return Err(f.unsupported(format_args!("{key}: settings for each kind of layer are not supported")));
    }
    let inner = f.nested(key, map);

    let theta = match inner.opt_number("rope_theta")? {
        Some(theta) => theta,
        None => f.number("rope_theta", DEFAULT_THETA)?,
    };
    let partial = match inner.opt_number("partial_rotary_factor")? {
        Some(share) => share,
        None => f.number("partial_rotary_factor", 1.0)?,
    };
    if partial != 1.0 {
        return Err(f.unsupported(format_args!("partial_rotary_factor = {partial} is not supported: all of a head is rotated")));
    }

    let kind = match inner.text("rope_type")? {
        Some(kind) => kind,
        None => inner.text("type")?.unwrap_or("default"),
    };
    let original = match f.opt_size("original_max_position_embeddings")?.flatten() {
        Some(n) => n,
        None => inner.size("original_max_position_embeddings", max_positions)?,
    };
    let (scaling, known): (RopeScaling, &[&str]) = match kind {
        "default" => (RopeScaling::None, &[]),
        "linear" => (RopeScaling::Linear { factor: positive(&inner, "factor")? }, &["factor"]),
        "llama3" => (llama3(&inner, original)?, &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]),
        "yarn" => (yarn(&inner, original, max_positions)?, YARN_KEYS),
        "dynamic" | "longrope" => {
            return Err(f.unsupported(format_args!(
                "{key}: rope_type \"{kind}\" is not supported, its frequencies change with the length of the sequence; \
                 default, linear, llama3 and yarn are supported"
            )));
        }
        other => {
            return Err(f.unsupported(format_args!("{key}: rope_type \"{other}\" is not supported; default, linear, llama3 and yarn are")));
        }
    };
    let unknown: Vec<&str> = inner.keys().filter(|k| !COMMON_KEYS.contains(k) && !known.contains(k)).collect();
    if !unknown.is_empty() {
        f.warn(format_args!("{key}: {} ignored, rope_type \"{kind}\" does not use it", unknown.join(", ")));
    }
    Ok(Rope { theta, scaling })
}

const COMMON_KEYS: &[&str] = &["rope_type", "type", "rope_theta", "partial_rotary_factor"];
const YARN_KEYS: &[&str] =
    &["factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"];

fn non_empty(f: &Fields<'_>, key: &str) -> bool {
    f.get(key).is_some_and(|v| v.as_object().is_none_or(|map| !map.is_empty()))
}

fn llama3(f: &Fields<'_>, original_max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = positive(f, "factor")?;
    let low_freq_factor = positive(f, "low_freq_factor")?;
    let high_freq_factor = positive(f, "high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(
            f.error("high_freq_factor", format_args!("is {high_freq_factor}, more than low_freq_factor ({low_freq_factor}) is needed"))
        );
    }
    Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions })
}

fn yarn(f: &Fields<'_>, original_max_positions: usize, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = match f.get("factor") {
        Some(_) => positive(f, "factor")?,
        None if f.raw("factor").is_some() => max_positions as f64 / original_max_positions as f64,
        None => return Err(f.error("factor", "is missing")),
    };
    // Zero means the default, as an `or` in Python has it.
    let or_default = |key: &str, default: f64| -> Result<f64, ModelError> {
        let value = f.number(key, default)?;
        if value < 0.0 {
            return Err(f.error(key, format_args!("is {value}, a positive number is needed")));
        }
        Ok(if value == 0.0 { default } else { value })
    };
    let beta_fast = or_default("beta_fast", 32.0)?;
    let beta_slow = or_default("beta_slow", 1.0)?;
    let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
    let attention_factor = match (f.opt_number("attention_factor")?, f.number("mscale", 0.0)?, f.number("mscale_all_dim", 0.0)?) {
        (Some(given), _, _) => given,
        (None, m, all) if m != 0.0 && all != 0.0 => mscale(factor, m) / mscale(factor, all),
        _ => mscale(factor, 1.0),
    };
    if !(attention_factor.is_finite() && attention_factor > 0.0) {
        return Err(f.error("attention_factor", format_args!("is {attention_factor}, a positive number is needed")));
    }
    let truncate = f.flag("truncate", true)?;
    Ok(RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor, truncate })
}

fn positive(f: &Fields<'_>, key: &str) -> Result<f64, ModelError> {
    match f.opt_number(key)? {
        None => Err(f.error(key, "is missing")),
        Some(x) if x > 0.0 => Ok(x),
        Some(x) => Err(f.error(key, format_args!("is {x}, a positive number is needed"))),
    }
}
