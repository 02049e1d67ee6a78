use super::*;
use crate::spec::{BlockSpec, GradientFormat, GradientLog, MomentFormat, TensorSpec};
use proptest::prelude::*;

fn tensor(name: &str, shape: &[u64], joined: bool) -> TensorSpec {
    TensorSpec { name: name.into(), shape: shape.to_vec(), joined, decay: shape.len() > 1 }
}

fn spec(blocks: Vec<BlockSpec>) -> StoreSpec {
    StoreSpec {
        blocks,
        world_size: 2,
        moments: MomentFormat::F32,
        gradients: GradientFormat::Bf16,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 5000,
        log: GradientLog::NONE,
        metadata: "{}".into(),
    }
}

fn block(name: &str, tensors: Vec<TensorSpec>) -> BlockSpec {
    BlockSpec { name: name.into(), tensors }
}

#[test]
fn places_are_as_documented() {
    let blocks = vec![
        block("embedding", vec![tensor("e", &[10, 10], false)]),
        block(
            "layer",
            vec![tensor("q", &[7, 3], false), tensor("k", &[2, 3], true), tensor("norm", &[2000], false), tensor("scale", &[], false)],
        ),
    ];
    let layout = Layout::new(&spec(blocks)).unwrap();
    let places: Vec<_> = layout.tensors().iter().map(|t| (t.name.as_str(), t.block, t.start, t.len)).collect();
    assert_eq!(places, [("e", 0, 0, 100), ("q", 1, 128, 21), ("k", 1, 149, 6), ("norm", 1, 192, 2000), ("scale", 1, 2240, 1)]);
    let blocks: Vec<_> = layout.blocks().iter().map(|b| (b.start, b.len, b.tensors.clone())).collect();
    assert_eq!(blocks, [(0, 128, 0..1), (128, 2176, 1..5)]);
    assert_eq!((layout.parameters(), layout.span(), layout.page_count(), layout.physical_count()), (2128, 2304, 3, 5));
    assert_eq!((layout.page_range(0), layout.page_range(2), layout.page_range(3)), (0..1024, 2048..2304, 2304..2304));
    assert_eq!(
        (layout.pages_of(1000..1030), layout.pages_of(1024..2048), layout.pages_of(5..5), layout.pages_of(0..u64::MAX)),
        (0..2, 1..2, 0..0, 0..3)
    );
    assert_eq!(layout.tensor("k").unwrap().start, 149);
    assert!(layout.tensor("x").is_none());
    // Header, live words, manifest, table, 32 KiB of control words, 8 KiB of exchange, 4,608 B of gradients, 5 pages.
    let manifest = layout.sections().manifest.end.next_multiple_of(4096);
    assert_eq!(layout.bytes(), manifest + 4096 + 32768 + 8192 + 8192 + 5 * 12288);
}

