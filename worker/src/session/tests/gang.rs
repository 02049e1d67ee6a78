//! Several ranks in one process: each holds pages of its shares, whose weights the others have from its device before they are
//! published.

use super::*;
use crate::plan::rank_share;
use ramtorch_cpu::{Channel, Pauses};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A rank that panics takes the others with it, who would wait for it.
struct Leaver<'a>(&'a [Arc<Collectives>]);

impl Drop for Leaver<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.iter().for_each(|comm| comm.abort());
        }
    }
}

/// Bits of the store and of each rank's losses after four steps on `world` ranks; pages of each that were held.
///
/// With `reduce` in bf16 rounded gradients of all blocks but one stay for held pages: where sums of gradients were, if those stay.
fn run(tag: &str, tied: bool, world: usize, reduce: &str, pages: Pages) -> (Vec<Vec<u32>>, Vec<Vec<u64>>, Vec<usize>) {
    run_with(tag, tied, (world, 1), reduce, pages, 0)
}

/// As [`run`], in so many groups, with ranks, their optimizers and their devices late as `seed` has it.
fn run_with(
    tag: &str,
    tied: bool,
    (world, groups): (usize, usize),
    reduce: &str,
    (staged_pages, most, log, sums): Pages,
    seed: u64,
) -> (Vec<Vec<u32>>, Vec<Vec<u64>>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let train = format!("gather_weights = true\ngroups = {groups}\nreduce = \"{reduce}\"\n");
    let (mut p, dataset) = planned(dir.path(), tied, &train, world as u32);
    assert!(groups > 1 || p.packs() == (reduce == "bf16"));
    p.resident_gradients |= sums;
    // As on GPUs: small pages, so that some lie in one rank's share.
    p.store = StoreSpec { page_parameters: Some(1024), spare_pages_per_rank: 3, ..p.store };
    (p.staged_pages, p.held_pages) = (vec![staged_pages; p.keep.len() - 1], most);
    p.held_gradients = (0..p.keep.len()).map(|b| b != 1 && most > 0).collect();
    if seed % 3 == 1 {
        // Layers go through two slots, some of them twice a step.
        let n = p.keep.len();
        (p.resident, p.slots) = ((0..n).map(|b| b == 0 || b + 1 == n).collect(), 2);
    }
    if log > 1 {
        // Borders lie within blocks, and within shares.
        let pages = Layout::new(&p.store).unwrap().page_count();
        p.store.log = GradientLog::of(log, (0..pages).filter(|page| page % 7 != 3));
    }
    let a = architecture(tied);
    let store = filled(&format!("gang-{tag}-{tied}"), &a, &p);
    let model = Model::new(&a, store.layout(), p.dtype).unwrap();
    if sums {
        p.visiting_pages = p.visiting_rooms(&model).len();
    }
    p.uses = DeviceUse { optimizer: 0, ..device_use(&model, &p, &|_| Ok(0)).unwrap() };
    let all: Vec<Arc<Collectives>> = (0..world).map(|rank| Arc::new(Collectives::new(store.clone(), rank, world, 1))).collect();
    let one = |rank: usize| {
        let (owner, comm, all) = (SharedOwner::new(store.claim(rank as u32).unwrap()), all[rank].clone(), &all);
        let _leaver = Leaver(all);
        // Of this rank; 0 for seed 0.
        let mine = seed.wrapping_mul(0x10001 + rank as u64);
        let (pauses, longest) = (Pauses::of(mine), Duration::from_millis(6));
        let late = || pauses.pause(4, longest);
        let dev = CpuDevice::open(rank as u32, p.dtype, 1, p.uses.allocated()).unwrap();
        dev.be_late(mine);
        let model = Model::new(&a, store.layout(), p.dtype).unwrap();
        let mut session = Session::new(Box::new(dev), model, store.clone(), &p, true).unwrap();
        let mut updater = session.dev.page_updater(&store).unwrap().unwrap();
        session.join(&comm).unwrap();
        updater.deliver_to(session.weights.direct());
        let mut held = session.take_held();
        let here = session.held_gradients();
        assert_eq!(here.is_some(), most > 0 && p.packs());
        let here = here.as_ref();
        let pages = held.len();
        let data = dataset.open().unwrap();
        let reader = Reader { data: &data, seq: SEQ, document_mask: false, padding: None };
        let mine: Vec<u64> = rank_share(8, rank, world).map(|i| [3, 1, 4, 15, 9, 2, 6, 5][i]).collect();
        let batches = StepBatches::new(&mine, p.micro_batch, p.group_len);
        let mut losses = Vec::new();
        let mut due: Option<(AdamwStep, Vec<StagedPage>)> = None;
        for step in 1..=STEPS + 1 {
            std::thread::scope(|scope| {
                let (owner, held, gang, late) = (&owner, &mut held, &comm, &late);
                // Where nothing but staged pages is the device's, they take their time.
                let fixed = Duration::from_millis(if seed == 0 && most == 0 && staged_pages > 0 { 3 } else { 0 });
                let pause = move || {
                    std::thread::sleep(fixed);
                    late();
                };
                let updater = updater.as_mut();
                let pending = due.take().map(|(k, staged)| {
                    scope.spawn(move || {
                        let _leaver = Leaver(all);
                        let mut updater = Slow { updater, pause: &pause };
                        late();
                        update_pages_recorded(
                            owner,
                            &k,
                            Some(&mut updater),
                            staged,
                            (held.as_mut_slice(), here),
                            None,
                            &Default::default(),
                        )
                        .unwrap();
                        // Weights of held pages are gathered from here on, and gradients of the next step wait for what follows.
                        std::thread::sleep(Duration::from_millis(if seed == 0 { 2 + rank as u64 } else { 0 }));
                        late();
                        write_back(owner, k.step, &mut updater, held, k.step == STEPS).unwrap();
                        gang.barrier(Channel::Optimizer).unwrap();
                    })
                });
                if step <= STEPS {
                    let visits = session.visits(p.groups, true);
                    session.weights.plan_visits(visits, step - 1);
                    late();
                    let mut closed = |_: &Session, _: usize| {
                        late();
                        Ok(())
                    };
                    session.train_step(&reader, &batches, 1.0 / 128.0, p.groups, step - 1, &mut closed).unwrap();
                    session.finish_gradients().unwrap();
                    losses.push(session.sum_losses(&batches).unwrap().to_bits());
                }
                pending.into_iter().for_each(|p| p.join().unwrap());
                // Gradients of all ranks are whole.
                comm.barrier(Channel::Step).unwrap();
            });
            if step <= STEPS {
                due = Some((adamw(step), session.take_staged().unwrap()));
            }
        }
        drop(updater);
        session.close();
        (losses, pages)
    };
    let (losses, pages) = std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world).map(|rank| scope.spawn(move || one(rank))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).unzip()
    });
    (state_of(&store), losses, pages)
}

