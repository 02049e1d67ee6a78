//! Which rank owns which page.

use super::Block;
use crate::spec::PageId;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

/// Shares are multiples of so many parameters, so that they begin aligned in every format.
pub const SHARE_ALIGN: u64 = 64;

/// Parameters of each rank's share of a block of `len`: shares follow one another, the last ones may reach past the block's end.
pub fn share_of(len: u64, world_size: u32) -> u64 {
    if world_size <= 1 { len } else { len.div_ceil(u64::from(world_size)).next_multiple_of(SHARE_ALIGN) }
}

/// The rank of every page; see [`super::Layout::page_owner`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owners(Arc<[u32]>);

impl Owners {
    pub fn new(blocks: &[Block], span: u64, page_parameters: u32, world_size: u32) -> Owners {
        let size = u64::from(page_parameters);
        let mut count = vec![0u32; world_size as usize];
        let mut next = 0;
        let whole = |start: u64, next: &mut usize| -> Option<u32> {
            let end = (start + size).min(span);
            while blocks.get(*next).is_some_and(|b| b.start + b.len <= start) {
                *next += 1;
            }
            let block = blocks.get(*next).filter(|b| end <= b.start + b.len)?;
            let share = share_of(block.len, world_size).max(1);
            let rank = (start - block.start) / share;
            ((end - 1 - block.start) / share == rank).then_some(rank as u32)
        };
        let mut owners: Vec<Option<u32>> = (0..span).step_by(page_parameters as usize).map(|start| whole(start, &mut next)).collect();
        for rank in owners.iter().flatten() {
            count[*rank as usize] += 1;
        }
        let mut fewest: BinaryHeap<_> = count.into_iter().zip(0..world_size).map(Reverse).collect();
        for owner in owners.iter_mut().filter(|o| o.is_none()) {
            if let Some(mut top) = fewest.peek_mut() {
                *owner = Some(top.0.1);
                top.0.0 += 1;
            }
        }
        Owners(owners.into_iter().map(|o| o.unwrap_or(0)).collect())
    }

    /// Of a page that is not there: 0.
    pub fn of(&self, page: PageId) -> u32 {
        self.0.get(page as usize).copied().unwrap_or(0)
    }

    /// Pages of a rank, ascending.
    pub fn pages(&self, rank: u32) -> impl Iterator<Item = PageId> + use<> {
        let owners = self.0.clone();
        (0..owners.len() as PageId).filter(move |page| owners[*page as usize] == rank)
    }
}

#[cfg(test)]
impl From<Vec<u32>> for Owners {
    fn from(ranks: Vec<u32>) -> Owners {
        Owners(ranks.into())
    }
}
