//! Pages updated by the GPU, by the CPU, and by both at once have the same bits.

use crate::Test;
use half::bf16;
use ramtorch_cpu::{CpuDevice, Kept, PagesUpdated, update_pages, update_pages_recorded, write_back};
use ramtorch_cuda::CudaDevice;
use ramtorch_device::*;
use ramtorch_store::*;
use std::sync::Arc;

pub const TESTS: &[Test] = &[
    ("optimizer_pages_have_the_bits_of_the_cpu", small_pages),
    ("optimizer_pages_larger_than_the_staging", large_pages),
    ("optimizer_gradients_that_stay_on_the_device", kept_small),
    ("optimizer_gradients_that_stay_of_large_pages", kept_large),
    ("optimizer_reader_keeps_ahead", reader),
    ("optimizer_staging_is_counted", staging),
    ("optimizer_stops_between_pages", stopped),
];

pub fn k(step: u64) -> AdamwStep {
    AdamwStep {
        step,
        beta1: 0.9,
        beta2: 0.95,
        one_minus_beta1: 0.1,
        one_minus_beta2: 0.05,
        step_size: 1.9e-3,
        root_scale: 1.8,
        eps: 1e-8,
        gradient_scale: 0.37,
        keep: 0.9997,
    }
}

fn mixed(i: u64) -> u64 {
    let x = (i ^ (i >> 31)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (x ^ (x >> 29)).wrapping_mul(0x94D0_49BB_1331_11EB) >> 16
}

/// Finite numbers of any magnitude that arithmetic meets, now and then zero or subnormal.
fn number(i: u64) -> f32 {
    let (bits, kind) = (mixed(i) as u32, mixed(i.wrapping_add(1 << 40)));
    match kind % 16 {
        0 => 0.0,
        1 => f32::from_bits(bits & 0x807f_ffff),
        _ => f32::from_bits((bits & 0x807f_ffff) | (100 + (kind >> 8) as u32 % 40) << 23),
    }
}

/// A store with tensors of odd sizes that decay and do not, filled; moments are zero before the first step.
pub fn store(tag: &str, rows: u64, page: u32, moments: MomentFormat, gradients: GradientFormat) -> Arc<Store> {
    let tensor = |name: &str, shape: &[u64], joined, decay| TensorSpec { name: name.into(), shape: shape.to_vec(), joined, decay };
    let spec = StoreSpec {
        blocks: vec![
            BlockSpec {
                name: "a".into(),
                tensors: vec![
                    tensor("a.w", &[rows, 301], false, true),
                    tensor("a.b", &[33], true, false),
                    tensor("a.u", &[rows, 64], false, true),
                    tensor("a.n", &[1001], false, false),
                ],
            },
            BlockSpec { name: "b".into(), tensors: vec![tensor("b.w", &[rows, 77], false, true), tensor("b.n", &[5], true, false)] },
        ],
        world_size: 1,
        moments,
        gradients,
        page_parameters: Some(page),
        spare_pages_per_rank: 3,
        exchange_bytes: 4096,
        log: GradientLog::NONE,
        metadata: String::new(),
    };
    let tag: String = tag.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let name = format!("/ramtorch-test-optimizer-{}-{tag}", std::process::id());
    let _ = Store::unlink(&name);
    let s = Store::create(&name, &spec).unwrap();
    Store::unlink(&name).unwrap();
    let mut owner = s.claim(0).unwrap();
    for page in owner.pages().collect::<Vec<_>>() {
        owner
            .initialise(page, 0, |new| {
                for (i, p) in new.params.clone().enumerate() {
                    (new.hi[i], new.lo[i]) = split::split(number(p));
                }
            })
            .unwrap();
    }
    drop(owner);
    Arc::new(s)
}

pub fn put_gradients(s: &Store, step: u64) {
    put(s, |i| number(i ^ step << 45));
}

pub fn put(s: &Store, value: impl Fn(u64) -> f32) {
    for i in 0..s.layout().span() {
        let (x, p) = (value(i), s.gradient_ptr(i));
        // SAFETY: the gradient of that parameter, aligned to its size; no page is being updated.
        unsafe {
            match s.layout().spec().gradients {
                GradientFormat::F32 => p.cast::<f32>().write(x),
                _ => p.cast::<u16>().write(bf16::from_f32(x).to_bits()),
            }
        }
    }
}

/// Every page through the device, as many in hand as it wants; those that `staged` has were brought before.
pub fn by_device(owner: &SharedOwner<'_>, k: &AdamwStep, updater: &mut dyn PageUpdater, staged: &[StagedPage]) -> u64 {
    by_device_from(owner, k, updater, staged, None, false)
}

/// As [`by_device`]; `kept`: gradients are on the device. `ahead`: those that were brought are updated before the first page goes out.
fn by_device_from(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    updater: &mut dyn PageUpdater,
    staged: &[StagedPage],
    kept: Option<&DeviceGradients>,
    ahead: bool,
) -> u64 {
    let layout = owner.store().layout();
    let mut in_hand = std::collections::VecDeque::new();
    if let Some(kept) = kept.filter(|_| ahead) {
        for s in staged {
            let params = layout.page_range(s.page);
            let pieces = kept.of(&params);
            updater.prepare(k, s, &DecayRun::of(layout, &params), PageGradients::Device(kept.format(), &pieces)).unwrap();
        }
    }
    for page in owner.pages() {
        if in_hand.len() == updater.depth() {
            updater.finish().unwrap();
            owner.publish(in_hand.pop_front().unwrap()).unwrap();
        }
        let update = owner.begin(page, k.step).unwrap().unwrap();
        let there = staged.iter().find(|s| s.page == page);
        let params = layout.page_range(page);
        let pieces = kept.map(|kept| kept.of(&params)).unwrap_or_default();
        let gradients = kept.map_or(PageGradients::Segment, |kept| PageGradients::Device(kept.format(), &pieces));
        match there.filter(|_| ahead && kept.is_some()) {
            Some(s) => updater.submit_prepared(k, &update, s).unwrap(),
            None => {
                let state = there.map_or([].as_slice(), |s| &s.state);
                updater.submit(k, &update, &DecayRun::of(layout, &params), state, gradients).unwrap();
            }
        }
        in_hand.push_back(update);
    }
    for update in in_hand {
        updater.finish().unwrap();
        owner.publish(update).unwrap();
    }
    layout.page_count().into()
}

/// The three numbers of every parameter, as bits.
fn image(s: &Store, step: u64) -> Vec<Vec<u32>> {
    [Part::Weight, Part::Moment1, Part::Moment2]
        .into_iter()
        .map(|part| {
            let mut out = vec![0f32; s.layout().span() as usize];
            s.read_at_step(0, part, step, &mut out).unwrap();
            out.into_iter().map(f32::to_bits).collect()
        })
        .collect()
}

/// The state of every so many-th page, on the device.
fn stage(d: &CudaDevice, s: &Arc<Store>, room: DevBuf, every: usize) -> Vec<StagedPage> {
    let mut parts = staged_rooms(s.layout(), room);
    let pages = (0..s.layout().page_count()).step_by(every);
    let staged = pages.map(|page| StagedPage::load(d, s, page, || parts.next()).unwrap()).collect();
    d.synchronize(Stream::CopyIn).unwrap();
    staged
}

fn agree(rows: u64, page: u32, steps: u64) {
    for moments in [MomentFormat::F32, MomentFormat::Bf16] {
        for gradients in [GradientFormat::F32, GradientFormat::Bf16] {
            let mut want: Option<Vec<Vec<u32>>> = None;
            for who in ["cpu", "gpu", "both", "gpu, staged", "both, staged", "held"] {
                let s = store(&format!("{who}-{moments:?}-{gradients:?}"), rows, page, moments, gradients);
                let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
                let mut updater = d.page_updater(&s).unwrap().unwrap();
                let room = d.alloc(512 << 20, "staged pages").unwrap();
                // Weights of the first three quarters are delivered, in two pieces of odd lengths.
                let cut = [s.layout().span() / 3 + 1, s.layout().span() / 4 * 3];
                let places = [0..cut[0], cut[0]..cut[1]].map(|r| (r.clone(), d.alloc((r.end - r.start) * 2, "weights").unwrap())).to_vec();
                let direct = Arc::new(DirectWeights::new(s.layout(), places.clone()));
                updater.deliver_to(direct.clone());
                let mut held: Vec<HeldPage> = (0..s.layout().page_count())
                    .step_by(2)
                    .filter(|_| who == "held")
                    .map(|p| HeldPage::new(s.layout(), p, d.alloc(HeldPage::bytes(s.layout().spec(), page.into()), "held page").unwrap()))
                    .collect();
                let owner = SharedOwner::new(s.claim(0).unwrap());
                let mut total = PagesUpdated::default();
                for step in 1..=steps {
                    put_gradients(&s, step);
                    let done = match who {
                        "cpu" => update_pages(&owner, &k(step), None).unwrap(),
                        "gpu, staged" => {
                            let staged = stage(&d, &s, room, 1);
                            PagesUpdated { device: by_device(&owner, &k(step), updater.as_mut(), &staged), ..Default::default() }
                        }
                        "both, staged" => {
                            let staged = stage(&d, &s, room, 3);
                            update_pages_recorded(
                                &owner,
                                &k(step),
                                Some(updater.as_mut()),
                                staged,
                                (&mut [], None),
                                None,
                                &Default::default(),
                            )
                            .unwrap()
                        }
                        "held" => {
                            let updater = updater.as_mut();
                            let done = update_pages_recorded(
                                &owner,
                                &k(step),
                                Some(updater),
                                Vec::new(),
                                (&mut held, None),
                                None,
                                &Default::default(),
                            )
                            .unwrap();
                            assert!(held.iter().all(|h| s.entry(h.page).step + 1 == step && h.at == Some(step)));
                            write_back(&owner, step, updater, &held, false).unwrap();
                            done
                        }
                        "gpu" => PagesUpdated { device: by_device(&owner, &k(step), updater.as_mut(), &[]), ..Default::default() },
                        _ => update_pages(&owner, &k(step), Some(updater.as_mut())).unwrap(),
                    };
                    assert_eq!(done.cpu + done.device, u64::from(s.layout().page_count()));
                    total.cpu += done.cpu;
                    total.device += done.device;
                }
                println!(
                    "    {moments:?} moments, {gradients:?} gradients, {who}: {} pages by the CPU, {} by the GPU",
                    total.cpu, total.device
                );
                let got = image(&s, steps);
                if who.starts_with("gpu") {
                    let mut weights = Vec::new();
                    for (range, buf) in &places {
                        let mut bytes = vec![0u8; (range.end - range.start) as usize * 2];
                        d.download(Stream::Compute, buf.slice(0, bytes.len() as u64), &mut bytes).unwrap();
                        weights.extend(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
                    }
                    let pages = (0..s.layout().page_count()).filter(|p| direct.delivered(*p, steps));
                    let params: Vec<u64> = pages.flat_map(|p| s.layout().page_range(p)).collect();
                    assert!(params.len() as u64 > cut[1] / 2);
                    for p in params {
                        let page = s.layout().pages_of(p..p + 1).start;
                        let at = (p - s.layout().page_range(page).start) as usize;
                        // SAFETY: the weight of that parameter; no page is being updated.
                        let want = unsafe { *s.page_ptrs(s.entry(page).physical).hi.add(at) };
                        assert_eq!(weights[p as usize], want, "{who}: weight {p}");
                    }
                }
                match &want {
                    None => want = Some(got),
                    Some(want) => {
                        for (part, (g, w)) in got.iter().zip(want).enumerate() {
                            let first = g.iter().zip(w).position(|(a, b)| a != b);
                            assert!(
                                first.is_none(),
                                "{who}, part {part}: parameter {} is {:#010x}, on the CPU {:#010x}",
                                first.unwrap_or(0),
                                g[first.unwrap_or(0)],
                                w[first.unwrap_or(0)]
                            );
                        }
                    }
                }
            }
        }
    }
}

fn small_pages() {
    agree(211, 4096, 5);
}

fn large_pages() {
    // Three parts and a piece a page, and a last page that is shorter.
    agree(20_011, 3 * (2 << 20) + 5 * 1024, 2);
}

/// Gradients of `step` in memory of the device, a buffer a block; whole when this returns.
fn put_on_device(d: &CudaDevice, kept: &DeviceGradients, span: u64, step: u64) {
    for piece in kept.of(&(0..span)) {
        let bytes: Vec<u8> = (piece.first..piece.end)
            .flat_map(|i| match (kept.format(), number(i ^ step << 45)) {
                (GradientFormat::F32, x) => x.to_le_bytes().to_vec(),
                (_, x) => bf16::from_f32(x).to_le_bytes().to_vec(),
            })
            .collect();
        for (i, part) in bytes.chunks(1 << 20).enumerate() {
            d.upload(Stream::Compute, piece.buf.slice((i << 20) as u64, part.len() as u64), part).unwrap();
        }
    }
    d.synchronize(Stream::Compute).unwrap();
}

/// Room for a store's gradients on the device: a buffer a block, so that pages go on in another.
fn room_for_gradients(d: &mut CudaDevice, s: &Store, format: GradientFormat) -> DeviceGradients {
    let of_block = |b: &Block| {
        let buf = d.alloc(b.len * format.bytes(), "gradients").unwrap().slice(0, b.len * format.bytes());
        GradientPiece { first: b.start, end: b.start + b.len, buf }
    };
    DeviceGradients::new(format, s.layout().blocks().iter().map(of_block).collect())
}

/// Gradients on the device alone: the bits are those of gradients in the segment, whoever updates.
fn kept(rows: u64, page: u32, steps: u64) {
    for moments in [MomentFormat::F32, MomentFormat::Bf16] {
        for gradients in [GradientFormat::F32, GradientFormat::Bf16] {
            let reference = store(&format!("kept-cpu-{moments:?}-{gradients:?}"), rows, page, moments, gradients);
            let owner = SharedOwner::new(reference.claim(0).unwrap());
            for step in 1..=steps {
                put_gradients(&reference, step);
                update_pages(&owner, &k(step), None).unwrap();
            }
            let want = image(&reference, steps);
            for who in ["cpu", "gpu", "both", "gpu, staged", "gpu, prepared", "both, staged"] {
                let s = store(&format!("kept-{who}-{moments:?}-{gradients:?}"), rows, page, moments, GradientFormat::None);
                let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
                let kept = room_for_gradients(&mut d, &s, gradients);
                let mut updater = d.page_updater(&s).unwrap().unwrap();
                let mut reader = d.gradient_reader(gradients, u64::from(page)).unwrap();
                // Weights of the first three quarters are delivered, in two pieces of odd lengths.
                let cut = [s.layout().span() / 3 + 1, s.layout().span() / 4 * 3];
                let places = [0..cut[0], cut[0]..cut[1]].map(|r| (r.clone(), d.alloc((r.end - r.start) * 2, "weights").unwrap())).to_vec();
                updater.deliver_to(Arc::new(DirectWeights::new(s.layout(), places)));
                let room = d.alloc(512 << 20, "staged pages").unwrap();
                let owner = SharedOwner::new(s.claim(0).unwrap());
                let mut total = PagesUpdated::default();
                for step in 1..=steps {
                    put_on_device(&d, &kept, s.layout().span(), step);
                    let staged = if who.contains(',') { stage(&d, &s, room, 2) } else { Vec::new() };
                    let from = Kept { gradients: &kept, reader: reader.as_mut() };
                    let done = match who {
                        "cpu" => {
                            update_pages_recorded(&owner, &k(step), None, staged, (&mut [], None), Some(from), &Default::default()).unwrap()
                        }
                        "gpu" | "gpu, staged" | "gpu, prepared" => {
                            let ahead = who == "gpu, prepared";
                            let device = by_device_from(&owner, &k(step), updater.as_mut(), &staged, Some(&kept), ahead);
                            PagesUpdated { device, ..Default::default() }
                        }
                        _ => {
                            let updater = Some(updater.as_mut() as &mut dyn PageUpdater);
                            update_pages_recorded(&owner, &k(step), updater, staged, (&mut [], None), Some(from), &Default::default())
                                .unwrap()
                        }
                    };
                    assert_eq!(done.cpu + done.device, u64::from(s.layout().page_count()));
                    total.cpu += done.cpu;
                    total.device += done.device;
                }
                println!(
                    "    kept: {moments:?} moments, {gradients:?} gradients, {who}: {} pages by the CPU, {} by the GPU",
                    total.cpu, total.device
                );
                let got = image(&s, steps);
                for (part, (g, w)) in got.iter().zip(&want).enumerate() {
                    let first = g.iter().zip(w).position(|(a, b)| a != b);
                    assert!(first.is_none(), "kept, {moments:?}, {gradients:?}, {who}, part {part}: parameter {first:?} differs");
                }
            }
        }
    }
}

fn kept_small() {
    kept(211, 4096, 5);
}

fn kept_large() {
    kept(20_011, 3 * (2 << 20) + 5 * 1024, 2);
}

/// Pages of gradients come in order, as many ahead as there is room for, and what does not fit is refused.
fn reader() {
    let s = store("reader", 211, 4096, MomentFormat::F32, GradientFormat::None);
    let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
    let kept = room_for_gradients(&mut d, &s, GradientFormat::Bf16);
    let allocated = d.allocated();
    let mut reader = d.gradient_reader(GradientFormat::Bf16, 4096).unwrap();
    assert_eq!(d.allocated(), allocated, "it takes RAM alone");
    assert!(reader.finish().is_err(), "nothing is on its way");
    put_on_device(&d, &kept, s.layout().span(), 1);
    let pages = s.layout().page_count();
    let mut submitted = 0;
    for page in 0..pages {
        while submitted < pages && submitted < page + reader.depth() as u32 {
            reader.submit(submitted, &kept.of(&s.layout().page_range(submitted))).unwrap();
            submitted += 1;
        }
        let Gradients::Bf16(got) = reader.finish().unwrap() else { panic!("bf16 gradients") };
        let want: Vec<u16> = s.layout().page_range(page).map(|i| bf16::from_f32(number(i ^ 1 << 45)).to_bits()).collect();
        assert!(got == want, "page {page}");
    }
    for page in 0..reader.depth() as u32 {
        reader.submit(page, &kept.of(&s.layout().page_range(page))).unwrap();
    }
    assert!(reader.submit(9, &kept.of(&s.layout().page_range(9))).is_err(), "too many");
    drop(reader); // with copies on their way
    let mut reader = d.gradient_reader(GradientFormat::Bf16, 1024).unwrap();
    assert!(reader.submit(0, &kept.of(&s.layout().page_range(0))).is_err(), "too long");
    assert!(d.gradient_reader(GradientFormat::None, 1024).is_err());
}

fn staging() {
    let s = store("staging", 211, 4096, MomentFormat::F32, GradientFormat::Bf16);
    let bytes = staging_bytes(s.layout().spec(), 4096);
    let mut d = CudaDevice::open(0, Dtype::Bf16, bytes, false).unwrap();
    let updater = d.page_updater(&s).unwrap();
    assert!(updater.is_some() && d.allocated() == bytes);
    // A second registration of the store would be refused before the memory is asked for.
    drop((updater, d));
    let mut d = CudaDevice::open(0, Dtype::Bf16, bytes - 1, false).unwrap();
    let e = d.page_updater(&s).err().unwrap();
    assert!(e.kind == ErrorKind::Resources && e.message.contains("optimizer staging needs"), "{e}");
    // The CPU device has one too, that takes none of its memory.
    let mut cpu = CpuDevice::open(0, Dtype::F32, 1, 1 << 20).unwrap();
    assert!(cpu.page_updater(&s).unwrap().is_some() && cpu.allocated() == 0);
}

/// Pages in hand that are never published stay as they were; whoever comes next finishes the step with the same bits.
fn stopped() {
    let (a, b) = (
        store("stopped-a", 211, 4096, MomentFormat::Bf16, GradientFormat::Bf16),
        store("stopped-b", 211, 4096, MomentFormat::Bf16, GradientFormat::Bf16),
    );
    put_gradients(&a, 1);
    put_gradients(&b, 1);
    update_pages(&SharedOwner::new(a.claim(0).unwrap()), &k(1), None).unwrap();
    {
        let mut d = CudaDevice::open(0, Dtype::Bf16, 1 << 30, false).unwrap();
        let mut updater = d.page_updater(&b).unwrap().unwrap();
        let owner = SharedOwner::new(b.claim(0).unwrap());
        let runs = |page| DecayRun::of(b.layout(), &b.layout().page_range(page));
        let (first, second) = (owner.begin(0, 1).unwrap().unwrap(), owner.begin(1, 1).unwrap().unwrap());
        updater.submit(&k(1), &first, &runs(0), &[], PageGradients::Segment).unwrap();
        updater.submit(&k(1), &second, &runs(1), &[], PageGradients::Segment).unwrap();
        updater.finish().unwrap();
        owner.publish(first).unwrap();
        assert!(updater.finish().is_ok() && updater.finish().is_err());
        drop(updater);
    }
    assert_eq!((b.entry(0).step, b.entry(1).step), (1, 0));
    let owner = SharedOwner::new(b.claim(0).unwrap());
    assert_eq!(update_pages(&owner, &k(1), None).unwrap().cpu, u64::from(b.layout().page_count()) - 1);
    assert!(image(&a, 1) == image(&b, 1));
}

/// The CPU alone, the GPU alone, both: fp32 and bf16 moments, bf16 gradients, pages as a large model has them.
pub fn bench() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = rayon_pool(threads);
    for moments in [MomentFormat::F32, MomentFormat::Bf16] {
        // 400 million parameters: 29 pages.
        let s = store(&format!("bench-{moments:?}"), 1_100_000, 16 << 20, moments, GradientFormat::Bf16);
        s.populate(threads).unwrap();
        // Subnormal numbers, which training does not meet in numbers, take processors a hundred times as long.
        put(&s, |i| (mixed(i) % 2001) as f32 * 1e-6 - 1e-3);
        let n = s.layout().span() as f64;
        let mut d = CudaDevice::open(0, Dtype::Bf16, 2 << 30, false).unwrap();
        let mut updater = d.page_updater(&s).unwrap().unwrap();
        let owner = SharedOwner::new(s.claim(0).unwrap());
        let mut step = 0;
        let kept = room_for_gradients(&mut d, &s, GradientFormat::Bf16);
        for (piece, b) in kept.of(&(0..s.layout().span())).iter().zip(s.layout().blocks()) {
            // SAFETY: the gradients of the block, which nobody writes now.
            let bytes = unsafe { std::slice::from_raw_parts(s.gradient_ptr(b.start), (2 * b.len) as usize) };
            for (i, part) in bytes.chunks(1 << 20).enumerate() {
                d.upload(Stream::Compute, piece.buf.slice((i << 20) as u64, part.len() as u64), part).unwrap();
            }
        }
        d.synchronize(Stream::Compute).unwrap();
        let mut reader = d.gradient_reader(GradientFormat::Bf16, 16 << 20).unwrap();
        for who in ["CPU", "GPU", "CPU and GPU", "kept, CPU", "kept, GPU", "kept, both"] {
            let mut times = Vec::new();
            let mut last = PagesUpdated::default();
            for _ in 0..6 {
                step += 1;
                let begin = std::time::Instant::now();
                let from = Kept { gradients: &kept, reader: reader.as_mut() };
                last = pool.install(|| match who {
                    "kept, CPU" => {
                        update_pages_recorded(&owner, &k(step), None, Vec::new(), (&mut [], None), Some(from), &Default::default()).unwrap()
                    }
                    "kept, GPU" => {
                        let device = by_device_from(&owner, &k(step), updater.as_mut(), &[], Some(&kept), false);
                        PagesUpdated { device, ..Default::default() }
                    }
                    "kept, both" => {
                        let updater = Some(updater.as_mut() as &mut dyn PageUpdater);
                        update_pages_recorded(&owner, &k(step), updater, Vec::new(), (&mut [], None), Some(from), &Default::default())
                            .unwrap()
                    }
                    "CPU" => update_pages(&owner, &k(step), None).unwrap(),
                    "GPU" => PagesUpdated { device: by_device(&owner, &k(step), updater.as_mut(), &[]), ..Default::default() },
                    _ => update_pages(&owner, &k(step), Some(updater.as_mut())).unwrap(),
                });
                times.push(begin.elapsed().as_secs_f64());
            }
            times.remove(0);
            times.sort_by(f64::total_cmp);
            let (seconds, bytes) = (times[2], if moments == MomentFormat::F32 { 26.0 } else { 18.0 });
            println!(
                "optimizer {who:<12} {moments:?} moments: {:6.2} Gparam/s, {:5.0} GB/s, 8.03 G parameters in {:.2} s ({} pages by the CPU, {} by the GPU, {threads} threads)",
                n / seconds / 1e9,
                n * bytes / seconds / 1e9,
                8.03e9 * seconds / n,
                last.cpu,
                last.device
            );
        }
    }
}

fn rayon_pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}
