//! Weights of a model that is only run forward: which of them stay on the device.

use super::{rounded, slots_for};
use crate::model::{Block, Model};

/// Slots for blocks that are streamed: one in use, two on their way.
const SLOTS: usize = 3;

/// What a device has of a model's weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Residence {
    /// Blocks whose weights stay.
    pub stay: Vec<bool>,
    /// Slots for the others.
    pub slots: usize,
    /// Bytes of both, which are more than there is room for where even one block at a time has none.
    pub bytes: u64,
    /// Bytes of the weights that do not stay, which every sweep loads.
    pub streamed: u64,
}

/// What stays in `room` bytes. The ends stay before any layer does: they are the largest, and a slot has room for the largest
/// of what is streamed. The first layers stay before the last: while they are at work, the others are on their way.
pub(crate) fn resident(model: &Model, room: u64) -> Residence {
    let sizes: Vec<u64> = model.places.iter().map(|p| rounded(p.1 * model.dtype.size())).collect();
    let layer = |b: usize| matches!(model.blocks[b], Block::Layer(_));
    let kept = keep(&sizes, layer, room, SLOTS);
    // With fewer slots less is on its way, but it runs.
    if kept.bytes > room { keep(&sizes, layer, room, slots_for(model).min(SLOTS)) } else { kept }
}

fn keep(sizes: &[u64], layer: impl Fn(usize) -> bool, room: u64, slots: usize) -> Residence {
    let mut stay = vec![true; sizes.len()];
    let mut bytes: u64 = sizes.iter().sum();
    let (mut largest, mut streamed) = (0, 0);
    let order = (0..sizes.len()).rev().filter(|b| layer(*b)).chain((0..sizes.len()).rev().filter(|b| !layer(*b)));
    for b in order {
        if bytes + slots as u64 * largest <= room {
            break;
        }
        stay[b] = false;
        bytes -= sizes[b];
        streamed += sizes[b];
        largest = largest.max(sizes[b]);
    }
    let slots = if largest > 0 { slots } else { 0 };
    Residence { stay, slots, bytes: bytes + slots as u64 * largest, streamed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ends_stay_and_slots_have_the_size_of_a_layer() {
        let sizes = [800, 100, 100, 100, 100, 100, 100, 1];
        let kept = |room: u64| keep(&sizes, |b| (1..7).contains(&b), room, SLOTS);
        assert_eq!(kept(1401), Residence { stay: vec![true; 8], slots: 0, bytes: 1401, streamed: 0 });
        // Three slots take what two layers and a little more left.
        let stay = vec![true, true, true, false, false, false, false, true];
        assert_eq!(kept(1301), Residence { stay, slots: 3, bytes: 1301, streamed: 400 });
        assert_eq!(kept(1000), Residence { stay: vec![false; 8], slots: 3, bytes: 2400, streamed: 1401 });
    }

    proptest! {
        #[test]
        fn more_room_keeps_more(sizes in proptest::collection::vec(1u64..1000, 3..20), room in 0u64..20_000, more in 0u64..2000) {
            let last = sizes.len() - 1;
            let layer = |b: usize| b > 0 && b < last;
            let count = |kept: &Residence| kept.stay.iter().filter(|s| **s).count();
            let kept = keep(&sizes, layer, room, SLOTS);
            prop_assert!(kept.bytes <= room || count(&kept) == 0);
            prop_assert_eq!(kept.slots == 0, count(&kept) == sizes.len());
            prop_assert!(count(&keep(&sizes, layer, room + more, SLOTS)) >= count(&kept));
        }
    }
}
