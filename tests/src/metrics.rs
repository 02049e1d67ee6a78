//! The metrics file: one JSON object a line.

use serde::Deserialize;
use std::path::Path;

/// One committed step. Keys that are not named here are kept in `rest`.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct MetricsLine {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    pub lr: f64,
    pub tokens: u64,
    pub tokens_per_second: f64,
    pub validation_loss: Option<f64>,
    pub initial_validation_loss: Option<f64>,
    pub tokens_total: u64,
    pub epoch: f64,
    #[serde(flatten)]
    pub rest: serde_json::Map<String, serde_json::Value>,
}

/// What must be the same from run to run, as bits: everything that does not measure time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepBits {
    step: u64,
    loss: u64,
    grad_norm: u64,
    lr: u64,
    tokens: u64,
    validation_loss: Option<u64>,
    initial_validation_loss: Option<u64>,
    tokens_total: u64,
    epoch: u64,
}

impl MetricsLine {
    fn bits(&self) -> StepBits {
        StepBits {
            step: self.step,
            loss: self.loss.to_bits(),
            grad_norm: self.grad_norm.to_bits(),
            lr: self.lr.to_bits(),
            tokens: self.tokens,
            validation_loss: self.validation_loss.map(f64::to_bits),
            initial_validation_loss: self.initial_validation_loss.map(f64::to_bits),
            tokens_total: self.tokens_total,
            epoch: self.epoch.to_bits(),
        }
    }
}

/// The bits of every step, for comparing runs.
pub fn bits(lines: &[MetricsLine]) -> Vec<StepBits> {
    lines.iter().map(MetricsLine::bits).collect()
}

/// The losses of every step.
pub fn losses(lines: &[MetricsLine]) -> Vec<f64> {
    lines.iter().map(|l| l.loss).collect()
}

/// Reads a metrics file.
///
/// # Panics
/// It cannot be read, or a line (a last one without an end included) is not what it should be.
#[track_caller]
pub fn read_metrics(path: &Path) -> Vec<MetricsLine> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(text.is_empty() || text.ends_with('\n'), "{}: the last line has no end: {text:?}", path.display());
    let parse = |(i, line): (usize, &str)| serde_json::from_str(line).unwrap_or_else(|e| panic!("line {}: {e}: {line}", i + 1));
    text.lines().enumerate().map(parse).collect()
}

/// |a - b| / |b|.
pub fn relative_difference(a: f64, b: f64) -> f64 {
    if a == b { 0.0 } else { (a - b).abs() / b.abs() }
}

/// The largest relative difference of two series, and its index.
///
/// # Panics
/// Their lengths differ, or a value is not finite.
#[track_caller]
pub fn worst_relative_difference(ours: &[f64], reference: &[f64]) -> (usize, f64) {
    assert_eq!(ours.len(), reference.len(), "different numbers of steps");
    assert!(ours.iter().chain(reference).all(|x| x.is_finite()), "not finite: {ours:?}");
    let differences = ours.iter().zip(reference).map(|(a, b)| relative_difference(*a, *b));
    differences.enumerate().fold((0, 0.0), |worst, d| if d.1 > worst.1 { d } else { worst })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_difference_is_found() {
        assert_eq!(worst_relative_difference(&[1.0, 2.5, 3.0], &[1.0, 2.0, 3.1]), (1, 0.25));
        assert_eq!(worst_relative_difference(&[], &[]), (0, 0.0));
    }

    #[test]
    fn a_torn_line_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "{\"step\":1,\"loss\":2.0").unwrap();
        assert!(std::panic::catch_unwind(|| read_metrics(file.path())).is_err());
    }
}
