//! Token (and, for GPT-2, position) embeddings.

use super::{Grads, Span, Visit, Weights};
use crate::api::EngineError;
use ramtorch_device::DevBuf;
use ramtorch_modelio::{Family, TransformerConfig};

pub(crate) struct Embedding {
    pub hidden: usize,
    table: Span,
    positions: Option<Span>,
}

impl Embedding {
    pub fn new(c: &TransformerConfig, find: &dyn Fn(&str) -> Result<Span, EngineError>) -> Result<Self, EngineError> {
        let gpt2 = c.family == Family::Gpt2;
        let table = find(if gpt2 { "transformer.wte.weight" } else { "model.embed_tokens.weight" })?;
        let positions = if gpt2 { Some(find("transformer.wpe.weight")?) } else { None };
        Ok(Embedding { hidden: c.hidden_size, table, positions })
    }

    /// The table, for a tied head.
    pub fn table_of(c: &TransformerConfig, find: &dyn Fn(&str) -> Result<Span, EngineError>) -> Result<Span, EngineError> {
        Ok(Self::new(c, find)?.table)
    }

    pub fn forward(&self, v: &Visit, w: Weights, y: DevBuf) -> Result<(), EngineError> {
        v.dev.embedding_forward(&v.mb.tokens, w.at(self.table), self.hidden, self.positions.map(|p| w.at(p)), v.mb.seq, None, y)
    }

    /// As [`Embedding::forward`], at explicit positions (`[rows]` i32).
    pub fn at_positions(&self, v: &Visit, w: Weights, positions: DevBuf, y: DevBuf) -> Result<(), EngineError> {
        v.dev.embedding_forward(&v.mb.tokens, w.at(self.table), self.hidden, self.positions.map(|p| w.at(p)), v.mb.seq, Some(positions), y)
    }

    pub fn backward(&self, v: &Visit, d: DevBuf, g: Grads) -> Result<(), EngineError> {
        v.dev.embedding_backward(&v.mb.tokens, d, self.hidden, g.at(self.table), self.positions.map(|p| g.at(p)), v.mb.seq)
    }
}
