//! Seeded initial weights.
//!
//! Every number is a pure function of (seed, tensor name, element index): a counter-based generator is keyed by a hash of
//! the first two and counts elements, so that any part of any tensor can be filled by any thread of any rank, in any order,
//! with the same result. Only additions, multiplications, divisions and square roots of IEEE numbers are used, so the
//! result is the same on every machine, too.

mod generator;

use crate::arch::{Architecture, Family};
use crate::blocks::EMBED;
use crate::error::ModelError;
use crate::source::WeightSource;
use generator::{Distribution, Generator};
use std::collections::HashMap;
use std::path::PathBuf;

/// Initial weights of a model that is trained from scratch.
#[derive(Debug)]
pub struct SeededInit {
    tensors: HashMap<String, Tensor>,
}

#[derive(Debug)]
struct Tensor {
    elements: u64,
    rule: Rule,
    /// Elements that are zero, whatever the rule: the embedding's padding row.
    zeros: std::ops::Range<u64>,
    generator: Generator,
}

/// Distribution of one tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Rule {
    Constant(f32),
    /// Mean 0 and this standard deviation.
    Normal(f32),
    /// From minus this to this.
    Uniform(f32),
}

impl SeededInit {
    /// The initial weights that `seed` gives.
    ///
    /// Transformers start as in `transformers`: matrices and embeddings normal with standard deviation
    /// `initializer_range`, the embedding's padding row zero, norms one, biases zero; GPT-2's projections into the residual
    /// stream are scaled down by the square root of twice the layers. Stacks start as `torch.nn.Linear` does: weights and
    /// biases uniform within one over the square root of the inputs.
    pub fn new(architecture: &Architecture, seed: u64) -> SeededInit {
        let mut tensors = HashMap::new();
        for block in architecture.blocks() {
            // A stack's bias takes its range from the weight beside it.
            let inputs = block.tensors.first().and_then(|t| t.shape.get(1)).copied().unwrap_or(1);
            for spec in &block.tensors {
                let tensor = Tensor {
                    elements: spec.shape.iter().product(),
                    rule: rule(architecture, &spec.name, spec.shape.len(), inputs),
                    zeros: if block.name == EMBED { padding(architecture, &spec.name) } else { 0..0 },
                    generator: Generator::new(seed, &spec.name),
                };
                tensors.insert(spec.name.clone(), tensor);
            }
        }
        SeededInit { tensors }
    }
}

fn rule(architecture: &Architecture, name: &str, dimensions: usize, inputs: u64) -> Rule {
    match architecture {
        Architecture::Stack(_) => Rule::Uniform((1.0 / (inputs as f64).sqrt()) as f32),
        Architecture::Transformer(_) if name.ends_with(".bias") => Rule::Constant(0.0),
        Architecture::Transformer(_) if dimensions < 2 => Rule::Constant(1.0),
        Architecture::Transformer(c) => {
            let residual = c.family == Family::Gpt2 && name.ends_with(".c_proj.weight");
            let scale = if residual { (2.0 * c.layers as f64).sqrt() } else { 1.0 };
            Rule::Normal((c.initializer_range / scale) as f32)
        }
    }
}

fn padding(architecture: &Architecture, name: &str) -> std::ops::Range<u64> {
    match architecture {
        Architecture::Transformer(c) if name.ends_with("embed_tokens.weight") => match c.padding_idx {
            Some(row) => u64::from(row) * c.hidden_size as u64..(u64::from(row) + 1) * c.hidden_size as u64,
            None => 0..0,
        },
        _ => 0..0,
    }
}

