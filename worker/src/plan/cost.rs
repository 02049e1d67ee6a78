//! What a step costs, from rates measured on the node.

use super::EnginePlan;
use crate::api::{DeviceKind, Rates};
use crate::model::{Block, Model};

/// Rates with stand-ins where nothing was measured.
pub(crate) struct Cost {
    flops: f64,
    copy: f64,
    optimizer: f64,
    /// Copies run beside arithmetic.
    overlapped: bool,
    pub measured: bool,
}

impl Cost {
    pub fn new(rates: Rates, kind: DeviceKind) -> Cost {
        let cpu = kind == DeviceKind::Cpu;
        let or = |x: f64, default: f64| if x > 0.0 { x } else { default };
        let (flops, copy, optimizer) = match kind {
            DeviceKind::Cpu => (5e10, 4e9, 2e8),
            // Orders of magnitude of a data-centre GPU; the node's own rates replace them.
            DeviceKind::Cuda => (5e14, 4e10, 3e9),
        };
        Cost {
            // What was measured is the processor; of a GPU's step only the optimizer runs there.
            flops: if cpu { or(rates.gemm_flops, flops) } else { flops },
            copy: if cpu { or(rates.copy_bytes, copy) } else { copy },
            optimizer: or(rates.optimizer_parameters, optimizer),
            overlapped: kind == DeviceKind::Cuda,
            measured: cpu && rates.gemm_flops > 0.0,
        }
    }

    /// Operations of a forward visit of block `b`, a row.
    fn forward_flops(model: &Model, b: usize, seq: usize) -> f64 {
        let matrix = model.places[b].1 as f64;
        match &model.blocks[b] {
            Block::Embed(_) => 0.0,
            Block::Layer(_) => {
                let q = model.architecture.transformer().map_or(0, |c| c.query_size());
                2.0 * matrix + 2.0 * seq as f64 * q as f64 // causal: half of 4·seq·q
            }
            Block::Head(h) => 2.0 * (h.hidden * h.vocab) as f64,
            Block::Stack(_) => 2.0 * matrix,
        }
    }

    fn rows(p: &EnginePlan) -> f64 {
        (p.micro_batches * p.micro_batch * p.seq) as f64
    }

    /// Seconds a step that keeping block `b`'s activations saves.
    pub fn recompute(&self, model: &Model, p: &EnginePlan, b: usize) -> f64 {
        Self::forward_flops(model, b, p.seq) * Self::rows(p) / self.flops
    }

    /// Seconds a step of loading block `b` again, where it does not stay.
    pub fn reload(&self, model: &Model, p: &EnginePlan, b: usize) -> f64 {
        let loads = 2.0 * p.groups as f64 - 1.0;
        loads * (model.places[b].1 * p.dtype.size()) as f64 / self.copy
    }

    pub fn compute(&self, model: &Model, p: &EnginePlan) -> f64 {
        let last = model.len() - 1;
        let flops: f64 = (0..model.len())
            .map(|b| {
                let f = Self::forward_flops(model, b, p.seq);
                if b == last || p.keep[b] { 3.0 * f } else { 4.0 * f }
            })
            .sum();
        flops * Self::rows(p) / self.flops
    }

    pub fn copies(&self, model: &Model, p: &EnginePlan) -> f64 {
        let weights: f64 = (0..model.len())
            .map(|b| {
                let once = (model.places[b].1 * p.dtype.size()) as f64 / self.copy;
                once + if p.resident[b] { 0.0 } else { self.reload(model, p, b) }
            })
            .sum();
        let out = if p.resident_gradients { 1.0 } else { p.groups as f64 };
        let gradients = model.places.iter().map(|x| x.1 as f64 * p.dtype.size() as f64).sum::<f64>() * out / self.copy;
        if self.overlapped { weights.max(gradients) } else { weights + gradients }
    }

    pub fn optimizer(&self, model: &Model) -> f64 {
        model.places.iter().map(|x| x.1 as f64).sum::<f64>() / self.optimizer
    }

    /// Seconds a step.
    pub fn step(&self, model: &Model, p: &EnginePlan) -> f64 {
        let (c, m) = (self.compute(model, p), self.copies(model, p));
        self.optimizer(model) + if self.overlapped { c.max(m) } else { c + m }
    }

    pub fn bound_by(&self, model: &Model, p: &EnginePlan) -> &'static str {
        let (c, m, o) = (self.compute(model, p), self.copies(model, p), self.optimizer(model));
        if c >= m && c >= o {
            "matrix products"
        } else if m >= o {
            "copies between host and device"
        } else {
            "the optimizer"
        }
    }
}
