//! A timeline of what a rank does: what is recorded, how, and what is made of it.
//!
//! ```text
//!   engine, devices ── begin, stamp ──► Recorder ── finish ──► RankTrace ──(one a rank)──► chrome (a file), summary (a table)
//! ```
//! Every time is CLOCK_MONOTONIC in nanoseconds, which all processes of a node share, so the ranks' traces fit together.

#![forbid(unsafe_code)]

mod chrome;
mod recorder;
mod summary;

pub use chrome::write_chrome;
pub use recorder::{Recorder, Scope, SpanId, now_ns};
pub use summary::{RankSummary, RowSummary, Summary, WaitSummary, summarize};

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Steps that one trace may cover.
pub const STEPS_MAX: u64 = 20;
/// Spans that one rank keeps; what comes later is counted and left out.
pub const SPANS_MAX: usize = 200_000;

/// A line of the timeline: something that does one thing at a time (or several that lie wholly within one another).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Row {
    /// The device's arithmetic.
    Compute,
    /// Weights on their way to the device.
    CopyIn,
    /// Gradients on their way to the segment.
    CopyOut,
    /// Weights gathered from other ranks' devices, gradients summed over them.
    Peers,
    /// Pages' state on its way to the device.
    OptimizerIn,
    /// Pages updated by the device.
    OptimizerKernel,
    /// Pages' new state on its way to the segment.
    OptimizerOut,
    /// Pages updated by the CPU.
    OptimizerCpu,
    /// The thread that commits steps.
    Optimizer,
    /// The thread that runs steps.
    Loop,
}

impl Row {
    /// All of them, from the top down.
    pub const ALL: [Row; 10] = [
        Row::Loop,
        Row::Compute,
        Row::CopyIn,
        Row::CopyOut,
        Row::Peers,
        Row::Optimizer,
        Row::OptimizerCpu,
        Row::OptimizerIn,
        Row::OptimizerKernel,
        Row::OptimizerOut,
    ];

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Row::Loop => "step loop",
            Row::Compute => "compute",
            Row::CopyIn => "copy in",
            Row::CopyOut => "copy out",
            Row::Peers => "peers",
            Row::Optimizer => "optimizer",
            Row::OptimizerCpu => "optimizer CPU",
            Row::OptimizerIn => "optimizer in",
            Row::OptimizerKernel => "optimizer kernel",
            Row::OptimizerOut => "optimizer out",
        }
    }

    /// Place from the top; also its number in files and messages.
    pub fn number(self) -> u32 {
        Row::ALL.iter().position(|r| *r == self).map_or(0, |i| i as u32)
    }

    /// The row of a number.
    pub fn from_number(n: u32) -> Option<Row> {
        Row::ALL.get(n as usize).copied()
    }
}

/// What arithmetic stands still for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wait {
    /// Weights that are still on their way.
    Weights,
    /// Pages that the optimizer has not published.
    Pages,
    /// A gradient buffer whose last contents are not out yet.
    Gradients,
}

impl Wait {
    /// All of them.
    pub const ALL: [Wait; 3] = [Wait::Weights, Wait::Pages, Wait::Gradients];

    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Wait::Weights => "wait for weights",
            Wait::Pages => "wait for pages",
            Wait::Gradients => "wait for a gradient buffer",
        }
    }
}

/// What a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Work.
    Work,
    /// Bytes on their way.
    Copy,
    /// Something with other ranks.
    Collective,
    /// Arithmetic stands still. Measured in every step, traced or not.
    Wait(Wait),
    /// A host thread is blocked.
    Blocked,
    /// A whole step.
    Step,
}

impl Kind {
    /// Number in messages.
    pub fn number(self) -> u32 {
        match self {
            Kind::Work => 0,
            Kind::Copy => 1,
            Kind::Collective => 2,
            Kind::Wait(Wait::Weights) => 3,
            Kind::Wait(Wait::Pages) => 4,
            Kind::Wait(Wait::Gradients) => 5,
            Kind::Blocked => 6,
            Kind::Step => 7,
        }
    }

    /// The kind of a number.
    pub fn from_number(n: u32) -> Option<Kind> {
        Some(match n {
            0 => Kind::Work,
            1 => Kind::Copy,
            2 => Kind::Collective,
            3 => Kind::Wait(Wait::Weights),
            4 => Kind::Wait(Wait::Pages),
            5 => Kind::Wait(Wait::Gradients),
            6 => Kind::Blocked,
            7 => Kind::Step,
            _ => return None,
        })
    }