impl WeightSource for SeededInit {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        let Some(t) = self.tensors.get(tensor) else {
            return Err(ModelError::MissingTensor { path: PathBuf::from("seeded weights"), tensor: tensor.to_owned() });
        };
        let end = start.checked_add(out.len() as u64).filter(|&end| end <= t.elements);
        let Some(end) = end else {
            return Err(ModelError::Invalid(format!("read of {} elements at {start} of tensor `{tensor}` leaves it", out.len())));
        };
        match t.rule {
            Rule::Constant(x) => out.fill(x),
            Rule::Normal(deviation) => t.generator.fill(start, out, Distribution::Normal, deviation),
            Rule::Uniform(bound) => t.generator.fill(start, out, Distribution::Uniform, bound),
        }
        let zeros = t.zeros.start.clamp(start, end)..t.zeros.end.clamp(start, end);
        out[(zeros.start - start) as usize..(zeros.end - start) as usize].fill(0.0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::StackConfig;
    use crate::testing::{architecture, bits, read_all, tiny_llama};
    use proptest::prelude::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        (mean, (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt())
    }

    fn whole(model: &Architecture, seed: u64, tensor: &str) -> Vec<f32> {
        let blocks = model.blocks();
        let (_, shape) = crate::hf::inventory(&blocks).find(|(name, _)| *name == tensor).unwrap();
        let mut out = vec![0.0; shape.iter().product::<u64>() as usize];
        SeededInit::new(model, seed).read(tensor, 0, &mut out).unwrap();
        out
    }

    proptest! {
        #[test]
        fn any_part_is_the_same_part(seed: u64, start in 0u64..290, len in 0usize..290) {
            let model = tiny_llama();
            let all = whole(&model, seed, "lm_head.weight");
            let end = (start as usize + len).min(all.len());
            let mut part = vec![0.0; end.saturating_sub(start as usize)];
            SeededInit::new(&model, seed).read("lm_head.weight", start, &mut part).unwrap();
            prop_assert_eq!(bits(&part), bits(&all[start as usize..end.max(start as usize)]));
        }
    }

    #[test]
    fn matrices_are_normal_norms_one_and_biases_zero() {
        let model = architecture(
            r#"{"model_type": "gpt2", "vocab_size": 500, "n_positions": 64, "n_embd": 128, "n_layer": 8, "n_head": 4, "initializer_range": 0.1}"#,
        );
        for (tensor, deviation) in [
            ("transformer.wte.weight", 0.1),
            ("transformer.wpe.weight", 0.1),
            ("transformer.h.3.attn.c_attn.weight", 0.1),
            ("transformer.h.3.attn.c_proj.weight", 0.025),
            ("transformer.h.7.mlp.c_proj.weight", 0.025),
        ] {
            let values = whole(&model, 5, tensor);
            let (mean, found) = moments(&values);
            let error = deviation / (values.len() as f64).sqrt();
            assert!(mean.abs() < 5.0 * error, "{tensor}: mean {mean}");
            assert!((found - deviation).abs() < 5.0 * error, "{tensor}: deviation {found}");
            // Kurtosis of a normal distribution is 3.
            let fourth = values.iter().map(|&x| (f64::from(x) / found).powi(4)).sum::<f64>() / values.len() as f64;
            assert!((fourth - 3.0).abs() < 0.35, "{tensor}: kurtosis {fourth}");
        }
        assert!(whole(&model, 5, "transformer.h.0.ln_1.weight").iter().all(|&x| x == 1.0));
        assert!(whole(&model, 5, "transformer.h.0.ln_1.bias").iter().all(|&x| x == 0.0));
        assert!(whole(&model, 5, "transformer.h.0.mlp.c_fc.bias").iter().all(|&x| x == 0.0));
    }

    #[test]
    fn a_stack_starts_as_torch_nn_linear() {
        let stack = StackConfig { widths: vec![100, 300, 7], activation: Default::default(), loss: Default::default() };
        let model = Architecture::Stack(stack);
        for (tensor, inputs) in [("0.weight", 100.0), ("0.bias", 100.0), ("2.weight", 300.0), ("2.bias", 300.0f64)] {
            let (values, bound) = (whole(&model, 1, tensor), 1.0 / inputs.sqrt());
            assert!(values.iter().all(|&x| f64::from(x).abs() <= bound), "{tensor}");
            let (mean, deviation) = moments(&values);
            let error = bound / (values.len() as f64).sqrt();
            assert!(mean.abs() < 4.0 * error && (deviation - bound / 3f64.sqrt()).abs() < 4.0 * error, "{tensor}: {mean} {deviation}");
        }
    }

    #[test]
    fn seeds_and_names_give_different_numbers() {
        let model = tiny_llama();
        let one = read_all(&model, &SeededInit::new(&model, 1));
        assert_eq!(one, read_all(&model, &SeededInit::new(&model, 1)));
        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a == b).count();
        let two = read_all(&model, &SeededInit::new(&model, 2));
        assert_eq!(same(&one[0], &two[0]), 0);
        assert_eq!(same(&whole(&model, 1, "model.layers.0.mlp.up_proj.weight"), &whole(&model, 1, "model.layers.1.mlp.up_proj.weight")), 0);
    }

    #[test]
    fn the_numbers_never_change() {
        // A run that resumes on another version of this program must find the weights that it began with.
        let values = whole(&tiny_llama(), 42, "lm_head.weight");
        assert_eq!(crc32c::crc32c(&values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()), 2_963_610_557);
        assert_eq!(values[..3], [0.028798781, 0.028349591, -0.0179786]);
    }

    #[test]
    fn the_padding_row_is_zero_however_it_is_read() {
        let model = architecture(
            r#"{"model_type": "llama", "vocab_size": 5, "hidden_size": 4, "num_attention_heads": 2, "pad_token_id": 2, "num_hidden_layers": 1}"#,
        );
        let source = SeededInit::new(&model, 0);
        let all = whole(&model, 0, "model.embed_tokens.weight");
        assert!(all.iter().enumerate().all(|(i, &x)| (x == 0.0) == (8..12).contains(&i)));
        for start in 0..20 {
            for end in start..=20 {
                let mut part = vec![9.0; end - start];
                source.read("model.embed_tokens.weight", start as u64, &mut part).unwrap();
                assert_eq!(part, all[start..end]);
            }
        }
        assert!(source.read("model.embed_tokens.weight", 1, &mut [0.0; 20]).is_err());
        assert!(source.read("lm_head.bias", 0, &mut []).is_err());
    }
}
