//! Micro-batches: from the data set into device memory.

use crate::api::EngineError;
use crate::model::{MicroBatch, Model, Shape};
use ramtorch_data::{OpenDataset, TargetLayout, TargetRow};
use ramtorch_device::{DevBuf, Device, Stream, TokenIndex};

/// Device buffers of one micro-batch.
pub(crate) struct InputBuffers {
    ids: DevBuf,
    order: DevBuf,
    bounds: DevBuf,
    starts: Option<DevBuf>,
    /// The matrix in the compute format, and as it came.
    matrix: Option<(DevBuf, DevBuf)>,
    targets: DevBuf,
    weights: DevBuf,
}

impl InputBuffers {
    /// Allocates exactly what [`crate::plan::inputs_bytes`] counts.
    pub fn new(dev: &mut dyn Device, model: &Model, shape: Shape) -> Result<Self, EngineError> {
        let rows = shape.rows() as u64;
        let none = DevBuf { ptr: 0, bytes: 0 };
        let width = model.input_width() as u64;
        let (mut ids, mut order, mut bounds, mut starts, mut matrix) = (none, none, none, None, None);
        if width > 0 {
            matrix = Some((dev.alloc(rows * width * model.dtype.size(), "inputs")?, dev.alloc(rows * width * 4, "inputs")?));
        } else {
            ids = dev.alloc(rows * 4, "token ids")?;
            order = dev.alloc(rows * 4, "token order")?;
            bounds = dev.alloc((rows + 1) * 4, "token bounds")?;
            starts = Some(dev.alloc(rows * 4, "document starts")?);
        }
        let targets = dev.alloc(rows * model.target_width().max(1) as u64 * 4, "targets")?;
        Ok(InputBuffers { ids, order, bounds, starts, matrix, targets, weights: dev.alloc(rows * 4, "loss weights")? })
    }
}

/// Host copy of a micro-batch.
#[derive(Default)]
pub(crate) struct HostBatch {
    ids: Vec<u32>,
    targets: Vec<u32>,
    values: Vec<f32>,
    target_values: Vec<f32>,
    weights: Vec<f32>,
    starts: Vec<i32>,
    sequences: usize,
}

/// Training or validation data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Train,
    Validation,
}

/// Reads sequences (or rows) for a model.
pub(crate) struct Reader<'a> {
    pub data: &'a OpenDataset,
    pub seq: usize,
    pub document_mask: bool,
    /// Token whose embedding gets no gradient.
    pub padding: Option<u32>,
}

fn bytes<T: Copy>(x: &[T], put: impl Fn(T) -> [u8; 4]) -> Vec<u8> {
    x.iter().flat_map(|v| put(*v)).collect()
}

