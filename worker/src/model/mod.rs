//! Models: a row of blocks, each with an explicit forward and backward pass over the operations of a device.
//!
//! A block takes `[rows, width]` activations and its weights (one contiguous buffer, as they lie in the store). What the
//! backward pass needs is in a [`Saved`] buffer: kept from the forward pass, or made again in scratch. The last block
//! computes the loss, and in training its own backward pass, in one visit.
//!
//! | architecture | blocks |
//! |---|---|
//! | transformer | embedding, decoder layers, final norm + head + cross-entropy |
//! | plain stack | one Linear (+ activation) each; the last one with the loss |

mod carve;
mod decoder;
mod embed;
mod head;
mod stack;
#[cfg(test)]
mod tests;

pub(crate) use carve::Carver;
pub(crate) use decoder::{Cache, DecoderLayer};
pub(crate) use head::Head;
pub(crate) use stack::StackLayer;

use crate::api::EngineError;
use embed::Embedding;
use ramtorch_device::{AttentionShape, DevBuf, Device, Dtype, TokenIndex};
use ramtorch_modelio::Architecture;
use ramtorch_store::Layout;

/// A tensor's place in its block, in parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Span {
    pub offset: u64,
    pub len: u64,
}

/// A block's weights on the device, in the compute format.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Weights {
    pub buf: DevBuf,
    pub dtype: Dtype,
}

impl Weights {
    pub fn at(&self, s: Span) -> DevBuf {
        self.buf.slice(s.offset * self.dtype.size(), s.len * self.dtype.size())
    }
}

/// A block's gradients on the device, f32, added to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grads {
    pub buf: DevBuf,
}

impl Grads {
    pub fn at(&self, s: Span) -> DevBuf {
        self.buf.slice(s.offset * 4, s.len * 4)
    }
}

/// One micro-batch on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MicroBatch {
    /// Sequences (rows, for a stack).
    pub sequences: usize,
    /// Tokens a sequence; 1 for a stack.
    pub seq: usize,
    /// Token ids and their inverse (transformers).
    pub tokens: TokenIndex,
    /// `[rows, width]` in the compute format (stacks).
    pub input: DevBuf,
    /// `[rows]` i32 classes, or `[rows, n]` f32.
    pub targets: DevBuf,
    /// `[rows]` f32 weights of the rows in the loss.
    pub weights: DevBuf,
    /// `[rows]` f32, written by the last block.
    pub losses: DevBuf,
    /// `[rows]` i32 first visible token (document masks).
    pub starts: Option<DevBuf>,
}

impl MicroBatch {
    pub fn rows(&self) -> usize {
        self.sequences * self.seq
    }
}

/// Sizes that every buffer follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Sequences of the largest micro-batch.
    pub sequences: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Rows of a chunk in which the head works.
    pub head_rows: usize,
}

impl Shape {
    pub fn rows(&self) -> usize {
        self.sequences * self.seq
    }
}

/// Constant tables on the device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tables {
    /// `[positions, head_dim/2, 2]` f32 cosines and sines; empty without rotary positions.
    pub rope: Option<DevBuf>,
}

/// What a visit of a block works with.
pub(crate) struct Visit<'a> {
    pub dev: &'a dyn Device,
    pub shape: Shape,
    pub tables: Tables,
    pub mb: &'a MicroBatch,
    /// [`Model::scratch_bytes`] of device memory.
    pub scratch: DevBuf,
}

pub(crate) enum Block {
    Embed(Embedding),
    Layer(Box<DecoderLayer>),
    Head(Head),
    Stack(StackLayer),
}

/// What of a block's activations is kept from its forward visit to its backward visit, besides its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Keep {
    /// Nothing: the whole forward visit is done again.
    Inputs,
    /// The results of matrix products and attention; norms and activations are made again.
    Products,
    /// Everything.
    All,
}

/// A model's blocks, in the order of the forward pass.
pub(crate) struct Model {
    pub architecture: Architecture,
    pub blocks: Vec<Block>,
    /// First parameter and length of each block in the store.
    pub places: Vec<(u64, u64)>,
    pub dtype: Dtype,
}

impl Model {
    pub fn new(architecture: &Architecture, layout: &Layout, dtype: Dtype) -> Result<Model, EngineError> {
        let find = |name: &str| -> Result<Span, EngineError> {
            let t = layout.tensor(name).ok_or_else(|| EngineError::internal(format!("the store has no tensor {name}")))?;
            Ok(Span { offset: t.start - layout.blocks()[t.block].start, len: t.len })
        };
        let blocks = match architecture {
            Architecture::Transformer(c) => {
                let mut blocks = vec![Block::Embed(Embedding::new(c, &find)?)];
                for n in 0..c.layers {
                    blocks.push(Block::Layer(Box::new(DecoderLayer::new(c, n, &find)?)));
                }
                blocks.push(Block::Head(Head::new(c, &find)?));
                blocks
            }
            Architecture::Stack(c) => {
                (0..c.widths.len() - 1).map(|n| Ok(Block::Stack(StackLayer::new(c, n, &find)?))).collect::<Result<_, EngineError>>()?
            }
        };
        let places = layout.blocks().iter().map(|b| (b.start, b.len)).collect::<Vec<_>>();
        if places.len() != blocks.len() {
            return Err(EngineError::internal("the store's blocks are not the model's"));
        }
        Ok(Model { architecture: architecture.clone(), blocks, places, dtype })
    }

    /// Blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks whose weights the forward visit (and the loss) of block `b` needs.
    pub fn forward_needs(&self, b: usize) -> Vec<usize> {
        match &self.blocks[b] {
            Block::Head(h) if h.tied() => vec![b, 0],
            _ => vec![b],
        }
    }