#[test]
fn gradients_of_logged_steps_have_places_of_their_own() {
    let blocks = || vec![block("b", vec![tensor("t", &[5000], false)])];
    let plain = Layout::new(&spec(blocks())).unwrap();
    let with = |log| Layout::new(&StoreSpec { log, ..spec(blocks()) });
    // Pages 0, 1 and the last, which is shorter.
    let log = GradientLog::of(3, [0, 1, 4]);
    assert_eq!(log.pages, [0..2, 4..5]);
    let layout = with(log.clone()).unwrap();
    let (span, logged) = (layout.span(), 2048 + 5056 - 4096);
    assert_eq!((span, layout.logged_parameters(), layout.gradient_span(), plain.gradient_span()), (5056, logged, 5056 + 2 * logged, 5056));
    let at = |parameter, step| layout.gradient_at(parameter, step);
    assert_eq!([at(7, 3), at(7, 4), at(7, 5), at(7, 6)], [7, span + 7, span + logged + 7, 7]);
    assert_eq!(
        [at(2047, 4), at(2048, 4), at(4095, 5), at(4096, 4), at(span - 1, 5)],
        [span + 2047, 2048, 4095, span + 2048, span + 2 * logged - 1]
    );
    assert!((0..9).all(|step| plain.gradient_at(7, step) == 7));
    assert_eq!(layout.gradient_parts(100..5000), [100..2048, 2048..4096, 4096..5000]);
    assert_eq!(layout.gradient_parts(0..2048), vec![0..2048]);
    assert_eq!(layout.gradient_parts(2048..4096), vec![2048..4096]);
    assert_eq!(layout.gradient_parts(3000..4097), [3000..4096, 4096..4097]);
    assert_eq!(plain.gradient_parts(100..3000), vec![100..3000]);
    assert!(layout.gradient_parts(5..5).is_empty());
    assert_eq!([0, 1, 2, 3, 4].map(|page| layout.may_lag(page)), [2, 2, 0, 0, 2]);
    // The store is larger by these gradients, and says so in its version; another is as it was.
    assert_eq!(layout.sections().gradients.end - layout.sections().gradients.start, (5056 + 2 * logged) * 2);
    let header = |l: &Layout| crate::format::header(l, &crate::format::manifest_bytes(l).unwrap());
    let words = |l: &Layout| [1, 28, 29].map(|i| header(l)[i]);
    assert_eq!((words(&layout), words(&plain)), ([3, 3, logged], [2, 0, 0]));
    #[expect(clippy::single_range_in_vec_init)]
    for (steps, pages) in [
        (2, vec![]),
        (1, vec![0..1]),
        (0, vec![]),
        (9, vec![0..1]),
        (2, vec![0..6]),
        (2, vec![1..1]),
        (2, vec![0..2, 2..3]),
        (2, vec![3..4, 0..1]),
        (u32::MAX, vec![0..1]),
    ] {
        let log = GradientLog { steps, pages };
        assert!(with(log.clone()).is_err(), "{log:?}");
    }
    assert!(with(GradientLog::of(8, 0..5)).is_ok());
    assert_eq!((GradientLog::of(1, 0..5), GradientLog::of(4, [])), (GradientLog::NONE, GradientLog::NONE));
    assert!(Layout::new(&StoreSpec { log, gradients: GradientFormat::None, ..spec(blocks()) }).is_err());
}

#[test]
fn pages_are_as_large_as_leaves_each_rank_sixteen() {
    let pages = |parameters: u64, world_size: u32| {
        let mut spec = spec(vec![block("b", vec![tensor("t", &[parameters], false)])]);
        (spec.page_parameters, spec.world_size) = (None, world_size);
        let layout = Layout::new(&spec).unwrap();
        (layout.page_parameters(), layout.page_count())
    };
    assert_eq!(pages(100, 1), (4096, 1));
    assert_eq!(pages(1 << 20, 1), (65536, 16));
    assert_eq!(pages(8_000_000_000, 4), (16 << 20, 477));
    for (parameters, world_size) in [(1 << 20, 3), (1_000_000, 4), (123_456_789, 8), (70_000_000_000, 8)] {
        assert!(pages(parameters, world_size).1 >= 16 * world_size);
    }
}

#[test]
fn every_kind_of_nonsense_is_refused_by_name() {
    let good = || spec(vec![block("b", vec![tensor("t", &[64], false)])]);
    let refused = |change: &dyn Fn(&mut StoreSpec), part: &str| {
        let mut spec = good();
        change(&mut spec);
        let text = Layout::new(&spec).unwrap_err().to_string();
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    };
    assert!(Layout::new(&good()).is_ok());
    refused(&|s| s.blocks.clear(), "no block has a tensor");
    refused(&|s| s.blocks[0].tensors.clear(), "no block has a tensor");
    refused(&|s| s.blocks.push(s.blocks[0].clone()), "two blocks are named \"b\"");
    refused(&|s| s.blocks.push(block("c", vec![tensor("t", &[1], false)])), "two tensors are named \"t\"");
    refused(&|s| s.blocks[0].tensors[0].shape = vec![3, 0], "\"t\" of shape [3, 0]");
    refused(&|s| s.blocks[0].tensors[0].shape = vec![1 << 40, 1 << 40], "\"t\" of shape");
    refused(&|s| s.blocks[0].tensors[0].shape = vec![u64::MAX], "\"t\" of shape");
    refused(&|s| s.blocks[0].tensors[0].shape = vec![1; 33], "33 dimensions");
    refused(&|s| s.blocks[0].tensors[0].joined = true, "cannot be joined");
    refused(&|s| s.blocks[0].tensors[0].name.clear(), "tensor name of 0 bytes");
    refused(&|s| s.blocks[0].name = "x".repeat(2000), "block name of 2000 bytes");
    refused(&|s| s.world_size = 0, "world size 0");
    refused(&|s| s.world_size = u32::MAX, "world size 4294967295");
    refused(&|s| s.spare_pages_per_rank = 0, "0 spare pages");
    refused(&|s| s.spare_pages_per_rank = u32::MAX, "spare pages");
    refused(&|s| s.page_parameters = Some(0), "0 parameters a page");
    refused(&|s| s.page_parameters = Some(1000), "1000 parameters a page");
    refused(&|s| s.page_parameters = Some(1 << 31), "parameters a page");
    refused(&|s| s.exchange_bytes = u64::MAX, "larger than any file");
    refused(&|s| s.exchange_bytes = i64::MAX as u64, "larger than any file");
    refused(&|s| s.blocks[0].tensors[0].shape = vec![1 << 46], "choose larger pages");
    let many = |s: &mut StoreSpec| s.blocks[0].tensors = (0..3).map(|i| tensor(&format!("t{i}"), &[1 << 45], false)).collect();
    refused(&many, "\"t2\"");
}

