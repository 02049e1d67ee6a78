//! What a store holds, as its creator describes it. Everything else (sizes, places, pages) follows from this: see
//! [`Layout`](crate::Layout).

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Number of a page in the page table.
pub type PageId = u32;

/// Format of the two Adam moments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentFormat {
    /// None: weights only, for inference.
    None,
    /// 4 bytes a parameter each.
    F32,
    /// 2 bytes a parameter each.
    Bf16,
}

impl MomentFormat {
    /// Bytes of one moment of one parameter.
    pub fn bytes(self) -> u64 {
        match self {
            MomentFormat::None => 0,
            MomentFormat::F32 => 4,
            MomentFormat::Bf16 => 2,
        }
    }
}

/// Format in which reduced gradients wait in the segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GradientFormat {
    /// None: no room is set aside.
    None,
    /// 4 bytes a parameter.
    F32,
    /// 2 bytes a parameter.
    Bf16,
}

impl GradientFormat {
    /// Bytes of the gradient of one parameter.
    pub fn bytes(self) -> u64 {
        match self {
            GradientFormat::None => 0,
            GradientFormat::F32 => 4,
            GradientFormat::Bf16 => 2,
        }
    }
}

/// Steps whose gradients are kept, for some pages: with them, pages whose state is in a device's memory need not be written back at
/// every step. A page that is some steps behind is brought to the committed one by the updates of those steps, made again from the
/// log.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GradientLog {
    /// Steps whose gradients are kept, 1 to [`GradientLog::STEPS_MAX`]; 1: those of the last step alone, as of all other pages.
    pub steps: u32,
    /// Pages that have a log: ranges that ascend and do not touch. None where `steps` is 1.
    pub pages: Vec<Range<PageId>>,
}

impl GradientLog {
    /// Most steps that can be kept.
    pub const STEPS_MAX: u32 = 8;
    /// No page has one.
    pub const NONE: GradientLog = GradientLog { steps: 1, pages: Vec::new() };

    /// A log of these pages, which ascend; none where there are no pages, or where only the last step's are kept.
    pub fn of(steps: u32, pages: impl IntoIterator<Item = PageId>) -> GradientLog {
        let mut ranges: Vec<Range<PageId>> = Vec::new();
        for page in pages {
            match ranges.last_mut() {
                Some(last) if last.end == page => last.end = page + 1,
                _ => ranges.push(page..page + 1),
            }
        }
        if steps > 1 && !ranges.is_empty() { GradientLog { steps, pages: ranges } } else { GradientLog::NONE }
    }

    pub(crate) fn is_none(&self) -> bool {
        *self == GradientLog::NONE
    }
}

impl Default for GradientLog {
    fn default() -> Self {
        GradientLog::NONE
    }
}

/// One tensor, row-major.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorSpec {
    /// Unique within the store.
    pub name: String,
    /// Dimensions, each at least 1; none for a scalar.
    pub shape: Vec<u64>,
    /// Starts right after the previous tensor of its block, without padding, so that the two are one matrix.
    pub joined: bool,
    /// Weight decay applies to it.
    pub decay: bool,
}

/// Tensors that are streamed together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockSpec {
    /// Unique within the store.
    pub name: String,
    /// In the order in which they lie.
    pub tensors: Vec<TensorSpec>,
}

/// All that decides what a segment looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSpec {
    /// In the order in which they lie and are streamed.
    pub blocks: Vec<BlockSpec>,
    /// Ranks that share the pages among them.
    pub world_size: u32,
    /// Format of the moments.
    pub moments: MomentFormat,
    /// Format of the gradients.
    pub gradients: GradientFormat,
    /// Parameters a page: a multiple of 1024. Without it the page is as large as leaves every rank 16 pages, at least
    /// 4 Ki and at most 16 Mi parameters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub page_parameters: Option<u32>,
    /// Pages a rank has beyond those that hold state: as many updates may be under way at once. 1 as a rule, 3 where a
    /// device updates pages beside the CPU.
    pub spare_pages_per_rank: u32,
    /// Bytes of the exchange area, rounded up to 4096.
    pub exchange_bytes: u64,
    /// Gradients of earlier steps that are kept.
    #[serde(default, skip_serializing_if = "GradientLog::is_none")]
    pub log: GradientLog,
    /// The caller's own; a JSON text by convention. Kept as it is.
    pub metadata: String,
}