#[test]
fn pages_held_by_several_ranks_change_nothing() {
    for (tied, world, reduce) in [(false, 2, "fp32"), (true, 2, "bf16"), (false, 2, "bf16"), (false, 3, "bf16"), (false, 3, "fp32")] {
        let plain = run("unheld", tied, world, reduce, (0, 0, 1, false));
        for (staged, held, log, sums) in [(0, 3, 1, true), (2, 40, 1, false), (0, 3, 2, false), (2, 40, 3, true)] {
            let run = run(&format!("held-{held}-{staged}-{log}"), tied, world, reduce, (staged, held, log, sums));
            let what =
                format!("{held} pages held, {staged} staged, {log} steps kept, sums stay: {sums}; tied: {tied}, {world} ranks, {reduce}");
            assert!(run.2.iter().all(|pages| (3..=held + if sums { 40 } else { 0 }).contains(pages)), "pages held: {:?}; {what}", run.2);
            assert_eq!(run.1, plain.1, "losses; {what}");
            assert!(run.0 == plain.0, "the store; {what}");
        }
    }
}

/// A page that lies across borders of shares may belong to a rank that has no part of it in its own: what the rank has of it in memory of
/// activations is not overwritten before it is updated all the same.
#[test]
fn pages_staged_by_several_ranks_change_nothing() {
    for world in [2, 3, 4] {
        let plain = run("unstaged", false, world, "fp32", (0, 0, 1, false));
        for staged in [1, 3, 40] {
            let run = run(&format!("staged-{staged}"), false, world, "fp32", (staged, 0, 1, false));
            assert_eq!(run.1, plain.1, "losses; {staged} pages staged, {world} ranks");
            assert!(run.0 == plain.0, "the store; {staged} pages staged, {world} ranks");
        }
    }
}

/// Such a page is brought to the device when its rank has published it, however far ahead the host is: the forward pass waits for
/// pages of the rank's own shares.
#[test]
fn what_is_staged_is_published() {
    let strangers: usize = (2..9).map(staged_and_published).sum();
    assert!(strangers > 0, "all pages that are staged lie in their owners' shares");
}

