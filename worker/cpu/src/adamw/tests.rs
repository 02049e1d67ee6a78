//! Every instruction set, alignment, length and format gives the bits of the definition.

use super::*;
use crate::CpuDevice;
use crate::pages::{Kept, Queue, on_device, update_pages, update_pages_recorded, write_back};
use proptest::prelude::*;
use ramtorch_device::trace::Recorder;
use ramtorch_device::{
    DevBuf, Device, DeviceGradients, DirectWeights, Dtype, GradientPiece, GradientReader, HeldPage, StagedPage, Stream, staged_rooms,
};
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, Part, SharedOwner, Store, StoreSpec, TensorSpec, split};
use std::sync::Arc;

const K: AdamwStep = AdamwStep {
    step: 7,
    beta1: 0.9,
    beta2: 0.95,
    one_minus_beta1: 0.1,
    one_minus_beta2: 0.05,
    step_size: 1.9e-3,
    root_scale: 1.8,
    eps: 1e-8,
    gradient_scale: 0.37,
    keep: 0.9997,
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 24
    }
    /// Finite, of any magnitude that arithmetic meets, now and then zero or subnormal.
    fn float(&mut self) -> f32 {
        let bits = self.next() as u32;
        match self.next() % 16 {
            0 => 0.0,
            1 => f32::from_bits(bits & 0x807f_ffff),
            _ => f32::from_bits((bits & 0x807f_ffff) | (100 + bits % 40) << 23),
        }
    }
}

/// A page in memory of its own, every array `shift` elements behind an aligned address.
#[derive(Clone)]
struct Page {
    first: u64,
    shift: usize,
    hi: Vec<u16>,
    lo: Vec<u16>,
    m: Vec<f32>,
    v: Vec<f32>,
    m16: Vec<u16>,
    v16: Vec<u16>,
    g: Vec<f32>,
    g16: Vec<u16>,
    runs: Vec<DecayRun>,
}

impl Page {
    fn random(seed: u64, first: u64, n: usize, shift: usize, run: usize) -> Page {
        let mut r = Random(seed);
        let len = n + shift;
        let p: Vec<(u16, u16)> = (0..len).map(|_| split::split(r.float())).collect();
        let m: Vec<f32> = (0..len).map(|_| r.float()).collect();
        let v: Vec<f32> = (0..len).map(|_| r.float().abs()).collect();
        let g: Vec<f32> = (0..len).map(|_| r.float()).collect();
        let narrow = |x: &[f32]| x.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<u16>>();
        let bounds: Vec<usize> = (0..n).step_by(run.max(1)).chain([n]).collect();
        let runs = bounds
            .windows(2)
            .enumerate()
            .map(|(i, w)| DecayRun { first: first + w[0] as u64, end: first + w[1] as u64, decay: i % 2 == 0 })
            .collect();
        Page {
            first,
            shift,
            hi: p.iter().map(|x| x.0).collect(),
            lo: p.iter().map(|x| x.1).collect(),
            m16: narrow(&m),
            v16: narrow(&v),
            g16: narrow(&g),
            m,
            v,
            g,
            runs,
        }
    }

    fn len(&self) -> usize {
        self.hi.len() - self.shift
    }

    /// The new page by the formula of `ramtorch_device`, one parameter after the other.
    fn expected(&self, k: &AdamwStep, narrow_moments: bool, narrow_gradients: bool) -> Page {
        let mut new = self.clone();
        let wide = |x: u16| f32::from_bits(u32::from(x) << 16);
        for run in &self.runs {
            for i in run.first..run.end {
                let at = (i - self.first) as usize + self.shift;
                let g = if narrow_gradients { wide(self.g16[at]) } else { self.g[at] } * k.gradient_scale;
                let (m, v) = if narrow_moments { (wide(self.m16[at]), wide(self.v16[at])) } else { (self.m[at], self.v[at]) };
                let m = k.beta1 * m + k.one_minus_beta1 * g;
                let v = k.beta2 * v + (k.one_minus_beta2 * g) * g;
                let keep = if run.decay { k.keep } else { 1.0 };
                let p = split::join(self.hi[at], self.lo[at]) * keep - k.step_size * (m / (v.sqrt() * k.root_scale + k.eps));
                (new.hi[at], new.lo[at]) = split::split(p);
                (new.m[at], new.v[at]) = (m, v);
                new.m16[at] = stochastic(m, random_bits(random_key(k.step, i), i as u32) as u16);
                new.v16[at] = stochastic(v, (random_bits(random_key(k.step, i), i as u32) >> 16) as u16);
            }
        }
        new
    }

