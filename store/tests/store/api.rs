//! One process, one segment.

use crate::common::*;
use ramtorch_store::*;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn store(segment: &Segment) -> Store {
    Store::create(&segment.name, &spec(2, MomentFormat::F32, GradientFormat::F32)).unwrap()
}

#[test]
fn a_new_segment_is_private_reserved_and_empty() {
    let segment = Segment::new();
    let store = store(&segment);
    let file = std::fs::metadata(segment.path()).unwrap();
    assert_eq!((file.len(), file.mode() & 0o777), (store.layout().bytes(), 0o600));
    assert_eq!(file.blocks() * 512, file.len(), "every page is allocated");
    assert_eq!((store.len() as u64, store.base() as usize % 4096), (file.len(), 0));
    assert!((0..store.layout().page_count()).all(|p| store.entry(p).step == NEVER));
    assert_eq!(store.record(), StepRecord { step: 0, phase: StepPhase::Loading, values: [0.0; 40] });
    assert_eq!((store.generation(), store.control().len()), (0, 4096));
    assert!(store.control().iter().all(|w| w.load(Ordering::Relaxed) == 0));
    assert!(matches!(store.read(0, Part::Weight, &mut [0.0]), Err(StoreError::Uninitialised(0))));
}

/// Where memory comes from is a wish: nodes that are there, that are not, and that cannot be change nothing else.
#[test]
fn pages_may_be_wished_onto_nodes_of_memory() {
    for nodes in [vec![0, 0], vec![0, 63], vec![1 << 20]] {
        let segment = Segment::new();
        let made = Store::create_near(&segment.name, &spec(2, MomentFormat::F32, GradientFormat::F32), &nodes).unwrap();
        let file = std::fs::metadata(segment.path()).unwrap();
        assert_eq!(file.blocks() * 512, made.layout().bytes(), "every page is allocated");
        load_all(&made);
    }
}