fn specs() -> impl Strategy<Value = StoreSpec> {
    let tensors = prop::collection::vec((prop::collection::vec(1u64..40, 0..4), any::<bool>(), any::<bool>()), 0..6);
    let moments = prop::sample::select(vec![MomentFormat::None, MomentFormat::F32, MomentFormat::Bf16]);
    let gradients = prop::sample::select(vec![GradientFormat::None, GradientFormat::F32, GradientFormat::Bf16]);
    let numbers = (1u32..5, 1u32..4, prop::option::of(1u32..4), 0u64..20_000);
    (prop::collection::vec(tensors, 1..6), moments, gradients, numbers, ".{0,40}").prop_map(
        |(blocks, moments, gradients, numbers, metadata)| {
            let blocks = blocks.into_iter().enumerate().map(|(b, tensors)| {
                let tensors = tensors.into_iter().enumerate();
                let tensors = tensors.map(|(t, (shape, joined, decay))| TensorSpec {
                    name: format!("{b}.{t}"),
                    shape,
                    joined: joined && t > 0,
                    decay,
                });
                block(&b.to_string(), tensors.collect())
            });
            let mut blocks: Vec<_> = blocks.collect();
            blocks.push(block("last", vec![tensor("last", &[1], false)]));
            let (world_size, spare_pages_per_rank, page, exchange_bytes) = numbers;
            let spec = StoreSpec {
                blocks,
                world_size,
                moments,
                gradients,
                page_parameters: page.map(|p| p * 1024),
                spare_pages_per_rank,
                exchange_bytes,
                log: GradientLog::NONE,
                metadata,
            };
            // Every other one keeps gradients of some steps, of pages here and there.
            let Ok(layout) = Layout::new(&spec) else { return spec };
            if gradients == GradientFormat::None || exchange_bytes % 2 == 0 {
                return spec;
            }
            let logged = (0..layout.page_count()).filter(|page| (exchange_bytes >> (page % 13)) & 1 == 1);
            StoreSpec { log: GradientLog::of(2 + (exchange_bytes % 7) as u32, logged), ..spec }
        },
    )
}

