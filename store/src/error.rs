//! What can go wrong with a store.

use crate::PageId;
use std::path::PathBuf;

/// Why an operation on a store was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The description of a store contradicts itself or passes a limit.
    #[error("the description of the parameter store is not usable: {0}")]
    Spec(String),
    /// Not usable as the name of a segment.
    #[error("{name:?} is not a segment name: {reason}")]
    Name {
        /// As given.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A segment of that name is there already.
    #[error("segment {0} exists already; unlink it first, or choose another name")]
    Exists(String),
    /// No segment of that name.
    #[error("there is no segment {0}; its job has ended, or the machine was restarted")]
    NotFound(String),
    /// The mount of shared memory cannot hold the segment.
    #[error(
        "segment {name} needs {wanted} bytes and /dev/shm has {free} free; enlarge it (mount -o remount,size=… /dev/shm) or remove what fills it"
    )]
    ShmFull {
        /// Segment.
        name: String,
        /// Bytes that it needs.
        wanted: u64,
        /// Bytes free.
        free: u64,
    },
    /// RAM cannot hold the segment.
    #[error(
        "segment {name} needs {wanted} bytes and {free} bytes of RAM are available; use a smaller model or narrower state, or end what holds the memory"
    )]
    RamFull {
        /// Segment.
        name: String,
        /// Bytes that it needs.
        wanted: u64,
        /// Bytes available: the least of MemAvailable and what the memory limits of this process's control groups leave.
        free: u64,
    },
    /// The kernel refused a step of making, mapping or reading something.
    #[error("{action}: {source}")]
    System {
        /// What was tried, on what.
        action: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The segment is not a parameter store, or a damaged one.
    #[error("segment {name} is not a sound parameter store: {reason}")]
    Damaged {
        /// Segment.
        name: String,
        /// The first thing found wrong.
        reason: String,
    },
    /// Made by another version of this program.
    #[error("segment {name} has layout version {found}, this program reads versions 2 to {supported}; use the program that made it")]
    Version {
        /// Segment.
        name: String,
        /// In its header.
        found: u32,
        /// Of this program.
        supported: u32,
    },
    /// The mapping is read-only.
    #[error("segment {0} is mapped read-only")]
    ReadOnly(String),
    /// Not a rank of this store.
    #[error("rank {rank} is outside the world size of {world_size}")]
    Rank {
        /// Asked for.
        rank: u32,
        /// Ranks there are.
        world_size: u32,
    },
    /// Somebody else updates this rank's pages.
    #[error("the pages of rank {rank} in segment {name} are claimed already; end the worker that holds them first")]
    Claimed {
        /// Segment.
        name: String,
        /// Rank.
        rank: u32,
    },
    /// A page that this owner may not change.
    #[error("page {page} belongs to rank {owner}, not to rank {rank}")]
    NotOwner {
        /// Page.
        page: PageId,
        /// Whose it is.
        owner: u32,
        /// Who asked.
        rank: u32,
    },
    /// No such page.
    #[error("page {page} is outside the {page_count} pages of the store")]
    Page {
        /// Asked for.
        page: PageId,
        /// Pages there are.
        page_count: u32,
    },
    /// The page is at the wrong step.
    #[error("page {page} is at step {found}, step {wanted} was expected")]
    Step {
        /// Page.
        page: PageId,
        /// Where it is.
        found: u64,
        /// Where it should be.
        wanted: u64,
    },
    /// The page was never written.
    #[error("page {0} was never written; the store is still being loaded")]
    Uninitialised(PageId),
    /// A step number too large for a page entry, or reserved.
    #[error("step {0} is too large; the page table holds steps below 2^36 - 1")]
    StepRange(u64),
    /// All spare pages of the rank are in use.
    #[error("rank {0} has no spare page left; publish or abandon an update under way first")]
    NoSpare(u32),
    /// Spare pages are free, and a snapshot needs what is in each of them.
    #[error("every free spare page of rank {0} holds state that a snapshot has not let go of yet")]
    Pinned(u32),
    /// Not a page whose state a snapshot holds, or parameters of several pages.
    #[error("a snapshot does not hold the state of page {0}, or parameters beyond it were asked for")]
    NotHeld(PageId),
    /// The same page twice.
    #[error("an update of page {0} is under way already")]
    UnderWay(PageId),
    /// An update that this owner did not begin.
    #[error("the update of page {0} was not begun by this owner")]
    ForeignUpdate(PageId),
    /// Parameters outside the index space.
    #[error("parameters {start}..{end} are outside the {span} of the store")]
    Parameters {
        /// First.
        start: u64,
        /// Behind the last.
        end: u64,
        /// Length of the index space.
        span: u64,
    },
    /// The store keeps no moments.
    #[error("the store holds weights only, no moments")]
    NoMoments,
    /// The page changed every time it was read.
    #[error("page {0} kept changing while it was read; read it when no step is being committed")]
    Busy(PageId),
    /// The registry's folder holds something unusable.
    #[error("registration {path}: {reason}")]
    Registration {
        /// File.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl StoreError {
    pub(crate) fn system(action: impl Into<String>, source: impl Into<std::io::Error>) -> StoreError {
        StoreError::System { action: action.into(), source: source.into() }
    }
}