#[test]
fn what_is_written_is_read_in_every_format() {
    for moments in [MomentFormat::None, MomentFormat::F32, MomentFormat::Bf16] {
        for world_size in 1..=3 {
            let segment = Segment::new();
            let made = Store::create(&segment.name, &spec(world_size, moments, GradientFormat::None)).unwrap();
            load_all(&made);
            for rank in 0..world_size {
                let mut owner = made.claim(rank).unwrap();
                for step in 1..=3 {
                    for page in owner.pages() {
                        owner
                            .update(page, step, |old, new, gradients| {
                                assert!(is_at(&old, step - 1));
                                assert_eq!(gradients, Gradients::None);
                                fill(new, step);
                            })
                            .unwrap();
                    }
                }
            }
            drop(made);
            let store = Store::attach_read_only(&segment.name).unwrap();
            let span = store.layout().span();
            // All at once, and pieces that begin and end anywhere.
            for (start, len) in [(0, span), (1, span - 1), (1023, 2), (1021, 1030), (2050, 7), (span - 3, 3), (5, 0)] {
                let mut out = vec![f32::NAN; len as usize];
                let step = store.read(start, Part::Weight, &mut out).unwrap();
                assert_eq!(step, if len == 0 { 0 } else { 3 });
                assert!(out.iter().zip(start..).all(|(x, p)| *x == weight(p, 3)), "weights from {start}, {len} of them");
                for (part, second) in [(Part::Moment1, false), (Part::Moment2, true)] {
                    match (moments, store.read_at_step(start, part, 3, &mut out)) {
                        (MomentFormat::None, Err(StoreError::NoMoments)) => {}
                        (_, result) => {
                            result.unwrap();
                            assert!(
                                out.iter().zip(start..).all(|(x, p)| *x == moment(p, 3, second)),
                                "{part:?} from {start}, {len} of them"
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn reading_says_what_cannot_be_read() {
    let segment = Segment::new();
    let store = store(&segment);
    load_all(&store);
    let span = store.layout().span();
    let mut out = [0.0; 10];
    for start in [span - 9, span, u64::MAX, u64::MAX - 9] {
        assert!(matches!(store.read(start, Part::Weight, &mut out), Err(StoreError::Parameters { .. })), "{start}");
    }
    store.claim(0).unwrap().update(1, 1, |_, new, _| fill(new, 1)).unwrap();
    let mut out = vec![0.0; 2048];
    assert_eq!(store.read(0, Part::Weight, &mut out).unwrap(), 0, "the least step");
    assert!(matches!(store.read_at_step(0, Part::Weight, 0, &mut out), Err(StoreError::Step { page: 1, found: 1, wanted: 0 })));
    assert!(store.read_at_step(1024, Part::Weight, 1, &mut out[..1024]).is_ok());
}

#[test]
fn an_update_leaves_the_old_page_alone_until_it_is_published() {
    let segment = Segment::new();
    let store = store(&segment);
    load_all(&store);
    let mut owner = store.claim(0).unwrap();
    let before = store.entry(0);
    owner
        .update(0, 1, |_, new, _| {
            fill(new, 1);
            assert_eq!(store.entry(0), before);
            let mut out = vec![0.0; 1024];
            store.read_at_step(0, Part::Weight, 0, &mut out).unwrap();
            assert!(out.iter().zip(0..).all(|(x, p)| *x == weight(p, 0)));
        })
        .unwrap();
    let after = store.entry(0);
    assert!(after.step == 1 && after.physical != before.physical);
    owner.update(0, 1, |_, _, _| panic!("the page is at that step already")).unwrap();
    assert_eq!(store.entry(0), after);
    assert!(matches!(owner.update(0, 3, |_, _, _| ()), Err(StoreError::Step { page: 0, found: 1, wanted: 2 })));
    assert!(matches!(owner.update(2, 1, |_, _, _| ()), Err(StoreError::NotOwner { page: 2, owner: 1, rank: 0 })));
    assert!(matches!(owner.initialise(9999, 1, |_| ()), Err(StoreError::Page { page: 9999, .. })));
    assert!(matches!(owner.initialise(0, NEVER, |_| ()), Err(StoreError::StepRange(NEVER))));
    // Back to a checkpoint: any step, zeroed.
    owner
        .initialise(0, 0, |new| {
            assert!(new.hi.iter().chain(&*new.lo).all(|x| *x == 0));
            assert!(matches!((&new.m, &new.v), (MomentsMut::F32(m), MomentsMut::F32(v)) if m.iter().chain(&**v).all(|x| *x == 0.0)));
        })
        .unwrap();
    assert_eq!(store.entry(0).step, 0);
}

#[test]
fn a_panic_while_a_page_is_filled_changes_nothing() {
    let segment = Segment::new();
    let store = store(&segment);
    load_all(&store);
    let mut owner = store.claim(0).unwrap();
    for _ in 0..3 {
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            owner.update(1, 1, |_, mut new, _| {
                fill_part(&mut new, 1, 0, 500);
                std::panic::resume_unwind(Box::new("on purpose"));
            })
        }));
        assert!(panicked.is_err());
    }
    assert_eq!(store.entry(1).step, 0);
    owner
        .update(1, 1, |old, new, _| {
            assert!(is_at(&old, 0));
            fill(new, 1);
        })
        .unwrap();
    assert_eq!(store.entry(1).step, 1);
}

#[test]
fn contents_that_fail_to_come_are_not_published() {
    let segment = Segment::new();
    let store = store(&segment);
    let mut owner = store.claim(1).unwrap();
    for _ in 0..3 {
        let failed = owner.try_initialise(2, 0, |mut new| {
            fill_part(&mut new, 0, 0, 100);
            Err(StoreError::NoMoments)
        });
        assert!(matches!(failed, Err(StoreError::NoMoments)));
        assert_eq!(store.entry(2).step, NEVER);
    }
    owner
        .try_initialise(2, 0, |new| {
            fill(new, 0);
            Ok::<(), StoreError>(())
        })
        .unwrap();
    assert_eq!(store.entry(2).step, 0);
}

#[test]
fn several_updates_may_be_under_way() {
    let segment = Segment::new();
    let mut spec = spec(1, MomentFormat::None, GradientFormat::None);
    spec.spare_pages_per_rank = 2;
    let store = Store::create(&segment.name, &spec).unwrap();
    load_all(&store);
    let mut owner = store.claim(0).unwrap();
    let a = owner.begin(0, 1).unwrap().unwrap();
    let b = owner.begin(1, 1).unwrap().unwrap();
    assert!(matches!(owner.begin(1, 1), Err(StoreError::UnderWay(1))));
    assert!(matches!(owner.begin(2, 1), Err(StoreError::NoSpare(0))));
    assert_ne!(a.spare(), b.spare());
    for update in [&a, &b] {
        let at = store.page_ptrs(update.spare());
        assert!(at.m.is_null() && at.v.is_null());
        for i in 0..1024 {
            let (hi, lo) = split::split(weight(u64::from(update.page()) * 1024 + i, 1));
            // SAFETY: the spare of an update under way, 1024 parameters long, written by this thread alone.
            unsafe { (*at.hi.add(i as usize), *at.lo.add(i as usize)) = (hi, lo) };
        }
    }
    owner.publish(b).unwrap();
    owner.abandon(a).unwrap();
    assert_eq!((store.entry(0).step, store.entry(1).step), (0, 1));
    assert!(owner.begin(1, 1).unwrap().is_none());
    let mut out = vec![0.0; 1024];
    store.read_at_step(1024, Part::Weight, 1, &mut out).unwrap();
    assert!(out.iter().zip(1024..).all(|(x, p)| *x == weight(p, 1)));
}

#[test]
fn gradients_reach_the_page_they_belong_to() {
    for format in [GradientFormat::F32, GradientFormat::Bf16] {
        let segment = Segment::new();
        let store = Store::create(&segment.name, &spec(1, MomentFormat::None, format)).unwrap();
        load_all(&store);
        for parameter in 0..store.layout().span() {
            let value = (parameter % 256) as f32;
            let at = store.gradient_ptr(parameter);
            // SAFETY: the gradient of that parameter, aligned to its size, written by this thread alone, before updates.
            unsafe {
                match format {
                    GradientFormat::F32 => *at.cast::<f32>() = value,
                    _ => *at.cast::<u16>() = (value.to_bits() >> 16) as u16,
                }
            }
        }
        let mut owner = store.claim(0).unwrap();
        for page in owner.pages() {
            let update = |old: PageView<'_>, new: PageMut<'_>, gradients: Gradients<'_>| {
                let value = |i: usize| match gradients {
                    Gradients::None => f32::NAN,
                    Gradients::F32(x) => x[i],
                    Gradients::Bf16(x) => f32::from_bits(u32::from(x[i]) << 16),
                };
                assert!((0..old.hi.len()).all(|i| value(i) == ((old.params.start + i as u64) % 256) as f32));
                fill(new, 1);
            };
            owner.update(page, 1, update).unwrap();
        }
    }
}

#[test]
fn a_rank_is_claimed_once() {
    let segment = Segment::new();
    let store = store(&segment);
    let owner = store.claim(0).unwrap();
    assert_eq!((owner.rank(), owner.pages().collect::<Vec<_>>()), (0, vec![0, 1, 3, 4, 5]));
    assert!(matches!(store.claim(0), Err(StoreError::Claimed { rank: 0, .. })));
    let again = Store::attach(&segment.name).unwrap();
    assert!(matches!(again.claim(0), Err(StoreError::Claimed { rank: 0, .. })), "another mapping of this process");
    assert_eq!(again.claim(1).unwrap().pages().collect::<Vec<_>>(), [2, 6, 7, 8, 9]);
    drop(owner);
    drop(again.claim(0).unwrap());
    assert!(store.claim(0).is_ok());
    assert!(matches!(store.claim(2), Err(StoreError::Rank { rank: 2, world_size: 2 })));
}

#[test]
fn a_read_only_mapping_changes_nothing() {
    let segment = Segment::new();
    let made = store(&segment);
    let store = Store::attach_read_only(&segment.name).unwrap();
    store.populate(2).unwrap();
    assert!(matches!(store.claim(0), Err(StoreError::ReadOnly(_))));
    assert!(matches!(store.set_record(&store.record()), Err(StoreError::ReadOnly(_))));
    store.set_generation(5);
    assert_eq!((store.generation(), made.generation()), (0, 0));
    made.set_generation(6);
    assert_eq!(store.generation(), 6);
}

#[test]
fn the_record_and_the_words_are_seen_through_every_mapping() {
    let segment = Segment::new();
    let (a, b) = (store(&segment), Store::attach(&segment.name).unwrap());
    a.populate(3).unwrap();
    for step in 1..5 {
        let record =
            StepRecord { step, phase: StepPhase::GradientsComplete, values: std::array::from_fn(|i| step as f64 / (i as f64 + 3.0)) };
        a.set_record(&record).unwrap();
        assert_eq!(b.record(), record);
    }
    a.control()[4095].store(7, Ordering::Release);
    assert_eq!(b.control()[4095].load(Ordering::Acquire), 7);
    let ((to, len), (from, _)) = (a.exchange(), b.exchange());
    assert_eq!((len, to == from), (4096, false));
    // SAFETY: the last byte of the exchange area, of which this test is the only user.
    unsafe {
        *to.add(len - 1) = 42;
        assert_eq!(*from.add(len - 1), 42);
    }
}

#[test]
fn names_are_taken_once_and_given_up() {
    let segment = Segment::new();
    let made = store(&segment);
    let spec = made.layout().spec().clone();
    assert!(matches!(Store::create(&segment.name, &spec), Err(StoreError::Exists(_))));
    assert!(matches!(Store::create("a/b", &spec), Err(StoreError::Name { .. })));
    assert_eq!(Store::attach(segment.name.trim_start_matches('/')).unwrap().name(), segment.name);
    Store::unlink(&segment.name).unwrap();
    Store::unlink(&segment.name).unwrap();
    assert!(matches!(Store::attach(&segment.name), Err(StoreError::NotFound(_))));
    load_all(&made); // a mapping outlives the name
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_made() {
    let segment = Segment::new();
    let mut spec = spec(1, MomentFormat::F32, GradientFormat::F32);
    spec.blocks[0].tensors[0].shape = vec![1 << 42];
    spec.page_parameters = Some(1 << 28);
    let wanted = Layout::new(&spec).unwrap().bytes();
    match Store::create(&segment.name, &spec).unwrap_err() {
        StoreError::ShmFull { wanted: w, free, .. } | StoreError::RamFull { wanted: w, free, .. } => assert!(w == wanted && free < wanted),
        other => panic!("{other}"),
    }
    assert!(!segment.path().exists());
}

#[test]
fn a_reader_thread_sees_whole_pages_while_they_are_updated() {
    let segment = Segment::new();
    let store = store(&segment);
    load_all(&store);
    let done = AtomicBool::new(false);
    // Ends the writers however the reader ends.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    std::thread::scope(|scope| {
        let reader = Done(&done);
        for rank in 0..2 {
            let (store, done) = (&store, &done);
            scope.spawn(move || {
                let mut owner = store.claim(rank).unwrap();
                for step in 1.. {
                    owner.pages().for_each(|page| owner.update(page, step, |_, new, _| fill(new, step)).unwrap());
                    if done.load(Ordering::Acquire) {
                        break;
                    }
                }
            });
        }
        let (mut out, mut steps, mut reads) = (vec![0.0; 1024], std::collections::BTreeSet::new(), 0u64);
        let deadline = Instant::now() + Duration::from_secs(60);
        while steps.len() < 20 || reads < 5000 {
            assert!(Instant::now() < deadline, "{reads} reads saw {} steps only", steps.len());
            let first = reads % 2 * 1024;
            reads += 1;
            match store.read(first, Part::Weight, &mut out) {
                Ok(step) => {
                    assert!(out.iter().zip(first..).all(|(x, p)| *x == weight(p, step)), "the page of {first} is torn at step {step}");
                    steps.insert(step);
                }
                Err(StoreError::Busy(_)) => {}
                Err(e) => panic!("{e}"),
            }
        }
        drop(reader);
    });
}

#[test]
fn stores_are_shared_and_owners_sent_between_threads() {
    fn shared<T: Send + Sync>() {}
    fn sent<T: Send>() {}
    shared::<Store>();
    shared::<PagePtrs>();
    shared::<StoreError>();
    sent::<Owner<'_>>();
    sent::<Update>();
}

/// What docs/store-format.md says is enough to read a tensor by name, with nothing but the bytes.
#[test]
fn the_documented_layout_is_enough_to_read_a_tensor() {
    let segment = Segment::new();
    let store = store(&segment);
    load_all(&store);
    store.claim(0).unwrap().update(1, 1, |_, new, _| fill(new, 1)).unwrap();

    let bytes = std::fs::read(segment.path()).unwrap();
    let word = |at: u64| u64::from_le_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let half = |at: u64| u32::from(u16::from_le_bytes(bytes[at as usize..at as usize + 2].try_into().unwrap()));
    let header = |field: u64| word(field * 8);
    assert_eq!((&bytes[..8], header(1)), (&b"RAMTORCH"[..], 2));
    let manifest = &bytes[header(3) as usize..(header(3) + header(4)) as usize];
    let manifest: serde_json::Value = serde_json::from_slice(manifest).unwrap();
    let tensors = manifest["blocks"].as_array().unwrap().iter().flat_map(|b| b["tensors"].as_array().unwrap());
    let tensor = tensors.into_iter().find(|t| t["name"] == "k.weight").unwrap();
    let (start, len) = (tensor["start"].as_u64().unwrap(), tensor["parameters"].as_u64().unwrap());
    assert_eq!((&tensor["shape"], len), (&serde_json::json!([11, 33]), 363));
    for parameter in start..start + len {
        let (page, within) = (parameter / header(8), parameter % header(8));
        let entry = word(header(17) + page * 8);
        let (physical, step) = (entry & 0xf_ffff, entry >> 28);
        let at = header(24) + physical * header(11) + within * 2;
        let (hi, lo) = (half(at), half(at + header(25)));
        let master = f32::from_bits((hi << 16).wrapping_add(lo as u16 as i16 as i32 as u32));
        assert_eq!((step, master), (u64::from(page == 1), weight(parameter, step)));
    }
}

/// Threads update different pages of one owner at once; a page whose closure fails stays as it was, and its spare is free.
#[test]
fn a_shared_owner_updates_pages_from_several_threads() {
    let segment = Segment::new();
    let mut spec = spec(1, MomentFormat::None, GradientFormat::None);
    spec.spare_pages_per_rank = 3;
    let store = Store::create(&segment.name, &spec).unwrap();
    load_all(&store);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    for step in 1..=4 {
        let next = std::sync::atomic::AtomicU32::new(0);
        let pages: Vec<u32> = owner.pages().collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while let Some(page) = pages.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed) as usize) {
                        let failed = owner.update(*page, step, |_, new, _| {
                            new.hi.fill(7);
                            Err(StoreError::NoMoments)
                        });
                        assert!(matches!(failed, Err(StoreError::NoMoments)));
                        assert_eq!(store.entry(*page).step, step - 1);
                        let done = owner.update(*page, step, |old, new, _| {
                            assert!(is_at(&old, step - 1));
                            fill(new, step);
                            Ok::<(), StoreError>(())
                        });
                        assert!(done.unwrap());
                    }
                });
            }
        });
        assert!(pages.iter().all(|p| store.entry(*p).step == step));
        assert!(!owner.update(0, step, |_, _, _| Err(StoreError::NoMoments)).unwrap(), "it is there already");
    }
    assert!(matches!(store.claim(0), Err(StoreError::Claimed { .. })));
    drop(owner);
    store.claim(0).unwrap();
}

