//! Which pages are on the device before their update: those that stay there, and those that are brought there in time, and where
//! to.
//!
//! ```text
//!   backward pass:  block n-2 │ n-3 │ … │ 1        when a block is done, its activations and its output are no longer needed:
//!   CopyIn:               pages    │ pages │ …     pages of this block go there, or of blocks before it
//!   forward pass:   block 1 │ 2 │ …                writes a block's activations when the block's pages are published
//! ```
//! A page lies in the memory of the block in which it ends, or of one behind that. So whoever finds a block published, which
//! the forward pass waits for block by block, knows that all that lay in its memory is done with: nobody else needs to be asked.
//! Layers that keep little have their pages in what others leave, and the first block, whose pages are wanted first and whose turn
//! comes when the backward pass is over, has them there before.

use ramtorch_device::{Ranks, staged_parts};
use ramtorch_store::{Layout, PageId};
use std::collections::VecDeque;

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

/// Loads of pages, by the visit of the backward pass that they follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schedule {
    /// Of the block that was visited.
    own: Vec<usize>,
    /// Of blocks before it: which block, for each page.
    ahead: Vec<Vec<usize>>,
}

impl Schedule {
    /// At most `most` pages, and `caps` after each visit, of blocks with `pages` each, into `rooms` that each block's visit leaves
    /// behind. The same share of each block's where there is room and time: the processor and the device go through the
    /// pages side by side. What is left over goes to the first blocks.
    pub fn new(pages: &[usize], rooms: &[usize], caps: &[usize], most: usize) -> Schedule {
        let n = pages.len();
        let all: usize = pages.iter().sum();
        let most = most.min(all).min(rooms.iter().sum()).min(caps.iter().sum());
        let share = |count: usize| (count as u128 * most as u128 / all.max(1) as u128) as usize;
        let mut s = Schedule { own: vec![0; n], ahead: vec![Vec::new(); n] };
        let (mut quota, mut taken, mut used) = (vec![0; n], vec![0; n], vec![0; n]);
        // Rooms left of those that visits from here to the last block's leave.
        let mut free = vec![0usize; n];
        let (mut before, mut pool) = (0, 0);
        for b in (0..n).rev() {
            pool += rooms[b];
            quota[b] = share(before + pages[b]) - share(before);
            before += pages[b];
            let k = quota[b].min(caps[b]).min(pool);
            (s.own[b], taken[b], used[b]) = (k, k, k);
            pool -= k;
            free[b] = pool;
        }
        let mut left = most - taken.iter().sum::<usize>();
        for limits in [&quota[..], pages] {
            for x in 0..n {
                while left > 0 && taken[x] < limits[x] {
                    // As late as there is time; a room from here on is one that later visits do not have.
                    let Some(c) = (x..n).find(|c| used[*c] < caps[*c]).filter(|c| free[..=*c].iter().all(|f| *f > 0)) else { break };
                    free[..=c].iter_mut().for_each(|f| *f -= 1);
                    (taken[x], used[c], left) = (taken[x] + 1, used[c] + 1, left - 1);
                    match c == x {
                        true => s.own[x] += 1,
                        false => s.ahead[c].push(x),
                    }
                }
            }
        }
        s
    }

    /// Pages after each visit.
    pub fn loads(&self) -> Vec<usize> {
        self.own.iter().zip(&self.ahead).map(|(own, ahead)| own + ahead.len()).collect()
    }
}

