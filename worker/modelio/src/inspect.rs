//! Describing tensors without holding them: one pass, sums in f64.

use crate::arch::Architecture;
use crate::error::ModelError;
use crate::source::WeightSource;
use crate::stream::PIECE_ELEMENTS;
use ramtorch_store::Layout;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// One tensor, described. Mean, deviation and range are over its finite elements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorSummary {
    /// Name.
    pub name: String,
    /// Dimensions.
    pub shape: Vec<u64>,
    /// Number format in which it is kept.
    pub dtype: String,
    /// Block of the model that it belongs to.
    pub block: String,
    /// Elements.
    pub parameters: u64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation, with n - 1 in the denominator as `torch.std` has it; 0 for a single element.
    pub std: f64,
    /// Least element.
    pub min: f64,
    /// Greatest element.
    pub max: f64,
    /// Elements that are infinite or not a number.
    pub nonfinite: u64,
    /// The first elements.
    pub values: Vec<f32>,
    /// Pages of the store that hold it; none outside a store.
    pub pages: Vec<u32>,
}

/// Describe the tensors whose names match one of the globs (all of them without any), in the model's order.
///
/// `values` elements of each are shown. `layout` adds the pages of a live store.
///
/// # Errors
/// A glob is not valid or matches nothing; a tensor cannot be read.
pub fn inspect(
    architecture: &Architecture,
    source: &dyn WeightSource,
    names: &[String],
    values: usize,
    layout: Option<&Layout>,
) -> Result<Vec<TensorSummary>, ModelError> {
    let patterns = names.iter().map(|text| {
        let pattern = glob::Pattern::new(text).map_err(|e| ModelError::Request(format!("\"{text}\" is not a valid pattern: {e}")))?;
        Ok((text, pattern))
    });
    let patterns = patterns.collect::<Result<Vec<_>, ModelError>>()?;
    let blocks = architecture.blocks();
    for (text, pattern) in &patterns {
        if !blocks.iter().flat_map(|b| &b.tensors).any(|t| pattern.matches(&t.name)) {
            return Err(ModelError::Request(format!("no tensor of this model ({}) matches \"{text}\"", architecture.describe())));
        }
    }
    let mut summaries = Vec::new();
    for block in &blocks {
        for tensor in &block.tensors {
            if !patterns.is_empty() && !patterns.iter().any(|(_, p)| p.matches(&tensor.name)) {
                continue;
            }
            let parameters = tensor.shape.iter().product();
            let moments = measure(source, &tensor.name, parameters)?;
            let mut first = vec![0.0; (values as u64).min(parameters) as usize];
            source.read(&tensor.name, 0, &mut first)?;
            let place = layout.and_then(|l| Some((l, l.tensor(&tensor.name)?)));
            summaries.push(TensorSummary {
                name: tensor.name.clone(),
                shape: tensor.shape.clone(),
                dtype: source.dtype(&tensor.name).to_owned(),
                block: block.name.clone(),
                parameters,
                mean: moments.mean,
                std: moments.deviation(),
                min: moments.min,
                max: moments.max,
                nonfinite: parameters - moments.count,
                values: first,
                pages: place.map(|(l, t)| l.pages_of(t.start..t.start + t.len).collect()).unwrap_or_default(),
            });
        }
    }
    Ok(summaries)
}

/// Count, mean, squared deviations and range of finite elements; two of them can be merged (Chan et al., 1979).
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
    min: f64,
    max: f64,
}

impl Moments {
    fn of(values: &[f32]) -> Moments {
        let finite = || values.iter().map(|&x| f64::from(x)).filter(|x| x.is_finite());
        let count = finite().count() as u64;
        if count == 0 {
            return Moments::default();
        }
        let mean = finite().sum::<f64>() / count as f64;
        let squares = finite().map(|x| (x - mean) * (x - mean)).sum();
        let min = finite().fold(f64::INFINITY, f64::min);
        let max = finite().fold(f64::NEG_INFINITY, f64::max);
        Moments { count, mean, squares, min, max }
    }

    fn merge(self, other: Moments) -> Moments {
        if self.count == 0 || other.count == 0 {
            return if self.count == 0 { other } else { self };
        }
        let (n, m) = (self.count as f64, other.count as f64);
        let apart = other.mean - self.mean;
        Moments {
            count: self.count + other.count,
            mean: self.mean + apart * m / (n + m),
            squares: self.squares + other.squares + apart * apart * n * m / (n + m),
            min: self.min.min(other.min),
            max: self.max.max(other.max),
        }
    }

    fn deviation(&self) -> f64 {
        if self.count < 2 { 0.0 } else { (self.squares / (self.count - 1) as f64).sqrt() }
    }
}

fn measure(source: &dyn WeightSource, tensor: &str, elements: u64) -> Result<Moments, ModelError> {
    let pieces = elements.div_ceil(PIECE_ELEMENTS as u64);
    let piece = |buffer: &mut Vec<f32>, n: u64| {
        let start = n * PIECE_ELEMENTS as u64;
        buffer.resize((elements - start).min(PIECE_ELEMENTS as u64) as usize, 0.0);
        source.read(tensor, start, buffer)?;
        Ok(Moments::of(buffer))
    };
    // Merged in order, so that the result does not depend on the threads.
    let parts: Vec<Moments> = (0..pieces).into_par_iter().map_init(Vec::new, piece).collect::<Result<_, ModelError>>()?;
    Ok(parts.into_iter().fold(Moments::default(), Moments::merge))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn merging_parts_gives_the_whole(values in proptest::collection::vec(-1e3f32..1e3, 2..200), cut in 0usize..200) {
            let cut = cut.min(values.len());
            let whole = Moments::of(&values);
            let merged = Moments::of(&values[..cut]).merge(Moments::of(&values[cut..]));
            prop_assert_eq!((whole.count, whole.min, whole.max), (merged.count, merged.min, merged.max));
            prop_assert!((whole.mean - merged.mean).abs() < 1e-9);
            prop_assert!((whole.deviation() - merged.deviation()).abs() < 1e-9);
        }
    }

    #[test]
    fn what_is_not_finite_is_counted_and_left_out() {
        let m = Moments::of(&[1.0, f32::NAN, 3.0, f32::INFINITY]);
        assert_eq!((m.count, m.mean, m.min, m.max), (2, 2.0, 1.0, 3.0));
        assert_eq!(m.deviation(), std::f64::consts::SQRT_2);
    }
}