proptest! {
    #[test]
    fn everything_has_its_own_place(spec in specs()) {
        let layout = Layout::new(&spec).unwrap();
        let mut at = 0;
        for (block, given) in layout.blocks().iter().zip(&spec.blocks) {
            prop_assert!(block.start == at && block.start % 64 == 0 && block.len % 64 == 0);
            let mut inside = block.start;
            for (tensor, given) in layout.tensors()[block.tensors.clone()].iter().zip(&given.tensors) {
                prop_assert_eq!(tensor.len, given.shape.iter().product::<u64>());
                prop_assert_eq!(tensor.start, if given.joined { inside } else { inside.next_multiple_of(64) });
                inside = tensor.start + tensor.len;
            }
            prop_assert!(inside <= block.start + block.len && block.start + block.len < inside + 64);
            at += block.len;
        }
        prop_assert_eq!(at, layout.span());
        prop_assert_eq!(layout.parameters(), layout.tensors().iter().map(|t| t.len).sum::<u64>());

        let mut covered = 0;
        for page in 0..layout.page_count() {
            let range = layout.page_range(page);
            prop_assert!(range.start == covered && range.end > covered);
            prop_assert_eq!(layout.pages_of(range.clone()), page..page + 1);
            covered = range.end;
        }
        prop_assert_eq!(covered, layout.span());

        // A page inside a share is its rank's; the others even out what ranks have.
        let mut counts = vec![[0u32; 2]; spec.world_size as usize];
        for page in 0..layout.page_count() {
            let (range, owner) = (layout.page_range(page), layout.page_owner(page));
            let inside = layout.blocks().iter().any(|b| {
                let share = share_of(b.len, spec.world_size);
                let mine = b.start + u64::from(owner) * share..b.start + (u64::from(owner) + 1) * share;
                mine.start <= range.start && range.end <= mine.end.min(b.start + b.len)
            });
            let any = layout.blocks().iter().any(|b| {
                let share = share_of(b.len, spec.world_size);
                b.start <= range.start && range.end <= b.start + b.len && (range.start - b.start) / share == (range.end - 1 - b.start) / share
            });
            prop_assert_eq!(inside, any);
            counts[owner as usize][usize::from(!inside)] += 1;
        }
        let most = counts.iter().filter(|c| c[1] > 0).map(|c| c[0] + c[1]).max().unwrap_or(0);
        prop_assert!(counts.iter().all(|c| c[0] + c[1] + 1 >= most));
        for rank in 0..spec.world_size {
            prop_assert!(layout.pages_of_rank(rank).eq((0..layout.page_count()).filter(|p| layout.page_owner(*p) == rank)));
        }

        let s = layout.sections();
        let mut end = 8192;
        for section in [&s.manifest, &s.page_table, &s.control, &s.exchange, &s.gradients, &s.pages] {
            prop_assert!(section.start >= end && section.start % 4096 == 0 && section.start < end + 4096);
            end = section.end;
        }
        prop_assert!(layout.bytes() == end && end.is_multiple_of(4096) && layout.page_bytes().is_multiple_of(4096));
        prop_assert!(s.exchange.end - s.exchange.start >= spec.exchange_bytes);
        prop_assert_eq!(s.pages.end - s.pages.start, layout.page_bytes() * u64::from(layout.physical_count()));
    }

    #[test]
    fn any_range_of_parameters_is_in_the_pages_it_is_said_to_be_in(spec in specs(), a in 0u64..50_000, b in 0u64..50_000) {
        let layout = Layout::new(&spec).unwrap();
        let pages = layout.pages_of(a.min(b)..a.max(b));
        for page in 0..layout.page_count() {
            let range = layout.page_range(page);
            let overlaps = range.start.max(a.min(b)) < range.end.min(a.max(b));
            prop_assert_eq!(pages.contains(&page), overlaps);
        }
    }

    #[test]
    fn a_layout_is_read_back_from_its_header_and_manifest(spec in specs()) {
        let layout = Layout::new(&spec).unwrap();
        let manifest = crate::format::manifest_bytes(&layout).unwrap();
        let header = crate::format::header(&layout, &manifest);
        let back = crate::format::layout_of(&header, &manifest).map_err(TestCaseError::fail)?;
        prop_assert_eq!(back.spec(), layout.spec());
        prop_assert_eq!(back.tensors(), layout.tensors());
        prop_assert_eq!(back.sections(), layout.sections());
        // No two gradients share a place, but for those of steps that are as far apart as the log is long, and of what has none.
        let steps = u64::from(layout.spec().log.steps);
        let mut places = std::collections::HashSet::new();
        for step in 0..steps {
            for p in (0..layout.span()).filter(|p| step == 0 || layout.may_lag(layout.pages_of(*p..p + 1).start) > 0) {
                let at = layout.gradient_at(p, step);
                prop_assert!(at < layout.gradient_span() && places.insert(at) && at == layout.gradient_at(p, step + steps));
            }
        }
        for part in layout.gradient_parts(0..layout.span()) {
            for step in 0..steps {
                prop_assert_eq!(layout.gradient_at(part.end - 1, step) - layout.gradient_at(part.start, step), part.end - 1 - part.start);
            }
        }
    }

    #[test]
    fn wild_numbers_are_laid_out_or_refused(
        shape in prop::collection::vec(prop_oneof![0u64..5, any::<u64>(), (0u32..64).prop_map(|b| 1 << b)], 0..5),
        world_size: u32, spares: u32, page in prop::option::of(any::<u32>()), exchange_bytes: u64,
    ) {
        let mut spec = spec(vec![block("b", vec![tensor("t", &shape, false)])]);
        (spec.world_size, spec.spare_pages_per_rank, spec.page_parameters, spec.exchange_bytes) =
            (world_size % 2000, spares % 20, page.map(|p| p / 1024 * 1024), exchange_bytes >> (world_size % 64));
        if let Ok(layout) = Layout::new(&spec) {
            prop_assert!(layout.bytes() >= layout.span() * 14);
        }
    }
}