/// For each block but the last: pages that rank `rank` stages after the block's visit, and the block in whose memory, whole rooms from
/// its beginning on, which has `rooms[block]` parts of pages. At most `caps[block]` of them, evenly spread over the pages of their
/// block, highest first; none that `elsewhere` says.
pub(crate) fn staged_pages(
    layout: &Layout,
    rank: u32,
    places: &[(u64, u64)],
    rooms: &[usize],
    caps: &[usize],
    elsewhere: &dyn Fn(PageId) -> bool,
) -> Vec<Vec<(PageId, usize)>> {
    let each = staged_parts(u64::from(layout.page_parameters())) as usize;
    let rooms: Vec<usize> = rooms.iter().map(|parts| parts / each).collect();
    let of_block = |(start, len): &(u64, u64)| -> Vec<PageId> {
        let ends_here = |page: &PageId| {
            let end = layout.page_range(*page).end;
            end > *start && end <= start + len && layout.page_owner(*page) == rank && !elsewhere(*page)
        };
        layout.pages_of(*start..start + len).filter(ends_here).collect()
    };
    let pages: Vec<Vec<PageId>> = places.iter().take(rooms.len()).map(of_block).collect();
    let counts: Vec<usize> = pages.iter().map(Vec::len).collect();
    let schedule = Schedule::new(&counts, &rooms, caps, usize::MAX);
    let mut taken = schedule.own.clone();
    schedule.ahead.iter().flatten().for_each(|x| taken[*x] += 1);
    // Ascending: the next one is at the end.
    let mut chosen: Vec<Vec<PageId>> = pages
        .iter()
        .zip(&taken)
        .map(|(mine, count)| (0..mine.len()).filter(|i| (i + 1) * count / mine.len() > i * count / mine.len()).map(|i| mine[i]).collect())
        .collect();
    let mut free = VecDeque::new();
    let mut staged = vec![Vec::new(); rooms.len()];
    for b in (0..rooms.len()).rev() {
        free.extend(std::iter::repeat_n(b, rooms[b]));
        let blocks = std::iter::repeat_n(b, schedule.own[b]).chain(schedule.ahead[b].iter().copied());
        staged[b] = blocks.filter_map(|x| Some((chosen[x].pop()?, free.pop_front()?))).collect();
    }
    staged
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};

    fn layout(lens: &[u64], world: u32) -> Layout {
        let blocks = lens.iter().enumerate().map(|(i, len)| BlockSpec {
            name: format!("b{i}"),
            tensors: vec![TensorSpec { name: format!("t{i}"), shape: vec![*len], joined: false, decay: true }],
        });
        Layout::new(&StoreSpec {
            blocks: blocks.collect(),
            world_size: world,
            moments: MomentFormat::F32,
            gradients: GradientFormat::F32,
            page_parameters: Some(1024),
            spare_pages_per_rank: 1,
            exchange_bytes: 4096,
            log: GradientLog::NONE,
            metadata: String::new(),
        })
        .unwrap()
    }

    /// An embedding, layers of which some keep little, time for five pages a visit, and none behind the first layer's.
    #[test]
    fn first_blocks_and_those_without_room_have_their_share() {
        let pages = [12, 8, 8, 8, 8, 8, 8];
        let rooms = [0, 0, 10, 0, 10, 10, 0];
        let caps = [0, 1, 5, 5, 5, 5, 5];
        let s = Schedule::new(&pages, &rooms, &caps, usize::MAX);
        // Nothing has left room when the last layer's visit is over.
        assert_eq!((s.own[6], s.loads()[6]), (0, 0));
        let of = |x: usize| s.own[x] + s.ahead.iter().flatten().filter(|b| **b == x).count();
        assert!((4..=6).contains(&of(0)) && (3..=5).contains(&of(3)), "{s:?}");
        assert_eq!(s.loads().iter().sum::<usize>(), 21, "{s:?}");
        // Half as many: as evenly.
        let s = Schedule::new(&pages, &rooms, &caps, 10);
        assert_eq!(s.loads().iter().sum::<usize>(), 10);
        assert!(s.ahead.iter().flatten().filter(|b| **b == 0).count() >= 2, "{s:?}");
    }

    proptest! {
        #[test]
        fn pages_end_before_their_rooms_and_fit(
            lens in prop::collection::vec(1u64..20_000, 2..8), room in prop::collection::vec(0usize..40, 7),
            caps in prop::collection::vec(0usize..9, 7), world in 1u32..4, without in 2u32..9,
        ) {
            let layout = layout(&lens, world);
            let places: Vec<(u64, u64)> = layout.blocks().iter().map(|b| (b.start, b.len)).collect();
            let (rooms, caps) = (&room[..places.len() - 1], &caps[..places.len() - 1]);
            let mut seen = std::collections::HashSet::new();
            for rank in 0..world {
                let staged = staged_pages(&layout, rank, &places, rooms, caps, &|page| page % without == 0);
                prop_assert_eq!(staged.len(), places.len() - 1);
                let mut taken = vec![0; rooms.len()];
                for (b, pages) in staged.iter().enumerate() {
                    prop_assert!(pages.len() <= caps[b]);
                    for (page, room) in pages {
                        let end = layout.page_range(*page).end;
                        let block = places.iter().position(|(start, len)| end > *start && end <= start + len).unwrap();
                        // In memory that was left before, and that is wanted after the page is.
                        prop_assert!(b <= *room && block <= b, "page of block {} after visit {} in the memory of {}", block, b, room);
                        prop_assert!(layout.page_owner(*page) == rank && page % without != 0 && seen.insert(*page));
                        taken[*room] += 1;
                    }
                }
                prop_assert!(taken.iter().zip(rooms).all(|(taken, room)| taken <= room));
            }
        }

        /// As many are loaded as any order could: whatever has time and room that a block behind it, or its own, has left.
        #[test]
        fn nothing_that_fits_is_left_out(
            blocks in prop::collection::vec((0usize..9, 0usize..9, 0usize..9), 1..9), most in 0usize..40,
        ) {
            let pages: Vec<usize> = blocks.iter().map(|b| b.0).collect();
            let rooms: Vec<usize> = blocks.iter().map(|b| b.1).collect();
            let caps: Vec<usize> = blocks.iter().map(|b| b.2).collect();
            let s = Schedule::new(&pages, &rooms, &caps, most);
            let loads = s.loads();
            // The best: from the last visit to the first, each takes all it can, and pages of the last blocks that may.
            let (mut free, mut best, mut waiting) = (0, 0, pages.clone());
            for b in (0..blocks.len()).rev() {
                free += rooms[b];
                for _ in 0..caps[b] {
                    if let Some(x) = (0..=b).rev().find(|x| waiting[*x] > 0).filter(|_| free > 0) {
                        (waiting[x], free, best) = (waiting[x] - 1, free - 1, best + 1);
                    }
                }
            }
            prop_assert!(loads.iter().sum::<usize>() <= best.min(most));
            prop_assert!(loads.iter().zip(&caps).all(|(load, cap)| load <= cap));
            for x in 0..blocks.len() {
                let of: usize = s.own[x] + s.ahead.iter().flatten().filter(|b| **b == x).count();
                prop_assert!(of <= pages[x]);
                // Rooms suffice at every visit.
                prop_assert!(loads[x..].iter().sum::<usize>() <= rooms[x..].iter().sum::<usize>());
                prop_assert!(s.ahead[x].iter().all(|b| *b < x));
            }
        }
    }
}