    /// Category in files.
    pub const fn category(self) -> &'static str {
        match self {
            Kind::Work => "work",
            Kind::Copy => "copy",
            Kind::Collective => "collective",
            Kind::Wait(_) => "wait",
            Kind::Blocked => "blocked",
            Kind::Step => "step",
        }
    }

    /// Whether its row does something meanwhile.
    pub const fn is_busy(self) -> bool {
        matches!(self, Kind::Work | Kind::Copy | Kind::Collective)
    }
}

/// What a span says of itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Label {
    /// What is done.
    pub name: &'static str,
    /// What that is.
    pub kind: Kind,
    /// Step it belongs to; without one, that of the sweep under way.
    pub step: Option<u64>,
    /// Block of the model.
    pub block: Option<u32>,
    /// Micro-batch of the group.
    pub micro_batch: Option<u32>,
    /// Page of the store.
    pub page: Option<u32>,
    /// Bytes that are moved.
    pub bytes: u64,
}

impl Label {
    /// A label without arguments.
    pub const fn new(name: &'static str, kind: Kind) -> Label {
        Label { name, kind, step: None, block: None, micro_batch: None, page: None, bytes: 0 }
    }
    /// Work.
    pub const fn work(name: &'static str) -> Label {
        Label::new(name, Kind::Work)
    }
    /// A copy of `bytes`.
    pub const fn copy(name: &'static str, bytes: u64) -> Label {
        let mut l = Label::new(name, Kind::Copy);
        l.bytes = bytes;
        l
    }
    /// Something with other ranks.
    pub const fn collective(name: &'static str) -> Label {
        Label::new(name, Kind::Collective)
    }
    /// Arithmetic stands still.
    pub const fn wait(wait: Wait) -> Label {
        Label::new(wait.name(), Kind::Wait(wait))
    }
    /// A host thread is blocked.
    pub const fn blocked(name: &'static str) -> Label {
        Label::new(name, Kind::Blocked)
    }
    /// With a step.
    pub const fn step(mut self, step: u64) -> Label {
        self.step = Some(step);
        self
    }
    /// With a block.
    pub const fn block(mut self, block: usize) -> Label {
        self.block = Some(block as u32);
        self
    }
    /// With a micro-batch.
    pub const fn micro_batch(mut self, m: usize) -> Label {
        self.micro_batch = Some(m as u32);
        self
    }
    /// With a page.
    pub const fn page(mut self, page: u32) -> Label {
        self.page = Some(page);
        self
    }
    /// With bytes.
    pub const fn bytes(mut self, bytes: u64) -> Label {
        self.bytes = bytes;
        self
    }
}

/// Something that took time.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// Its line.
    pub row: Row,
    /// What was done.
    pub name: Cow<'static, str>,
    /// What that is.
    pub kind: Kind,
    /// Step it belongs to.
    pub step: u64,
    /// Block of the model.
    pub block: Option<u32>,
    /// Micro-batch of the group.
    pub micro_batch: Option<u32>,
    /// Page of the store.
    pub page: Option<u32>,
    /// Bytes moved.
    pub bytes: u64,
    /// CLOCK_MONOTONIC.
    pub begin_ns: u64,
    /// Not before `begin_ns`.
    pub end_ns: u64,
}

/// What one rank recorded.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RankTrace {
    /// Who.
    pub rank: u32,
    /// On what, `cuda:0`.
    pub device: String,
    /// First step recorded.
    pub first_step: u64,
    /// Steps recorded whole.
    pub steps: u64,
    /// Spans left out for want of room.
    pub dropped: u64,
    /// Something the reader should know; empty for nothing.
    pub note: String,
    /// Sorted by row, then by begin; those of a row lie beside or within one another.
    pub spans: Vec<Span>,
}

/// Seconds that arithmetic stood still.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Waits {
    /// For weights on their way.
    pub weights: f64,
    /// For pages that were not published.
    pub pages: f64,
    /// For gradient buffers.
    pub gradients: f64,
}

impl Waits {
    /// Adds to one of them.
    pub fn add(&mut self, wait: Wait, seconds: f64) {
        match wait {
            Wait::Weights => self.weights += seconds,
            Wait::Pages => self.pages += seconds,
            Wait::Gradients => self.gradients += seconds,
        }
    }
}
