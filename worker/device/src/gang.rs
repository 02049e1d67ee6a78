//! Several devices that train one model: how a block is divided between ranks, and what their devices need of a gang.
//!
//! A block of parameters has one *share* a rank, all of the same length, one after the other. The last shares may reach past
//! the block's end (or lie past it whole): buffers that are gathered or reduced have room for all shares.
//!
//! ```text
//!   all-gather      rank r fills share r ──►  every rank has all shares             (weights, on their way in)
//!   reduce-scatter  every rank has all shares ──► rank r has the sum of share r     (gradients, on their way out)
//! ```
//! Both run in place on [`crate::Stream::Peers`], in one order on every rank: whoever enqueues them must not let that order
//! depend on time.

use crate::{Dtype, EngineError};
use ramtorch_store::SHARE_ALIGN;
use std::ops::Range;

/// One rank of a gang.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// This one, from 0.
    pub rank: usize,
    /// All of them; at least 1.
    pub world: usize,
}

impl Ranks {
    /// A rank without peers.
    pub const ALONE: Ranks = Ranks { rank: 0, world: 1 };

    /// Elements of each rank's share of `len` elements.
    pub fn share(self, len: u64) -> u64 {
        ramtorch_store::share_of(len, self.world as u32)
    }

    /// Elements of a buffer with room for all shares.
    pub fn padded(self, len: u64) -> u64 {
        self.share(len) * self.world as u64
    }

    /// This rank's share, without what lies past the end; may be empty.
    pub fn own(self, len: u64) -> Range<u64> {
        let (share, rank) = (self.share(len), self.rank as u64);
        (rank * share).min(len)..((rank + 1) * share).min(len)
    }
}

/// The gang that a device belongs to: enough to connect devices, and the reference collectives through memory of the host.
pub trait Gang: Send + Sync {
    /// This rank.
    fn ranks(&self) -> Ranks;
    /// Rank 0's bytes for every rank. Called by all ranks at the same place, from the thread of the step loop.
    ///
    /// # Errors
    /// This rank has given up.
    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), EngineError>;
    /// This rank has given up: nothing waits for peers any more, whatever is enqueued.
    fn aborted(&self) -> bool;
    /// Gives up.
    fn abort(&self);
    /// Fills the other ranks' shares of `buf`, which holds one share a rank.
    ///
    /// # Errors
    /// This rank has given up; `buf` is in no particular state.
    fn all_gather(&self, buf: &mut [u8]) -> Result<(), EngineError>;
    /// Replaces this rank's share of `buf` by the sum over ranks, added in rank order.
    ///
    /// # Errors
    /// As [`Gang::all_gather`].
    fn reduce_scatter(&self, buf: &mut [f32]) -> Result<(), EngineError>;
    /// The same of bf16 values (by their bits), added in f32 and rounded once.
    ///
    /// # Errors
    /// As [`Gang::all_gather`].
    fn reduce_scatter_bf16(&self, buf: &mut [u16]) -> Result<(), EngineError>;
}

/// Checks that `bytes` are whole shares of `world` ranks, aligned as shares are.
///
/// # Errors
/// They are not: a defect of the engine.
pub fn check_shares(ranks: Ranks, bytes: u64, dtype: Dtype) -> Result<(), EngineError> {
    if bytes.is_multiple_of(ranks.world as u64 * SHARE_ALIGN * dtype.size()) {
        return Ok(());
    }
    Err(EngineError::internal(format!("{bytes} bytes are no equal shares of {} ranks", ranks.world)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_a_block_once_and_fit_their_buffer() {
        for world in 1..=9 {
            for len in [64u64, 128, 192, 64 * 7, 64 * 100, 64 * 101] {
                let mut next = 0;
                for rank in 0..world {
                    let r = Ranks { rank, world };
                    let own = r.own(len);
                    assert_eq!(own.start, next);
                    assert!(own.end - own.start <= r.share(len) && own.start <= own.end);
                    next = own.end;
                    assert!(r.padded(len) >= len && r.padded(len) - len < SHARE_ALIGN * world as u64);
                    assert!(check_shares(r, r.padded(len) * 2, Dtype::Bf16).is_ok());
                }
                assert_eq!(next, len);
            }
        }
        assert!(check_shares(Ranks { rank: 0, world: 3 }, 3 * 64 * 4 - 4, Dtype::F32).is_err());
    }
}
