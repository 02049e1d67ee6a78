//! cuDNN's flash attention, through the graph API of its backend alone.

mod graph;
mod sdpa;

pub(crate) use graph::{Handle, Plan, Target};
pub(crate) use sdpa::{Problem, backward, forward, io};
