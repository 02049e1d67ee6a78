//! A Linear layer of a plain stack, with its activation, or (the last one) with the loss.

use super::decoder::Linear;
use super::{Carver, Grads, LossGrads, Shape, Span, Visit, Weights};
use crate::api::EngineError;
use ramtorch_device::*;
use ramtorch_job::{Activation, StackLoss};
use ramtorch_modelio::StackConfig;

pub(crate) struct StackLayer {
    pub input: usize,
    pub output: usize,
    /// Only the last layer has one, and no activation.
    pub loss: Option<StackLoss>,
    act: ActivationKind,
    linear: Linear,
}

impl StackLayer {
    pub fn new(c: &StackConfig, n: usize, find: &dyn Fn(&str) -> Result<Span, EngineError>) -> Result<Self, EngineError> {
        let (input, output) = (c.widths[n], c.widths[n + 1]);
        let act = match c.activation {
            Activation::Relu => ActivationKind::Relu,
            Activation::Gelu => ActivationKind::Gelu,
            Activation::Silu => ActivationKind::Silu,
            Activation::Tanh => ActivationKind::Tanh,
        };
        // torch.nn.Sequential counts the activations too.
        let (weight, bias) = (find(&format!("{}.weight", 2 * n))?, find(&format!("{}.bias", 2 * n))?);
        let linear = Linear { weight, bias: Some(bias), input, output, in_first: false };
        Ok(StackLayer { input, output, loss: (n + 2 == c.widths.len()).then_some(c.loss), act, linear })
    }

    /// The values before the activation.
    pub fn saved(&self, s: Shape, dt: Dtype, c: &mut Carver) -> DevBuf {
        c.elems(if self.loss.is_some() { 0 } else { s.rows() * self.output }, dt)
    }

    pub fn scratch(&self, s: Shape, dt: Dtype, c: &mut Carver) -> DevBuf {
        c.elems(s.rows() * self.output, dt)
    }

    pub fn forward(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf, y: DevBuf) -> Result<(), EngineError> {
        self.recompute(v, w, x, saved)?;
        v.dev.activation_forward(self.act, saved, v.mb.rows() * self.output, y)
    }

    pub fn recompute(&self, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf) -> Result<(), EngineError> {
        self.linear.forward(v.dev, w, v.mb.rows(), x, None, saved)
    }

    pub fn backward(
        &self,
        v: &Visit,
        w: Weights,
        x: DevBuf,
        saved: DevBuf,
        d: DevBuf,
        g: Grads,
        wants_input: bool,
    ) -> Result<(), EngineError> {
        let rows = v.mb.rows();
        let dz = self.scratch(v.shape, w.dtype, &mut Carver::of(v.scratch));
        v.dev.activation_backward(self.act, d, saved, rows * self.output, dz)?;
        self.linear.parameter_gradient(v.dev, rows, dz, x, g)?;
        if wants_input { self.linear.input_gradient(v.dev, w, rows, dz, d) } else { Ok(()) }
    }

    pub fn loss(&self, v: &Visit, w: Weights, x: DevBuf, train: Option<&LossGrads>, wants_input: bool) -> Result<(), EngineError> {
        let rows = v.mb.rows();
        let z = self.scratch(v.shape, w.dtype, &mut Carver::of(v.scratch));
        self.linear.forward(v.dev, w, rows, x, None, z)?;
        let out = LossOut { losses: v.mb.losses, gradient_scale: train.map(|t| t.scale) };
        match self.loss {
            Some(StackLoss::CrossEntropy) => v.dev.cross_entropy(z, rows, self.output, v.mb.targets, v.mb.weights, &out)?,
            Some(StackLoss::Mse) => v.dev.squared_error(z, rows, self.output, v.mb.targets, v.mb.weights, &out)?,
            None => return Err(EngineError::internal("a layer without a loss")),
        }
        let Some(train) = train else { return Ok(()) };
        self.linear.parameter_gradient(v.dev, rows, z, x, train.grads)?;
        if wants_input { self.linear.input_gradient(v.dev, w, rows, z, train.d) } else { Ok(()) }
    }
}