    fn updated(&self, k: &AdamwStep, level: Level, streamed: bool, narrow_moments: bool, narrow_gradients: bool) -> Page {
        let (s, n) = (self.shift, self.len());
        let mut new = self.clone();
        let old = PageView {
            params: self.first..self.first + n as u64,
            hi: &self.hi[s..],
            lo: &self.lo[s..],
            m: if narrow_moments { MomentsRef::Bf16(&self.m16[s..]) } else { MomentsRef::F32(&self.m[s..]) },
            v: if narrow_moments { MomentsRef::Bf16(&self.v16[s..]) } else { MomentsRef::F32(&self.v[s..]) },
        };
        let page = PageMut {
            params: old.params.clone(),
            hi: &mut new.hi[s..],
            lo: &mut new.lo[s..],
            m: if narrow_moments { MomentsMut::Bf16(&mut new.m16[s..]) } else { MomentsMut::F32(&mut new.m[s..]) },
            v: if narrow_moments { MomentsMut::Bf16(&mut new.v16[s..]) } else { MomentsMut::F32(&mut new.v[s..]) },
        };
        let g = if narrow_gradients { Gradients::Bf16(&self.g16[s..]) } else { Gradients::F32(&self.g[s..]) };
        adamw_page_at(level, streamed, k, &self.runs, old, page, g).unwrap();
        new
    }

    fn same(&self, other: &Page, narrow_moments: bool) {
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(self.hi == other.hi && self.lo == other.lo, "weights differ");
        if narrow_moments {
            assert!(self.m16 == other.m16 && self.v16 == other.v16, "moments differ");
        } else {
            assert!(bits(&self.m) == bits(&other.m) && bits(&self.v) == bits(&other.v), "moments differ");
        }
    }
}

