//! State that is held while the owner goes on.

use crate::common::{Segment, fill, is_at, load_all, moment, spec, weight};
use ramtorch_store::{Begun, GradientFormat, MomentFormat, PageId, Part, SharedOwner, Snapshot, Store, StoreError};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

fn store(segment: &Segment, world: u32, moments: MomentFormat, spares: u32) -> Store {
    let spec = ramtorch_store::StoreSpec { spare_pages_per_rank: spares, ..spec(world, moments, GradientFormat::F32) };
    let store = Store::create(&segment.name, &spec).unwrap();
    load_all(&store);
    store
}

fn update(owner: &SharedOwner<'_>, page: PageId, step: u64) -> Result<bool, StoreError> {
    owner.update(page, step, |old, new, _| {
        assert!(is_at(&old, step - 1), "page {page}");
        fill(new, step);
        Ok(())
    })
}

fn assert_at(store: &Store, snapshot: &Snapshot<'_>, page: PageId, step: u64) {
    let range = store.layout().page_range(page);
    let mut out = vec![0.0; (range.end - range.start) as usize];
    let parts: &[Part] = match store.layout().spec().moments {
        MomentFormat::None => &[Part::Weight],
        _ => &[Part::Weight, Part::Moment1, Part::Moment2],
    };
    for part in parts {
        snapshot.read(range.start, *part, &mut out).unwrap();
        for (parameter, x) in range.clone().zip(&out) {
            let wanted = match part {
                Part::Weight => weight(parameter, step),
                Part::Moment1 => moment(parameter, step, false),
                Part::Moment2 => moment(parameter, step, true),
            };
            assert_eq!(x.to_bits(), wanted.to_bits(), "parameter {parameter}, {part:?}");
        }
    }
}

/// Two updaters go on for several steps, as fast as they can, while every state of every third step is read late.
#[test]
fn what_is_held_is_not_overwritten_and_nobody_waits_for_ever() {
    for (moments, spares) in [(MomentFormat::F32, 1), (MomentFormat::Bf16, 2), (MomentFormat::None, 3)] {
        let segment = Segment::new();
        let store = store(&segment, 1, moments, spares);
        let owner = SharedOwner::new(store.claim(0).unwrap());
        for step in (0..12).step_by(3) {
            let mut snapshot = owner.snapshot(step).unwrap();
            let pages = snapshot.pages();
            assert_eq!(pages, owner.pages().collect::<Vec<_>>());
            std::thread::scope(|scope| {
                let updates = scope.spawn(|| {
                    for next in step + 1..=step + 3 {
                        for page in owner.pages() {
                            update(&owner, page, next).unwrap();
                        }
                    }
                });
                for page in pages {
                    std::thread::sleep(Duration::from_micros(300));
                    assert_at(&store, &snapshot, page, step);
                    snapshot.release(page);
                    assert!(matches!(snapshot.read(u64::from(page) * 1024, Part::Weight, &mut [0.0]), Err(StoreError::NotHeld(_))));
                }
                updates.join().unwrap();
            });
        }
        assert!(owner.pages().all(|page| store.entry(page).step == 12));
        assert!(owner.waited() > Duration::ZERO, "with {spares} spares and so many pages somebody has to wait");
    }
}

#[test]
fn only_state_that_would_be_overwritten_is_waited_for() {
    let segment = Segment::new();
    let store = store(&segment, 1, MomentFormat::F32, 1);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    let mut snapshot = owner.snapshot(0).unwrap();
    // The spare of now holds nothing of step 0.
    assert!(update(&owner, 0, 1).unwrap());
    assert!(matches!(owner.try_begin(1, 1).unwrap(), Begun::Pinned), "the only spare is page 0 of step 0");
    assert!(matches!(owner.try_begin(0, 1).unwrap(), Begun::Done), "what is at the step already needs none");
    // Another page's state is not what is in the way.
    snapshot.release(5);
    assert!(matches!(owner.try_begin(1, 1).unwrap(), Begun::Pinned));
    assert_at(&store, &snapshot, 0, 0);
    snapshot.release(0);
    assert!(update(&owner, 1, 1).unwrap());
    assert_at(&store, &snapshot, 1, 0);
    assert_eq!(owner.waited(), Duration::ZERO);
    // Pages at two steps make no snapshot.
    assert!(matches!(owner.snapshot(1), Err(StoreError::Step { .. })));
}

#[test]
fn a_snapshot_that_is_given_up_lets_everybody_go_on() {
    let segment = Segment::new();
    let store = store(&segment, 2, MomentFormat::F32, 1);
    let owner = SharedOwner::new(store.claim(1).unwrap());
    let snapshot = owner.snapshot(0).unwrap();
    assert!(snapshot.pages().iter().all(|page| store.layout().page_owner(*page) == 1), "those of the rank");
    update(&owner, 2, 1).unwrap();
    let through = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            update(&owner, 6, 1).unwrap();
            through.store(true, Ordering::Release);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!through.load(Ordering::Acquire), "it waits");
        drop(snapshot);
    });
    assert!(through.load(Ordering::Acquire));
    assert!(owner.waited() >= Duration::from_millis(20));
}

/// Two snapshots of one step: a page is free once both have let go of it.
#[test]
fn snapshots_do_not_end_each_other() {
    let segment = Segment::new();
    let store = store(&segment, 1, MomentFormat::F32, 1);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    let (first, mut second) = (owner.snapshot(0).unwrap(), owner.snapshot(0).unwrap());
    update(&owner, 0, 1).unwrap();
    drop(first);
    assert!(matches!(owner.try_begin(1, 1).unwrap(), Begun::Pinned));
    second.release(0);
    assert!(matches!(owner.try_begin(1, 1).unwrap(), Begun::Update(_)));
}