impl Reader<'_> {
    /// Sequences (rows) of a part.
    pub fn len(&self, part: Part) -> u64 {
        let (tokens, rows) = match part {
            Part::Train => (self.data.train().map(|s| s.len()), self.data.train_tensors().map(|t| t.rows())),
            Part::Validation => (self.data.validation().map(|s| s.len()), self.data.validation_tensors().map(|t| t.rows())),
        };
        tokens.or(rows).unwrap_or(0)
    }

    /// Sum of the loss weights of the sequences with these indices.
    pub fn weight(&self, part: Part, indices: &[u64]) -> Result<f64, EngineError> {
        if self.seq == 1 && self.data.train_tensors().is_some() {
            return Ok(indices.len() as f64);
        }
        let mut host = HostBatch::default();
        let mut total = 0f64;
        for i in indices {
            self.read(part, std::slice::from_ref(i), &mut host)?;
            total += host.weights.iter().map(|w| *w as f64).sum::<f64>();
        }
        Ok(total)
    }

    /// Reads the sequences with these indices.
    pub fn read(&self, part: Part, indices: &[u64], host: &mut HostBatch) -> Result<(), EngineError> {
        host.sequences = indices.len();
        let rows = indices.len() * self.seq;
        host.weights.resize(rows, 0.0);
        let tensors = match part {
            Part::Train => self.data.train_tensors(),
            Part::Validation => self.data.validation_tensors(),
        };
        if let Some(t) = tensors {
            let width = t.input_width();
            host.values.resize(rows * width, 0.0);
            host.weights.fill(1.0);
            match t.target() {
                TargetLayout::Values { width: n } => {
                    host.targets.clear();
                    host.target_values.resize(rows * n, 0.0);
                    for (j, i) in indices.iter().enumerate() {
                        t.row(*i, &mut host.values[j * width..][..width], TargetRow::Values(&mut host.target_values[j * n..][..n]));
                    }
                }
                TargetLayout::Classes => {
                    host.target_values.clear();
                    host.targets.resize(rows, 0);
                    for (j, i) in indices.iter().enumerate() {
                        t.row(*i, &mut host.values[j * width..][..width], TargetRow::Class(&mut host.targets[j]));
                    }
                }
            }
            return Ok(());
        }
        let split = match part {
            Part::Train => self.data.train(),
            Part::Validation => self.data.validation(),
        }
        .ok_or_else(|| EngineError::internal("the data set has no such part"))?;
        host.ids.resize(rows, 0);
        host.targets.resize(rows, 0);
        host.starts.resize(if self.document_mask { rows } else { 0 }, 0);
        for (j, i) in indices.iter().enumerate() {
            let at = j * self.seq..(j + 1) * self.seq;
            let starts = if self.document_mask { Some(&mut host.starts[at.clone()]) } else { None };
            split
                .sequence(*i, &mut host.ids[at.clone()], &mut host.targets[at.clone()], &mut host.weights[at], starts)
                .map_err(EngineError::input)?;
        }
        Ok(())
    }

    /// Sends `host` to the device; `losses` is where its losses go.
    pub fn upload(&self, dev: &dyn Device, b: &InputBuffers, host: &HostBatch, losses: DevBuf) -> Result<MicroBatch, EngineError> {
        let rows = host.sequences * self.seq;
        let mut tokens = TokenIndex { rows, ids: b.ids, order: b.order, bounds: b.bounds, unique: 0 };
        let mut starts = None;
        let mut input = DevBuf { ptr: 0, bytes: 0 };
        if let Some((matrix, raw)) = b.matrix {
            dev.upload(Stream::Compute, raw, &bytes(&host.values, f32::to_le_bytes))?;
            dev.from_f32(raw, host.values.len(), matrix)?;
            input = matrix;
        } else {
            let (order, bounds) = inverse(&host.ids, self.padding);
            tokens.unique = bounds.len() - 1;
            dev.upload(Stream::Compute, b.ids, &bytes(&host.ids, u32::to_le_bytes))?;
            dev.upload(Stream::Compute, b.order, &bytes(&order, u32::to_le_bytes))?;
            dev.upload(Stream::Compute, b.bounds, &bytes(&bounds, u32::to_le_bytes))?;
            if self.document_mask {
                if let Some(s) = b.starts {
                    dev.upload(Stream::Compute, s, &bytes(&host.starts, i32::to_le_bytes))?;
                    starts = Some(s);
                }
            }
        }
        let targets = if host.target_values.is_empty() {
            bytes(&host.targets, u32::to_le_bytes)
        } else {
            bytes(&host.target_values, f32::to_le_bytes)
        };
        dev.upload(Stream::Compute, b.targets, &targets)?;
        dev.upload(Stream::Compute, b.weights, &bytes(&host.weights, f32::to_le_bytes))?;
        Ok(MicroBatch { sequences: host.sequences, seq: self.seq, tokens, input, targets: b.targets, weights: b.weights, losses, starts })
    }
}

/// Rows ordered by (id, row), and the bounds of each distinct id; rows with the padding id are left out.
fn inverse(ids: &[u32], padding: Option<u32>) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).filter(|r| Some(ids[*r as usize]) != padding).collect();
    order.sort_by_key(|r| (ids[*r as usize], *r));
    let mut bounds = Vec::new();
    for (i, r) in order.iter().enumerate() {
        if i == 0 || ids[order[i - 1] as usize] != ids[*r as usize] {
            bounds.push(i as u32);
        }
    }
    bounds.push(order.len() as u32);
    (order, bounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverse_orders_rows_by_id_and_leaves_padding_out() {
        let (order, bounds) = inverse(&[7, 2, 7, 0, 2, 9], Some(0));
        assert_eq!(order, [1, 4, 0, 2, 5]);
        assert_eq!(bounds, [0, 2, 4, 5]);
        assert_eq!(inverse(&[3], Some(3)), (vec![], vec![0]));
    }
}
