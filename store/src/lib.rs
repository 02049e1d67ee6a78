//! The parameter store: weights, fp32 master, moments and gradients of a model, once, in a POSIX shared-memory segment
//! that outlives every process.
//!
//! - [`Layout`] works out every size and place from a [`StoreSpec`].
//! - [`Store`] is a mapping of a segment. Any number of processes may map one.
//! - [`Owner`] is the right to bring one rank's pages from one step to the next. An update never overwrites a live page:
//!   the new state is written into a spare page and published with one atomic store.
//! - [`Snapshot`] holds the state of one step while the owner goes on to the next.
//! - [`Registry`] is the durable list of segments, for sweeping up after a dead owner.
//! - [`split`] takes a float apart into a bf16 and sixteen further bits, exactly.
//!
//! The layout of a segment is documented in `docs/store-format.md`.

#[cfg(not(all(target_endian = "little", target_pointer_width = "64", target_os = "linux")))]
compile_error!("the parameter store is for 64-bit little-endian Linux");

mod commit;
mod error;
mod format;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod layout;
mod mapping;
mod name;
mod owner;
mod page;
mod process;
mod read;
mod record;
mod registry;
mod snapshot;
mod spec;
pub mod split;
mod store;
mod system;

pub use commit::NEVER;
pub use error::StoreError;
pub use layout::{Block, Layout, SHARE_ALIGN, Sections, Tensor, share_of};
pub use owner::{Begun, Early, Owner, SharedOwner, Update};
pub use page::{Gradients, GradientsMut, MomentsMut, MomentsRef, PageMut, PagePtrs, PageView};
pub use process::ProcessIdentity;
pub use read::Part;
pub use record::{StepPhase, StepRecord};
pub use registry::{Registration, Registry};
pub use snapshot::Snapshot;
pub use spec::{BlockSpec, GradientFormat, GradientLog, MomentFormat, PageId, StoreSpec, TensorSpec};
pub use store::{PageEntry, Store};
pub use system::{ram_available_bytes, shm_free_bytes, shm_total_bytes};