/// A page that is updated early leaves its old weights where its gradients were, before anyone can see its new state; one
/// whose spare a snapshot holds is left alone.
#[test]
fn old_weights_take_the_place_of_gradients() {
    let segment = Segment::new();
    let store = Store::create(&segment.name, &spec(1, MomentFormat::None, GradientFormat::Bf16)).unwrap();
    load_all(&store);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    let layout = store.layout();
    let kept = |page: u32| {
        let params = layout.page_range(page);
        // SAFETY: the place of the page's gradients, which nobody writes now.
        unsafe { std::slice::from_raw_parts(store.gradient_ptr(params.start).cast::<u16>(), (params.end - params.start) as usize) }
    };
    let update = |page: u32, step: u64| {
        owner.update_early(
            page,
            step,
            |old, new, gradients| {
                assert!(is_at(&old, step - 1));
                assert!(matches!(gradients, Gradients::Bf16(g) if g.iter().all(|g| *g == 7)));
                fill(new, step);
                Ok::<(), StoreError>(())
            },
            |old, place| {
                assert_eq!(store.entry(page).step, step - 1, "published before the old weights were kept");
                let GradientsMut::Bf16(place) = place else { panic!("{place:?}") };
                place.copy_from_slice(old.hi);
            },
        )
    };
    let gradients = |page: u32| {
        let params = layout.page_range(page);
        // SAFETY: as above; no slice of it is alive.
        unsafe { std::slice::from_raw_parts_mut(store.gradient_ptr(params.start).cast::<u16>(), (params.end - params.start) as usize) }
            .fill(7);
    };
    let pages: Vec<u32> = owner.pages().collect();
    for page in pages.iter().rev() {
        gradients(*page);
        assert_eq!(update(*page, 1).unwrap(), Early::Published);
        let old: Vec<u16> = layout.page_range(*page).map(|p| split::split(weight(p, 0)).0).collect();
        assert_eq!(kept(*page), old);
        assert_eq!(update(*page, 1).unwrap(), Early::Done);
        assert_eq!(kept(*page), old, "nothing is written for a page that is there");
    }
    let failed = owner.update_early(0, 2, |_, _, _| Err(StoreError::NoMoments), |_, _| panic!("there is nothing to keep"));
    assert!(matches!(failed, Err(StoreError::NoMoments)));
    assert_eq!(store.entry(0).step, 1);
    let snapshot = owner.snapshot(1).unwrap();
    gradients(1);
    assert_eq!(update(1, 2).unwrap(), Early::Published, "the spare holds no state of step 1");
    gradients(0);
    assert_eq!(update(0, 2).unwrap(), Early::Pinned, "now it does");
    assert!(kept(0).iter().all(|g| *g == 7));
    drop(snapshot);
    assert_eq!(update(0, 2).unwrap(), Early::Published);
}
