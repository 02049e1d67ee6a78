//! Several ranks in one process: each holds pages of its shares, whose weights the others have from its device before they are
//! published.

use super::*;
use crate::plan::rank_share;
use ramtorch_cpu::Channel;

/// Bits of the store and of each rank's losses after four steps on `world` ranks; pages of each that were held.
///
/// With `reduce` in bf16 rounded gradients of all blocks but one stay for held pages: where sums of gradients were, if those stay.
fn run(
    tag: &str,
    tied: bool,
    world: usize,
    reduce: &str,
    (staged_pages, most, log, sums): Pages,
) -> (Vec<Vec<u32>>, Vec<Vec<u64>>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let (mut p, dataset) = planned(dir.path(), tied, &format!("gather_weights = true\ngroups = 1\nreduce = \"{reduce}\"\n"), world as u32);
    assert_eq!(p.packs(), reduce == "bf16");
    p.resident_gradients |= sums;
    // As on GPUs: small pages, so that some lie in one rank's share.
    p.store = StoreSpec { page_parameters: Some(1024), spare_pages_per_rank: 3, ..p.store };
    (p.staged_pages, p.held_pages) = (vec![staged_pages; p.keep.len() - 1], most);
    p.held_gradients = (0..p.keep.len()).map(|b| b != 1 && most > 0).collect();
    if log > 1 {
        // Borders lie within blocks, and within shares.
        let pages = Layout::new(&p.store).unwrap().page_count();
        p.store.log = GradientLog::of(log, (0..pages).filter(|page| page % 7 != 3));
    }
    let a = architecture(tied);
    let name = format!("/ramtorch-gang-{tag}-{tied}-{world}-{}", std::process::id());
    let store = Arc::new(Store::create(&name, &p.store).unwrap());
    Store::unlink(&name).unwrap();
    let weights = open_weights(&a, None, 5).unwrap();
    for rank in 0..world as u32 {
        let mut owner = store.claim(rank).unwrap();
        for page in owner.pages() {
            fill_page(&mut owner, store.layout(), page, 0, weights.as_ref()).unwrap();
        }
    }
    let model = Model::new(&a, store.layout(), p.dtype).unwrap();
    if sums {
        p.visiting_pages = p.visiting_rooms(&model).len();
    }
    p.uses = DeviceUse { optimizer: 0, ..device_use(&model, &p, &|_| Ok(0)).unwrap() };
    let one = |rank: usize| {
        let owner = SharedOwner::new(store.claim(rank as u32).unwrap());
        let comm = Arc::new(Collectives::new(store.clone(), rank, world, 1));
        let dev = CpuDevice::open(rank as u32, p.dtype, 1, p.uses.allocated()).unwrap();
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
                let (owner, updater, held, gang) = (&owner, updater.as_mut(), &mut held, &comm);
                let pending = due.take().map(|(k, staged)| {
                    scope.spawn(move || {
                        update_pages_recorded(
                            owner,
                            &k,
                            Some(&mut *updater),
                            staged,
                            (held.as_mut_slice(), here),
                            None,
                            &Default::default(),
                        )
                        .unwrap();
                        // Weights of held pages are gathered from here on, and gradients of the next step wait for what follows.
                        std::thread::sleep(std::time::Duration::from_millis(2 + rank as u64));
                        write_back(owner, k.step, updater, held, k.step == STEPS).unwrap();
                        gang.barrier(Channel::Optimizer).unwrap();
                    })
                });
                if step <= STEPS {
                    let visits = session.visits(p.groups, true);
                    session.weights.plan_visits(visits, step - 1);
                    session.train_step(&reader, &batches, 1.0 / 128.0, p.groups, step - 1, &mut |_, _| Ok(())).unwrap();
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