/// On how many of `world` ranks pages are staged of which the rank has no part in its shares.
fn staged_and_published(world: usize) -> usize {
    let dir = tempfile::tempdir().unwrap();
    let (mut p, _) = planned(dir.path(), false, "gather_weights = true\ngroups = 1\n", world as u32);
    p.store = StoreSpec { page_parameters: Some(1024), spare_pages_per_rank: 3, ..p.store };
    p.staged_pages = vec![40; p.keep.len() - 1];
    let a = architecture(false);
    let store = filled("published", &a, &p);
    let model = Model::new(&a, store.layout(), p.dtype).unwrap();
    p.uses = DeviceUse { optimizer: 0, ..device_use(&model, &p, &|_| Ok(0)).unwrap() };
    let mut strangers = 0;
    for rank in 0..world {
        let dev = CpuDevice::open(rank as u32, p.dtype, 1, p.uses.allocated()).unwrap();
        let model = Model::new(&a, store.layout(), p.dtype).unwrap();
        let places = model.places.clone();
        let mut session = Session::new(Box::new(dev), model, store.clone(), &p, true).unwrap();
        let comm = Arc::new(Collectives::new(store.clone(), rank, world, 1));
        session.join(&comm).unwrap();
        let of_shares = |page: PageId| {
            let params = store.layout().page_range(page);
            let own = |(start, len): &(u64, u64)| start + comm.ranks().own(*len).start..start + comm.ranks().own(*len).end;
            places.iter().map(own).any(|own| own.start.max(params.start) < own.end.min(params.end))
        };
        let staged = session.staging.as_ref().unwrap().pages.clone();
        let Some(b) = staged.iter().position(|pages| pages.iter().any(|(page, _)| !of_shares(*page))) else { continue };
        strangers += 1;
        let owner = SharedOwner::new(store.claim(rank as u32).unwrap());
        let published = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                published.store(true, Ordering::SeqCst);
                update_pages_recorded(&owner, &adamw(1), None, Vec::new(), (&mut [], None), None, &Default::default()).unwrap();
            });
            session.stage(b, 1).unwrap();
            assert!(published.load(Ordering::SeqCst), "rank {rank} brought pages of another step");
        });
        let staged = session.take_staged().unwrap();
        assert!(!staged.is_empty() && staged.iter().all(|s| s.step == 1), "{staged:?}");
        // For any other step they are not taken.
        let e = update_pages_recorded(&owner, &adamw(3), None, staged, (&mut [], None), None, &Default::default()).unwrap_err();
        assert!(e.message.contains("at step 1, for step 3"), "{e}");
    }
    strangers
}

/// Whoever is late, and wherever state lies: the bits are those of pages in RAM. `RAMTORCH_GANG_SEEDS` says how many seeds are tried.
#[test]
fn nobodys_lateness_changes_a_bit() {
    let seeds: u64 = std::env::var("RAMTORCH_GANG_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let mut plain = std::collections::HashMap::new();
    for seed in 1..=seeds {
        let pick = |salt: u64, of: u64| (seed.wrapping_mul(0xd134_2543_de82_ef95).rotate_left(salt as u32) >> 32) % of;
        let (tied, world) = (pick(3, 4) == 0, 2 + pick(11, 5) as usize);
        let reduce = if pick(19, 2) == 0 { "fp32" } else { "bf16" };
        let sums = pick(37, 3) == 0;
        let pages = ([0, 1, 3, 40][pick(23, 4) as usize], [0, 3, 40][pick(29, 3) as usize], 1 + pick(31, 3) as u32, sums);
        let ranks = (world, 1 + pick(41, 3) as usize / 2);
        let what = format!("seed {seed}: tied: {tied}, ranks and groups {ranks:?}, {reduce}, pages {pages:?}");
        // Sums that stay over groups have no place for the others' rounding.
        let key = (tied, ranks, reduce, sums && ranks.1 > 1);
        let nothing = (0, 0, 1, key.3);
        let plain = plain.entry(key).or_insert_with(|| run_with("late-plain", tied, ranks, reduce, nothing, 0));
        let late = run_with(&format!("late-{seed}"), tied, ranks, reduce, pages, seed);
        assert_eq!(late.1, plain.1, "losses; {what}");
        assert!(late.0 == plain.0, "the store; {what}");
    }
}
