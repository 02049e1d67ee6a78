//! Rotary frequencies, computed in the fp32 arithmetic that `transformers` uses: each step below rounds where the tensor
//! expression there does.

use crate::arch::{RopeScaling, TransformerConfig};
use crate::powf::powf;
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
        let pos_freqs = || pairs().map(move |e| powf(base, e));
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

#[cfg(test)]
mod tests {
    use crate::testing::architecture;

    fn frequencies(settings: &str) -> (Vec<u32>, u32) {
        let config = format!(
            r#"{{"model_type": "llama", "hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 131072, {settings}}}"#
        );
        let (frequencies, factor) = architecture(&config).transformer().unwrap().rope_inv_freq();
        (frequencies.iter().map(|x| x.to_bits()).collect(), factor.to_bits())
    }

    // The bits that LlamaRotaryEmbedding of transformers 5.23 holds on PyTorch 2.15.
    #[test]
    fn frequencies_are_those_of_transformers_bit_for_bit() {
        let one = 1f32.to_bits();
        let plain = [
            0x3f80_0000,
            0x3ef3_16a2,
            0x3e66_d3fa,
            0x3ddb_2f9f,
            0x3d50_2194,
            0x3cc5_a246,
            0x3c3b_aa82,
            0x3bb2_3372,
            0x3b29_3696,
            0x3aa0_adc6,
            0x3a18_9328,
            0x3990_e12c,
            0x3909_928c,
            0x3882_a245,
            0x37f8_1728,
            0x376b_93eb,
        ];
        assert_eq!(frequencies(r#""rope_theta": 150000.0"#), (plain.to_vec(), one));
        assert_eq!(frequencies(r#""rope_parameters": {"rope_type": "default", "rope_theta": 150000}"#), (plain.to_vec(), one));
        let linear = [
            0x3eaa_aaab,
            0x3e3f_f223,
            0x3dd7_e0cf,
            0x3d72_cb5f,
            0x3d08_8889,
            0x3c99_8e81,
            0x3c2c_b3d9,
            0x3bc2_3c4c,
            0x3b5a_740d,
            0x3af5_b0d0,
            0x3a8a_297b,
            0x3a1b_6370,
            0x39ae_c33f,
            0x3944_8d73,
            0x38dd_0f2b,
            0x3878_9f19,
        ];
        assert_eq!(frequencies(r#""rope_scaling": {"type": "linear", "factor": 3.0}"#), (linear.to_vec(), one));
        let llama3 = [
            0x3f80_0000,
            0x3ee1_77bc,
            0x3e46_93b0,
            0x3dae_e4ad,
            0x3d1a_08c8,
            0x3c87_a9c3,
            0x3bee_f74f,
            0x3b52_7720,
            0x3a09_95d2,
            0x38a3_418d,
            0x380f_c8f8,
            0x377d_45c3,
            0x36df_10c4,
            0x3644_7610,
            0x35ad_07a7,
            0x3518_64a7,
        ];
        let settings = r#""rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#;
        assert_eq!(frequencies(settings), (llama3.to_vec(), one));
        let yarn = [
            0x3f80_0000,
            0x3ed7_e89b,
            0x3e36_1887,
            0x3d99_940d,
            0x3d01_86e3,
            0x3c5a_7bf2,
            0x3b9c_a0b8,
            0x3ad9_9312,
            0x3a10_2de0,
            0x3930_df50,
            0x383a_7753,
            0x379d_43a4,
            0x3704_a2b2,
            0x365f_ba4f,
            0x35bc_b0c1,
            0x351f_23e4,
        ];
        let settings = r#""rope_parameters": {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
            "original_max_position_embeddings": 32768}"#;
        assert_eq!(frequencies(settings), (yarn.to_vec(), 0x3f91_be9c));
    }
}