    /// Whether the backward visit of block `b` needs its weights.
    pub fn backward_needs(&self, b: usize) -> bool {
        !matches!(self.blocks[b], Block::Embed(_))
    }

    /// Whether block 0 collects gradients from the last block as well.
    pub fn tied(&self) -> bool {
        matches!(self.blocks.last(), Some(Block::Head(h)) if h.tied())
    }

    /// Elements a row of what block `b` puts out (the input width, for the last one, which puts out a loss).
    pub fn width(&self, b: usize) -> usize {
        match &self.blocks[b] {
            Block::Embed(e) => e.hidden,
            Block::Layer(l) => l.hidden,
            Block::Head(h) => h.hidden,
            Block::Stack(s) => {
                if s.loss.is_some() {
                    s.input
                } else {
                    s.output
                }
            }
        }
    }

    /// Elements a row of a micro-batch's input matrix (stacks), 0 for token ids.
    pub fn input_width(&self) -> usize {
        match &self.blocks[0] {
            Block::Stack(s) => s.input,
            _ => 0,
        }
    }

    /// f32 targets a row (0: one class index).
    pub fn target_width(&self) -> usize {
        match self.blocks.last() {
            Some(Block::Stack(s)) if s.loss == Some(ramtorch_job::StackLoss::Mse) => s.output,
            _ => 0,
        }
    }

    /// Divides the sum of squared errors of a row (mean over elements); 1 for classes.
    pub fn loss_divisor(&self) -> f64 {
        self.target_width().max(1) as f64
    }

    /// Bytes of what block `b` saves for its backward pass, for one micro-batch. [`Keep::Inputs`] saves as much as
    /// [`Keep::All`], but not for longer than a visit.
    pub fn saved_bytes(&self, b: usize, shape: Shape, keep: Keep) -> u64 {
        let mut c = Carver::measure();
        match &self.blocks[b] {
            Block::Layer(l) => {
                l.saved(shape, self.dtype, keep, &mut c);
            }
            Block::Stack(s) => {
                s.saved(shape, self.dtype, &mut c);
            }
            _ => {}
        }
        c.used()
    }

    /// Bytes of scratch that any visit needs.
    /// `workspace` tells what the device's attention wants.
    pub fn scratch_bytes(&self, shape: Shape, workspace: &dyn Fn(&AttentionShape) -> Result<u64, EngineError>) -> Result<u64, EngineError> {
        let mut most = 0;
        for b in &self.blocks {
            let mut c = Carver::measure();
            match b {
                Block::Embed(_) => {}
                Block::Layer(l) => {
                    l.scratch(shape, self.dtype, &mut c);
                    c.bytes(workspace(&l.attention_shape(shape))?);
                }
                Block::Head(h) => {
                    h.scratch(shape, self.dtype, &mut c);
                }
                Block::Stack(s) => {
                    s.scratch(shape, self.dtype, &mut c);
                }
            }
            most = most.max(c.used());
        }
        Ok(most)
    }

    /// Runs block `b` (not the last) forward: `x` to `y`, keeping what the backward pass needs in `saved`.
    pub fn forward(&self, b: usize, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf, keep: Keep, y: DevBuf) -> Result<(), EngineError> {
        match &self.blocks[b] {
            Block::Embed(e) => e.forward(v, w, y),
            Block::Layer(l) => l.forward(v, w, x, saved, keep, y),
            Block::Stack(s) => s.forward(v, w, x, saved, y),
            Block::Head(_) => Err(EngineError::internal("the head has no plain forward pass")),
        }
    }

    /// Makes again what the forward pass of block `b` would have saved with [`Keep::All`].
    pub fn recompute(&self, b: usize, v: &Visit, w: Weights, x: DevBuf, saved: DevBuf) -> Result<(), EngineError> {
        match &self.blocks[b] {
            Block::Layer(l) => l.recompute(v, w, x, saved),
            Block::Stack(s) => s.recompute(v, w, x, saved),
            _ => Ok(()),
        }
    }

    /// Runs block `b` (not the last) backward: `d` holds the gradient of its output and receives that of its input.
    pub fn backward(
        &self,
        b: usize,
        v: &Visit,
        w: Option<Weights>,
        x: DevBuf,
        saved: DevBuf,
        keep: Keep,
        d: DevBuf,
        grads: Grads,
    ) -> Result<(), EngineError> {
        let need = || w.ok_or_else(|| EngineError::internal("a backward visit without weights"));
        match &self.blocks[b] {
            Block::Embed(e) => e.backward(v, d, grads),
            Block::Layer(l) => l.backward(v, need()?, x, saved, keep, d, grads),
            Block::Stack(s) => s.backward(v, need()?, x, saved, d, grads, b > 0),
            Block::Head(_) => Err(EngineError::internal("the head has no plain backward pass")),
        }
    }

    /// Runs the last block: writes the losses of the micro-batch and, with `train`, the gradient of its input into
    /// `train.d` and the parameters' gradients. `w[0]` are its own weights, `w[1]` those of a tied embedding.
    pub fn loss(&self, v: &Visit, w: &[Weights], x: DevBuf, train: Option<&LossGrads>) -> Result<(), EngineError> {
        match self.blocks.last() {
            Some(Block::Head(h)) => h.loss(v, w, x, train),
            Some(Block::Stack(s)) => s.loss(v, w[0], x, train, self.len() > 1),
            _ => Err(EngineError::internal("a model without a last block")),
        }
    }
}

/// Where the last block's backward pass goes.
pub(crate) struct LossGrads {
    /// Factor of the summed loss whose gradient is taken.
    pub scale: f32,
    /// Receives the gradient of the block's input.
    pub d: DevBuf,
    /// Gradients of its parameters.
    pub grads: Grads,
    /// Gradients of a tied embedding's block.
    pub tied: Option<Grads>,
}
