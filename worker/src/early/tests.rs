use super::*;
use ramtorch_device::{Device, Stream};
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};

/// Blocks of these lengths, pages of 1024 parameters.
fn layout(blocks: &[u64]) -> Layout {
    Layout::new(&spec(blocks)).unwrap()
}

fn spec(blocks: &[u64]) -> StoreSpec {
    let block = |(i, len): (usize, &u64)| BlockSpec {
        name: format!("b{i}"),
        tensors: vec![TensorSpec { name: format!("w{i}"), shape: vec![*len], joined: false, decay: true }],
    };
    StoreSpec {
        blocks: blocks.iter().enumerate().map(block).collect(),
        world_size: 1,
        moments: MomentFormat::F32,
        gradients: GradientFormat::F32,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: Collectives::kept_bytes(100),
        log: GradientLog::NONE,
        metadata: String::new(),
    }
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

/// A rank alone with pages of `blocks` at step 0, gradients of all of them whole, and what is told of them.
fn whole(tag: &str, blocks: &[u64]) -> (Arc<Store>, Collectives) {
    let name = format!("/ramtorch-early-pages-{tag}-{}", std::process::id());
    let store = Arc::new(Store::create(&name, &spec(blocks)).unwrap());
    Store::unlink(&name).unwrap();
    let mut owner = store.claim(0).unwrap();
    for page in owner.pages() {
        owner.initialise(page, 0, |new| new.hi.fill(0x3f80)).unwrap();
    }
    drop(owner);
    let comm = Collectives::new(store.clone(), 0, 1, 1);
    comm.kept().iter().for_each(|x| x.store(1f64.to_bits(), Ordering::Relaxed));
    comm.tell_progress(10 + blocks.len() as u64);
    (store, comm)
}

fn steps_of(store: &Store) -> Vec<u64> {
    (0..store.layout().page_count()).map(|p| store.entry(p).step).collect()
}

fn job() -> EarlyJob {
    EarlyJob { numbers: StepNumbers { step: 1, lr: 1e-3, gradient_scale: 1.0, ..Default::default() }, base: 10, gate: Arc::default() }
}

#[test]
fn gradients_that_are_not_finite_are_never_made_weights_of() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (recorder, optimizer) = (Recorder::default(), OptimizerSpec::default());
    for by_host in [true, false] {
        let (store, comm) = whole(&format!("finite-{by_host}"), &[1024, 2048, 1024]);
        let early = EarlyPages::new(
            (&store, &comm, &recorder),
            &optimizer,
            &pool,
            &places(store.layout()),
            0..store.layout().page_count(),
            &[3],
            by_host,
        );
        // Page 3 is the device's, pages 1 and 2 come next, and one of them is bad.
        if by_host {
            comm.kept()[2].store(f64::NAN.to_bits(), Ordering::Relaxed);
        } else {
            let mut dev = ramtorch_cpu::CpuDevice::open(0, ramtorch_device::Dtype::F32, 1, 1 << 10).unwrap();
            let bad = dev.alloc(4, "a gradient of page 2").unwrap();
            dev.upload(Stream::CopyOut, bad, &f32::INFINITY.to_le_bytes()).unwrap();
            dev.store_gradients(Stream::CopyOut, bad.slice(0, 4), &store, 2 * 1024 + 77, 1, false).unwrap();
            dev.synchronize(Stream::CopyOut).unwrap();
        }
        let owner = SharedOwner::new(store.claim(0).unwrap());
        let job = job();
        assert_eq!(early.run(&owner, &job).unwrap().pages, 1);
        assert_eq!(steps_of(&store), [0, 1, 0, 0], "by the host: {by_host}");
        let record = store.record();
        assert_eq!((record.step, record.phase), (1, StepPhase::Updating), "before the first page");
        assert_eq!(Ahead::find(&store, 1).pages, [false, true, false, false]);
    }
}

#[test]
fn nothing_is_begun_when_the_gate_is_closed_or_gradients_are_on_their_way() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (recorder, optimizer) = (Recorder::default(), OptimizerSpec::default());
    let (store, comm) = whole("gate", &[1024, 1024]);
    let parts = (store.as_ref(), &comm, &recorder);
    let early = EarlyPages::new(parts, &optimizer, &pool, &places(store.layout()), 0..2, &[], true);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    let closed = job();
    closed.gate.close();
    assert_eq!(early.run(&owner, &closed).unwrap().pages, 0);
    assert_eq!(store.record().phase, StepPhase::Loading, "and nothing is announced");
    // One block has come: the page of the other waits until it is over.
    let waits = EarlyJob { base: 11, ..job() };
    std::thread::scope(|scope| {
        let run = scope.spawn(|| early.run(&owner, &waits).unwrap());
        while store.entry(1).step != 1 {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        waits.gate.close();
        assert_eq!(run.join().unwrap().pages, 1);
    });
    assert_eq!(steps_of(&store), [0, 1]);
    // The rank has given up: whoever waits ends, and leaves the reason to others.
    comm.abort();
    assert_eq!(early.run(&owner, &job()).unwrap().pages, 0);
}
