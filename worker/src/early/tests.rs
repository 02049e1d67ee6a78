use super::*;
use ramtorch_store::{BlockSpec, GradientFormat, MomentFormat, StoreSpec, TensorSpec};

/// Blocks of these lengths, pages of 1024 parameters.
fn layout(blocks: &[u64]) -> Layout {
    let block = |(i, len): (usize, &u64)| BlockSpec {
        name: format!("b{i}"),
        tensors: vec![TensorSpec { name: format!("w{i}"), shape: vec![*len], joined: false, decay: true }],
    };
    Layout::new(&StoreSpec {
        blocks: blocks.iter().enumerate().map(block).collect(),
        world_size: 1,
        moments: MomentFormat::F32,
        gradients: GradientFormat::F32,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 0,
        metadata: String::new(),
    })
    .unwrap()
}

fn places(layout: &Layout) -> Vec<(u64, u64)> {
    layout.blocks().iter().map(|b| (b.start, b.len)).collect()
}

#[test]
fn a_page_waits_for_every_block_that_it_lies_in() {
    // Blocks end inside pages; the third lies in one page with parts of its neighbours.
    let l = layout(&[1600, 1024, 128, 2048]);
    let pages = in_order_of_gradients(&l, &places(&l), 0..l.page_count());
    let found: Vec<(u32, Range<usize>)> = pages.into_iter().map(|p| (p.page, p.blocks)).collect();
    assert_eq!(found, [(3, 3..4), (4, 3..4), (2, 1..4), (0, 0..1), (1, 0..2)]);
    let some = in_order_of_gradients(&l, &places(&l), [1, 2].into_iter());
    assert_eq!(some.iter().map(|p| p.page).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn gradients_of_pages_that_are_ahead_are_not_wanted() {
    let l = layout(&[5000]);
    let ahead = Ahead { step: 8, pages: vec![false, true, true, false, true] };
    assert_eq!(ahead.wanted(&l, 0..l.span(), 7), [0..1024, 3072..4096]);
    assert_eq!(ahead.wanted(&l, 100..3100, 7), [100..1024, 3072..3100]);
    assert_eq!(ahead.wanted(&l, 1030..3000, 7), []);
    assert_eq!(ahead.wanted(&l, 3200..3300, 7), std::slice::from_ref(&(3200..3300)));
    assert_eq!(ahead.wanted(&l, 50..50, 7), []);
    // Of another step, all are.
    assert_eq!(ahead.wanted(&l, 100..3100, 8), std::slice::from_ref(&(100..3100)));
    assert!(ahead.has(1, 7) && !ahead.has(0, 7) && !ahead.has(1, 6) && !ahead.has(1, 8) && !ahead.has(9, 7));
    assert_eq!(ahead.count(), (3, 5));
}

#[test]
fn whoever_enters_a_gate_answers() {
    let gate = Gate::default();
    assert!(gate.enter() && !gate.enter() && !gate.is_closed());
    assert!(gate.close(), "somebody has entered");
    assert!(gate.is_closed() && !gate.enter());
    let late = Gate::default();
    assert!(!late.close() && !late.enter());
}
