//! Which pages are on the device before their update: those that stay there, and those that are brought there in time, and where
//! to.
//!
//! ```text
//!   backward pass:  block n-2 │ n-3 │ … │ 1        when a block is done, its activations are no longer needed:
//!   CopyIn:               pages of n-2 │ of n-3 …   some of its pages go there
//!   forward pass:   block 1 │ 2 │ …                writes a block's activations when the block's pages are published
//! ```
//! A page lies in the memory of the block in which it ends. So whoever finds that block published, which the forward pass
//! waits for, knows that all that lay there is done with: nobody else needs to be asked.

use ramtorch_device::{Ranks, staged_parameters};
use ramtorch_store::{Layout, PageId};

/// Pages whose state stays on the device of a rank: the first `most` of those that lie in its shares of blocks whose weights stay
/// there, which `resident` says. The first, because the next forward pass wants their weights first, and the next backward pass overwrites
/// their gradients last. In its shares, because from there the devices gather weights, whoever has published them.
pub(crate) fn held_pages(layout: &Layout, resident: &[bool], most: usize, ranks: Ranks) -> Vec<PageId> {
    let stays = |page: &PageId| {
        let params = layout.page_range(*page);
        let mut at = params.start;
        for (block, stays) in layout.blocks().iter().zip(resident).filter(|(block, _)| block.start + block.len > params.start) {
            let own = ranks.own(block.len);
            let (start, end) = (block.start + own.start, block.start + own.end);
            if start > at || !stays {
                return false;
            }
            at = end.max(at);
            if at >= params.end {
                return true;
            }
        }
        false
    };
    (0..layout.page_count()).filter(stays).take(most).collect()
}

/// For each block but the last: pages that rank `rank` stages into its activations, which have room for `rooms[block]` parts
/// of pages; at most `most[block]` of them, evenly spread over the block's, highest first.
pub(crate) fn staged_pages(layout: &Layout, rank: u32, places: &[(u64, u64)], rooms: &[usize], most: &[usize]) -> Vec<Vec<PageId>> {
    let parts_a_page = u64::from(layout.page_parameters()).div_ceil(staged_parameters(u64::from(layout.page_parameters()))) as usize;
    places
        .iter()
        .zip(rooms.iter().zip(most))
        .map(|((start, len), (room, most))| {
            let ends_here = |page: &PageId| {
                let end = layout.page_range(*page).end;
                end > *start && end <= start + len && layout.page_owner(*page) == rank
            };
            let mine: Vec<PageId> = layout.pages_of(*start..start + len).filter(ends_here).collect();
            let count = mine.len().min(*most).min(room / parts_a_page);
            let chosen = |i: &usize| (i + 1) * count / mine.len() > i * count / mine.len();
            let mut pages: Vec<PageId> = (0..mine.len()).filter(chosen).map(|i| mine[i]).collect();
            pages.reverse();
            pages
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};

    proptest! {
        #[test]
        fn pages_end_in_their_block_and_fit(
            lens in prop::collection::vec(1u64..20_000, 2..8), room in 0usize..40, most in 0usize..9, world in 1u32..4,
        ) {
            let blocks = lens.iter().enumerate().map(|(i, len)| BlockSpec {
                name: format!("b{i}"),
                tensors: vec![TensorSpec { name: format!("t{i}"), shape: vec![*len], joined: false, decay: true }],
            }).collect();
            let layout = Layout::new(&StoreSpec {
                blocks, world_size: world, moments: MomentFormat::F32, gradients: GradientFormat::F32, page_parameters: Some(1024),
                spare_pages_per_rank: 1, exchange_bytes: 4096, log: GradientLog::NONE, metadata: String::new(),
            }).unwrap();
            let places: Vec<(u64, u64)> = layout.blocks().iter().map(|b| (b.start, b.len)).collect();
            let rooms = vec![room; places.len() - 1];
            let mut seen = std::collections::HashSet::new();
            for rank in 0..world {
                let staged = staged_pages(&layout, rank, &places, &rooms, &vec![most; rooms.len()]);
                prop_assert_eq!(staged.len(), places.len() - 1);
                for (pages, (start, len)) in staged.iter().zip(&places) {
                    prop_assert!(pages.len() <= most.min(room) && pages.is_sorted_by(|a, b| a > b));
                    let ends = layout.pages_of(*start..start + len).filter(|p| layout.page_range(*p).end <= start + len && layout.page_owner(*p) == rank);
                    prop_assert_eq!(pages.len(), ends.count().min(most).min(room));
                    for page in pages {
                        let end = layout.page_range(*page).end;
                        prop_assert!(end > *start && end <= start + len && layout.page_owner(*page) == rank && seen.insert(*page));
                    }
                }
            }
        }
    }
}
