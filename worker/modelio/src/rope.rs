//! Rotary frequencies, computed in the fp32 arithmetic that `transformers` uses: each step below rounds where the tensor
//! expression there does.

use crate::arch::{RopeScaling, TransformerConfig};
use std::f64::consts::PI;

impl TransformerConfig {
    /// Inverse frequencies, `head_dim / 2` of them, and the factor by which cosines and sines are multiplied.
    ///
    /// The angle of position `p` in dimension pair `i` is `p as f32 * inv_freq[i]`, in fp32. Without rotary positions the
    /// list is empty and the factor 1.
    pub fn rope_inv_freq(&self) -> (Vec<f32>, f32) {
        let Some(rope) = &self.rope else { return (Vec::new(), 1.0) };
        let dim = self.head_dim;
        let base = rope.theta as f32;
        let pairs = || (0..dim / 2).map(move |i| (2 * i) as f32 / dim as f32);
        let pos_freqs = || pairs().map(move |e| pow(base, e));
        let plain = || pos_freqs().map(|f| 1.0 / f);
        match rope.scaling {
            RopeScaling::None => (plain().collect(), 1.0),
            RopeScaling::Linear { factor } => (plain().map(|f| f / factor as f32).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let llama3 = Llama3::new(factor, low_freq_factor, high_freq_factor, original_max_positions);
                (plain().map(|f| llama3.scale(f)).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original_max_positions, beta_fast, beta_slow, attention_factor, truncate } => {
                let ramp = YarnRamp::new(dim, rope.theta, original_max_positions as f64, beta_fast, beta_slow, truncate);
                let freqs = pos_freqs().enumerate().map(|(i, pos)| {
                    let extrapolation = 1.0 / pos;
                    let interpolation = 1.0 / (factor as f32 * pos);
                    let keep = 1.0 - ramp.at(i);
                    interpolation * (1.0 - keep) + extrapolation * keep
                });
                (freqs.collect(), attention_factor as f32)
            }
        }
    }
}

/// Constants of the `llama3` scaling. Quotients of two settings are taken in f64, as Python does, and rounded where they
/// meet a tensor.
struct Llama3 {
    factor: f32,
    low: f32,
    smooth_width: f32,
    low_wavelength: f32,
    high_wavelength: f32,
    original: f32,
}

impl Llama3 {
    fn new(factor: f64, low: f64, high: f64, original: usize) -> Self {
        let original = original as f64;
        Llama3 {
            factor: factor as f32,
            low: low as f32,
            smooth_width: (high - low) as f32,
            low_wavelength: (original / low) as f32,
            high_wavelength: (original / high) as f32,
            original: original as f32,
        }
    }

    fn scale(&self, f: f32) -> f32 {
        // A number divided by a tensor is the tensor's reciprocal times the number there: two roundings.
        let wavelength = (1.0 / f) * (2.0 * PI) as f32;
        let scaled = if wavelength > self.low_wavelength { f / self.factor } else { f };
        if wavelength < self.high_wavelength || wavelength > self.low_wavelength {
            return scaled;
        }
        let smooth = ((1.0 / wavelength) * self.original - self.low) / self.smooth_width;
        (1.0 - smooth) * scaled / self.factor + smooth * scaled
    }
}

/// The passage from kept to stretched dimensions of the `yarn` scaling.
struct YarnRamp {
    low: f64,
    width: f64,
}

impl YarnRamp {
    fn new(dim: usize, base: f64, original: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> Self {
        let dim = dim as f64;
        let correction = |rotations: f64| (dim * (original / (rotations * 2.0 * PI)).ln()) / (2.0 * base.ln());
        let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        YarnRamp { low, width: high - low }
    }

    /// Share of stretching for dimension pair `i`.
    fn at(&self, i: usize) -> f32 {
        ((i as f32 - self.low as f32) / self.width as f32).clamp(0.0, 1.0)
    }
}

/// `base` to the power `exponent`, rounded once.
fn pow(base: f32, exponent: f32) -> f32 {
    f64::from(base).powf(f64::from(exponent)) as f32
}