fn check(page: &Page, k: &AdamwStep) {
    for narrow_moments in [false, true] {
        for narrow_gradients in [false, true] {
            let want = page.expected(k, narrow_moments, narrow_gradients);
            for level in Level::all() {
                for streamed in [false, true] {
                    page.updated(k, level, streamed, narrow_moments, narrow_gradients).same(&want, narrow_moments);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn all_levels_lengths_and_alignments_give_the_bits_of_the_definition(
        seed: u64, first in 0u64..1 << 40, n in 0usize..2500, shift in 0usize..70, run in 1usize..2000, step in 1u64..1 << 23,
    ) {
        check(&Page::random(seed, first, n, shift, run), &AdamwStep { step, ..K });
    }

    #[test]
    fn squares_are_the_same_on_every_level_and_right(seed: u64, n in 0usize..3000) {
        let mut r = Random(seed);
        let x: Vec<u16> = (0..n).map(|_| (r.float().to_bits() >> 16) as u16).collect();
        let want: f64 = x.iter().map(|x| (x.widen() as f64).powi(2)).sum();
        let got = sum_of_squares_bf16(&x);
        prop_assert!((got - want).abs() <= 1e-12 * want, "{got} {want}");
        let wide: Vec<f32> = x.iter().map(|x| x.widen()).collect();
        prop_assert!((sum_of_squares(&wide) - want).abs() <= 1e-12 * want);
    }
}

/// More than one chunk, and tiles that end with it.
#[test]
fn long_pages_are_cut_without_a_trace() {
    check(&Page::random(3, 1 << 33, 3 * CHUNK + 777, 0, 5000), &K);
}

#[test]
fn one_parameter_follows_adamw() {
    let (lr, decay, mut p, mut m, mut v) = (0.1, 0.5, 1f64, 0f64, 0f64);
    let mut page = Page::random(1, 0, 1, 0, 1);
    (page.hi[0], page.lo[0], page.m[0], page.v[0]) = (split::split(1.0).0, split::split(1.0).1, 0.0, 0.0);
    for t in 1..=50 {
        let g = (t as f64 * 0.7).sin();
        let k = AdamwStep {
            step: t as u64,
            beta1: 0.9,
            beta2: 0.99,
            one_minus_beta1: 0.1,
            one_minus_beta2: 0.01,
            step_size: (lr / (1.0 - 0.9f64.powi(t))) as f32,
            root_scale: (1.0 / (1.0 - 0.99f64.powi(t)).sqrt()) as f32,
            eps: 1e-8,
            gradient_scale: 1.0,
            keep: (1.0 - lr * decay) as f32,
        };
        page.g[0] = g as f32;
        page = page.updated(&k, Level::best(), false, false, false);
        p *= 1.0 - lr * decay;
        m = 0.9 * m + 0.1 * g;
        v = 0.99 * v + 0.01 * g * g;
        p -= lr / (1.0 - 0.9f64.powi(t)) * m / (v.sqrt() / (1.0 - 0.99f64.powi(t)).sqrt() + 1e-8);
        let got = split::join(page.hi[0], page.lo[0]);
        assert!((got as f64 - p).abs() < 1e-5, "step {t}: {got} {p}");
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let page = Page::random(1, 0, 100, 0, 100);
    let (mut hi, mut lo, mut m, mut v) = (page.hi.clone(), page.lo.clone(), page.m.clone(), page.v.clone());
    let mut run = |runs: &[DecayRun], g: Gradients, short: usize| {
        let old = PageView { params: 0..100, hi: &page.hi, lo: &page.lo, m: MomentsRef::F32(&page.m), v: MomentsRef::F32(&page.v) };
        let new = PageMut { params: 0..100, hi: &mut hi[short..], lo: &mut lo, m: MomentsMut::F32(&mut m), v: MomentsMut::F32(&mut v) };
        adamw_page(&K, runs, old, new, g).is_ok()
    };
    assert!(run(&page.runs, Gradients::F32(&page.g), 0));
    assert!(!run(&page.runs, Gradients::None, 0));
    assert!(!run(&page.runs, Gradients::F32(&page.g[1..]), 0));
    assert!(!run(&page.runs, Gradients::F32(&page.g), 1));
    assert!(!run(&[DecayRun { first: 0, end: 99, decay: true }], Gradients::F32(&page.g), 0));
}

fn store(tag: &str, moments: MomentFormat, gradients: GradientFormat, spares: u32) -> Arc<Store> {
    let tensor = |name: &str, shape: &[u64], decay| TensorSpec { name: name.into(), shape: shape.to_vec(), joined: false, decay };
    let spec = StoreSpec {
        blocks: vec![
            BlockSpec { name: "a".into(), tensors: vec![tensor("a.w", &[101, 77], true), tensor("a.b", &[77], false)] },
            BlockSpec { name: "b".into(), tensors: vec![tensor("b.w", &[90, 133], true), tensor("b.n", &[5], false)] },
        ],
        world_size: 1,
        moments,
        gradients,
        page_parameters: Some(1024),
        spare_pages_per_rank: spares,
        exchange_bytes: 4096,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let name = format!("/ramtorch-adamw-{tag}-{}", std::process::id());
    let _ = Store::unlink(&name);
    let store = Store::create(&name, &spec).unwrap();
    Store::unlink(&name).unwrap();
    let mut owner = store.claim(0).unwrap();
    for page in owner.pages().collect::<Vec<_>>() {
        owner
            .initialise(page, 0, |new| {
                for (i, p) in new.params.clone().enumerate() {
                    (new.hi[i], new.lo[i]) = split::split(Random(p).float());
                }
            })
            .unwrap();
    }
    drop(owner);
    Arc::new(store)
}

fn put(store: &Arc<Store>, step: u64) {
    let values: Vec<f32> = (0..store.layout().span()).map(|p| Random(p ^ step << 32).float()).collect();
    crate::parameters::put_gradients(&values, store, 0, false);
}

/// Brings the state of `pages` into `room` on the device.
fn stage(device: &CpuDevice, store: &Arc<Store>, pages: &[u32], room: DevBuf) -> Vec<StagedPage> {
    let mut parts = staged_rooms(store.layout(), room);
    let staged = pages.iter().map(|page| StagedPage::load(device, store, *page, || parts.next()).unwrap()).collect();
    device.synchronize(Stream::CopyIn).unwrap();
    staged
}

fn kept<'a>(stays: &'a Option<DeviceGradients>, reader: &'a mut Box<dyn GradientReader>) -> Option<Kept<'a>> {
    stays.as_ref().map(|gradients| Kept { gradients, reader: reader.as_mut() })
}

/// Whoever updates a page, its bits are the same; pages that are at the step already are left alone.
#[test]
fn pages_shared_with_a_device_have_the_bits_of_the_cpu() {
    for moments in [MomentFormat::F32, MomentFormat::Bf16] {
        for gradients in [GradientFormat::F32, GradientFormat::Bf16] {
            let mut images = Vec::new();
            for (who, spares, on_device_only) in [
                ("cpu", 1, false),
                ("device", 1, false),
                ("device", 3, false),
                ("both", 1, false),
                ("both", 2, false),
                ("both", 3, false),
                ("staged", 1, false),
                ("staged", 3, false),
                ("cpu", 1, true),
                ("device", 3, true),
                ("both", 3, true),
                ("staged", 3, true),
                ("held", 1, false),
                ("held", 3, false),
                ("held", 3, true),
            ] {
                // Where gradients are on the device alone: every other block's in other memory.
                let format = if on_device_only { GradientFormat::None } else { gradients };
                let store = store(&format!("{moments:?}{gradients:?}{who}{spares}{on_device_only}"), moments, format, spares);
                let elsewhere = ["even", "odd"].map(|x| self::store(&format!("{x}{moments:?}{gradients:?}{who}"), moments, gradients, 1));
                let of_block = |(b, block): (usize, &ramtorch_store::Block)| {
                    let buf = DevBuf { ptr: elsewhere[b % 2].gradient_ptr(block.start) as u64, bytes: block.len * gradients.bytes() };
                    GradientPiece { first: block.start, end: block.start + block.len, buf }
                };
                let pieces = store.layout().blocks().iter().enumerate().map(of_block).collect();
                let stays = Some(DeviceGradients::new(gradients, pieces)).filter(|_| on_device_only);
                let mut device = CpuDevice::open(0, Dtype::F32, 1, 4 << 20).unwrap();
                let mut updater = device.page_updater(&store).unwrap().unwrap();
                let room = device.alloc(2 << 20, "staged pages").unwrap();
                let mut reader = device.gradient_reader(gradients, 1024).unwrap();
                let mut held: Vec<HeldPage> = (0..store.layout().page_count())
                    .filter(|p| p % 4 < 2)
                    .map(|page| {
                        let room = device.alloc(HeldPage::bytes(store.layout().spec(), 1024), "held page").unwrap();
                        HeldPage::new(store.layout(), page, room)
                    })
                    .collect();
                // Weights of the first half are delivered, in two pieces of odd lengths.
                let cut = [store.layout().span() / 5 + 1, store.layout().span() / 2];
                let weights = [0..cut[0], cut[0]..cut[1]].map(|r| (r.clone(), device.alloc((r.end - r.start) * 2, "weights").unwrap()));
                let direct = Arc::new(DirectWeights::new(store.layout(), weights.to_vec()));
                updater.deliver_to(direct.clone());
                let owner = SharedOwner::new(store.claim(0).unwrap());
                let all = u64::from(store.layout().page_count());
                for step in 1..=5 {
                    if on_device_only {
                        elsewhere.iter().for_each(|s| put(s, step));
                    } else {
                        put(&store, step);
                    }
                    let k = AdamwStep { step, ..K };
                    if step == 3 && on_device_only {
                        let runs = DecayRun::of(store.layout(), &store.layout().page_range(4));
                        let update = |g: Gradients| owner.update(4, 3, |old, new, _| adamw_page(&k, &runs, old, new, g)).unwrap();
                        assert!(crate::read_gradients(&elsewhere[0], 4, 0, update));
                    } else if step == 3 {
                        // One page was updated before a crash.
                        let runs = DecayRun::of(store.layout(), &store.layout().page_range(4));
                        assert!(owner.update(4, 3, |old, new, g| adamw_page(&k, &runs, old, new, g)).unwrap());
                    }
                    let pages = all - u64::from(step == 3);
                    let updater = updater.as_mut();
                    match who {
                        "cpu" => {
                            let done = update_pages_recorded(
                                &owner,
                                &k,
                                None,
                                Vec::new(),
                                (&mut [], None),
                                kept(&stays, &mut reader),
                                &Recorder::default(),
                            )
                            .unwrap();
                            assert_eq!(done.cpu, pages);
                        }
                        "device" => {
                            let depth = updater.depth().min(spares as usize);
                            assert_eq!(
                                on_device(&owner, &k, &Queue::new(&owner, Vec::new(), &[]), updater, stays.as_ref(), depth).unwrap(),
                                pages
                            );
                        }
                        "staged" => {
                            let pages: Vec<u32> = owner.pages().filter(|p| p % 2 == 1).collect();
                            let staged = stage(&device, &store, &pages, room);
                            let done = update_pages_recorded(
                                &owner,
                                &k,
                                Some(updater),
                                staged,
                                (&mut [], None),
                                kept(&stays, &mut reader),
                                &Recorder::default(),
                            )
                            .unwrap();
                            assert_eq!(done.cpu + done.device, all - u64::from(step == 3));
                        }
                        "held" => {
                            let kept = kept(&stays, &mut reader);
                            let done =
                                update_pages_recorded(&owner, &k, Some(updater), Vec::new(), (&mut held, None), kept, &Recorder::default())
                                    .unwrap();
                            assert_eq!(done.cpu + done.device, pages);
                            // Everybody else still sees those held as they were.
                            let behind = held.iter().filter(|h| h.at == Some(step)).map(|h| store.entry(h.page).step).collect::<Vec<_>>();
                            assert!(behind.len() + usize::from(step == 3) == held.len() && behind.iter().all(|s| s + 1 == step));
                            write_back(&owner, step, updater, &held, false).unwrap();
                        }
                        _ => {
                            let done = update_pages_recorded(
                                &owner,
                                &k,
                                Some(updater),
                                Vec::new(),
                                (&mut [], None),
                                kept(&stays, &mut reader),
                                &Recorder::default(),
                            )
                            .unwrap();
                            assert_eq!(done.cpu + done.device, pages);
                            assert!(spares > 1 || done.device == 0, "{done:?}");
                        }
                    }
                    assert!(owner.pages().all(|p| store.entry(p).step == step));
                    let delivered = owner.pages().filter(|p| direct.delivered(*p, step)).count();
                    assert!(if who == "cpu" { delivered == 0 } else { delivered > 0 || who != "device" }, "{who}: {delivered}");
                    for page in owner.pages().filter(|p| direct.delivered(*p, step)) {
                        for (range, buf) in direct.pieces(store.layout().page_range(page)).unwrap() {
                            let mut bytes = vec![0u8; buf.bytes as usize];
                            device.download(Stream::Compute, buf, &mut bytes).unwrap();
                            let mut want = vec![0f32; (range.end - range.start) as usize];
                            store.read_at_step(range.start, Part::Weight, step, &mut want).unwrap();
                            for (b, w) in bytes.chunks_exact(2).zip(&want) {
                                let (hi, _) = split::split(*w);
                                assert_eq!(u16::from_le_bytes([b[0], b[1]]), hi);
                            }
                        }
                    }
                    assert_eq!(
                        update_pages_recorded(
                            &owner,
                            &k,
                            None,
                            Vec::new(),
                            (&mut [], None),
                            kept(&stays, &mut reader),
                            &Recorder::default()
                        )
                        .unwrap()
                        .cpu,
                        0
                    );
                }
                let mut image = Vec::new();
                for part in [ramtorch_store::Part::Weight, ramtorch_store::Part::Moment1, ramtorch_store::Part::Moment2] {
                    let mut out = vec![0f32; store.layout().span() as usize];
                    store.read_at_step(0, part, 5, &mut out).unwrap();
                    image.extend(out.into_iter().map(f32::to_bits));
                }
                images.push(image);
            }
            assert!(images.windows(2).all(|w| w[0] == w[1]), "{moments:?} {gradients:?}");
        }
    }
}

/// The three numbers of every parameter at a step.
fn image(store: &Store, step: u64) -> Vec<Vec<u32>> {
    let parts = [ramtorch_store::Part::Weight, ramtorch_store::Part::Moment1, ramtorch_store::Part::Moment2];
    let of = |part| {
        let mut out = vec![0f32; store.layout().span() as usize];
        store.read_at_step(0, part, step, &mut out).unwrap();
        out.into_iter().map(f32::to_bits).collect()
    };
    parts.map(of).to_vec()
}

/// The CPU and a device go on for two steps while the state of the one before is read, page by page and slowly: it is what it
/// was, and what comes of the updates is what comes without a reader.
#[test]
fn a_snapshot_changes_nothing_and_is_not_changed() {
    let mut ends = Vec::new();
    for (who, spares, read) in [("cpu", 1, false), ("cpu", 1, true), ("device", 1, true), ("both", 2, true), ("both", 3, true)] {
        let store = store(&format!("snapshot{who}{spares}{read}"), MomentFormat::F32, GradientFormat::Bf16, spares);
        let mut device = CpuDevice::open(0, Dtype::F32, 1, 1 << 20).unwrap();
        let mut updater = device.page_updater(&store).unwrap().unwrap();
        let owner = SharedOwner::new(store.claim(0).unwrap());
        for first in (1..=7).step_by(2) {
            let before = image(&store, first - 1);
            std::thread::scope(|scope| {
                let mut snapshot = owner.snapshot(first - 1).unwrap();
                let (store, updater, owner, before) = (&store, updater.as_mut(), &owner, &before);
                scope.spawn(move || {
                    for page in if read { snapshot.pages() } else { Vec::new() } {
                        std::thread::sleep(std::time::Duration::from_micros(200));
                        let range = store.layout().page_range(page);
                        let mut out = vec![0f32; (range.end - range.start) as usize];
                        for (i, part) in [ramtorch_store::Part::Weight, ramtorch_store::Part::Moment1, ramtorch_store::Part::Moment2]
                            .into_iter()
                            .enumerate()
                        {
                            snapshot.read(range.start, part, &mut out).unwrap();
                            let was = &before[i][range.start as usize..range.end as usize];
                            assert!(out.iter().zip(was).all(|(a, b)| a.to_bits() == *b), "page {page}");
                        }
                        snapshot.release(page);
                    }
                });
                for step in first..=first + 1 {
                    put(store, step);
                    let k = AdamwStep { step, ..K };
                    match who {
                        "cpu" => drop(update_pages(owner, &k, None).unwrap()),
                        "device" => drop(on_device(owner, &k, &Queue::new(owner, Vec::new(), &[]), updater, None, 1).unwrap()),
                        _ => drop(update_pages(owner, &k, Some(updater)).unwrap()),
                    }
                }
            });
        }
        assert!(!read || owner.waited() > std::time::Duration::ZERO, "{who}: with so few spares somebody waits for a slow reader");
        ends.push(image(&store, 8));
    }
    assert!(ends.windows(2).all(|w| w[0] == w[1]));
}
