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
use generator::{Generator, normal4, uniform4};
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
            Rule::Normal(deviation) => t.generator.fill(start, out, |bits| normal4(bits).map(|x| x * deviation)),
            Rule::Uniform(bound) => t.generator.fill(start, out, |bits| uniform4(bits).map(|x| x * bound)),
        }
        let zeros = t.zeros.start.clamp(start, end)..t.zeros.end.clamp(start, end);
        out[(zeros.start - start) as usize..(zeros.end - start) as usize].fill(0.0);
        Ok(())
    }
}
