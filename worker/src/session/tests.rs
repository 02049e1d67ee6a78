//! Steps of a session on a CPU device with its page updater beside it: what lies where changes no bit of the store.

use super::*;
use crate::api::{DeviceKind, DeviceSpec, PlanRequest, Prepared, Rates};
use crate::plan::{DeviceUse, device_use, plan};
use ramtorch_cpu::{CpuDevice, Kept, update_pages_recorded, write_back};
use ramtorch_data::Dataset;
use ramtorch_device::{AdamwStep, DecayRun, DeviceGradients, DirectWeights, PageGradients, PageUpdater, StagedPage};
use ramtorch_job::JobSpec;
use ramtorch_modelio::{TransformerConfig, fill_page, open_weights, parse_config};
use ramtorch_store::{GradientLog, Layout, PageId, SharedOwner, StoreSpec, Update};
use std::path::Path;

const VOCABULARY: usize = 97;
const SEQ: usize = 16;
const STEPS: u64 = 4;

fn architecture(tied: bool) -> Architecture {
    let text = format!(
        r#"{{"model_type":"llama","vocab_size":{VOCABULARY},"hidden_size":48,"intermediate_size":80,"num_hidden_layers":3,
            "num_attention_heads":4,"num_key_value_heads":2,"max_position_embeddings":64,"rms_norm_eps":1e-5,
            "tie_word_embeddings":{tied},"hidden_act":"silu"}}"#
    );
    let config: TransformerConfig = parse_config(text.as_bytes(), Path::new("config.json")).unwrap().config;
    Architecture::Transformer(config)
}

/// What a run leaves: state of all parameters as bits, losses and sums of squares of the steps, pages that were staged.
struct Run {
    state: Vec<Vec<u32>>,
    losses: Vec<u64>,
    squares: Vec<u64>,
    staged: usize,
    device: u64,
    /// Pages that were behind the committed step when a gang died.
    behind: usize,
}

/// Four steps of a tiny model in bf16, pages updated by the CPU and by the device's updater beside the next forward pass.
fn run(tag: &str, tied: bool, train: &str, staged_pages: usize) -> Run {
    run_on(tag, tied, train, (staged_pages, 0, 1, false), false)
}

/// An updater that takes its time: `pause` before what it does with pages that are held or staged.
struct Slow<'a> {
    updater: &'a mut dyn PageUpdater,
    pause: &'a (dyn Fn() + Sync),
}

impl PageUpdater for Slow<'_> {
    fn depth(&self) -> usize {
        self.updater.depth()
    }

    fn submit(
        &mut self,
        k: &AdamwStep,
        update: &Update,
        runs: &[DecayRun],
        state: &[DevBuf],
        gradients: PageGradients<'_>,
    ) -> Result<(), EngineError> {
        if !state.is_empty() {
            (self.pause)();
        }
        self.updater.submit(k, update, runs, state, gradients)
    }

    fn prepare(&mut self, k: &AdamwStep, page: &StagedPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        self.updater.prepare(k, page, runs, gradients)
    }

    fn submit_prepared(&mut self, k: &AdamwStep, update: &Update, staged: &StagedPage) -> Result<(), EngineError> {
        self.updater.submit_prepared(k, update, staged)
    }

    fn advance(&mut self, k: &AdamwStep, held: &HeldPage, runs: &[DecayRun], gradients: PageGradients<'_>) -> Result<(), EngineError> {
        (self.pause)();
        self.updater.advance(k, held, runs, gradients)
    }

    fn write_back(&mut self, update: &Update, held: &HeldPage) -> Result<(), EngineError> {
        self.updater.write_back(update, held)
    }

    fn deliver_to(&mut self, weights: Arc<DirectWeights>) {
        self.updater.deliver_to(weights);
    }

    fn hold_back(&mut self, hold: bool) {
        self.updater.hold_back(hold);
    }

    fn finish(&mut self) -> Result<(), EngineError> {
        self.updater.finish()
    }
}

/// Every page through the device, two in hand; those whose state and gradients are there are updated before the first goes out.
fn by_device(
    owner: &SharedOwner<'_>,
    k: &AdamwStep,
    updater: &mut dyn PageUpdater,
    staged: &[StagedPage],
    gradients: Option<&DeviceGradients>,
) -> u64 {
    let layout = owner.store().layout();
    let mut in_hand = std::collections::VecDeque::new();
    let prepared = |page| staged.iter().find(|s| s.page == page && gradients.is_some());
    for page in owner.pages() {
        let (params, Some(g)) = (layout.page_range(page), gradients) else { break };
        let pieces = g.of(&params);
        if let Some(s) = prepared(page) {
            updater.prepare(k, s, &DecayRun::of(layout, &params), PageGradients::Device(g.format(), &pieces)).unwrap();
        }
    }
    for page in owner.pages() {
        if in_hand.len() == updater.depth() {
            updater.finish().unwrap();
            owner.publish(in_hand.pop_front().unwrap()).unwrap();
        }
        let params = layout.page_range(page);
        let pieces = gradients.map(|g| g.of(&params)).unwrap_or_default();
        let place = gradients.map_or(PageGradients::Segment, |g| PageGradients::Device(g.format(), &pieces));
        let state = staged.iter().find(|s| s.page == page).map_or([].as_slice(), |s| &s.state);
        let update = owner.begin(page, k.step).unwrap().unwrap();
        match prepared(page) {
            Some(s) => updater.submit_prepared(k, &update, s).unwrap(),
            None => updater.submit(k, &update, &DecayRun::of(layout, &params), state, place).unwrap(),
        }
        in_hand.push_back(update);
    }
    for update in in_hand {
        updater.finish().unwrap();
        owner.publish(update).unwrap();
    }
    layout.page_count().into()
}

/// The store of a plan, with weights.
fn filled(tag: &str, a: &Architecture, p: &EnginePlan) -> Arc<Store> {
    let world = p.store.world_size;
    let name = format!("/ramtorch-{tag}-{world}-{}", std::process::id());
    let store = Arc::new(Store::create(&name, &p.store).unwrap());
    Store::unlink(&name).unwrap();
    let weights = open_weights(a, None, 5).unwrap();
    for rank in 0..world {
        let mut owner = store.claim(rank).unwrap();
        for page in owner.pages() {
            fill_page(&mut owner, store.layout(), page, 0, weights.as_ref()).unwrap();
        }
    }
    store
}

/// A job of four steps in bf16, its data in `dir`, and what is planned for `world` ranks.
fn planned(dir: &Path, tied: bool, train: &str, world: u32) -> (EnginePlan, Dataset) {
    let tokens: Vec<u8> = (0..4000u32).flat_map(|i| ((i * i / 7 + i) % VOCABULARY as u32).to_le_bytes()).collect();
    std::fs::write(dir.join("tokens.bin"), tokens).unwrap();
    let text = format!(
        "name = \"t\"\n[model]\nconfig = \"/c\"\n[data]\nformat = \"tokens\"\ntrain = \"tokens.bin\"\nsequence_length = {SEQ}\n[train]\nsteps = 4\nbatch_size = 8\nmicro_batch_size = 2\nprecision = \"bf16\"\nrecompute = \"never\"\n{train}"
    );
    let spec = JobSpec::parse(&text, dir, "job.toml").unwrap();
    let a = architecture(tied);
    let dataset = ramtorch_data::prepare(&spec.data, None, Some(VOCABULARY), dir, &|_, _, _| {}).unwrap();
    let memory_bytes = 64 << 20;
    let request = PlanRequest {
        spec,
        prepared: Prepared {
            architecture: serde_json::to_value(&a).unwrap(),
            description: a.describe(),
            weights: None,
            resume: None,
            train_sequences: dataset.train_sequences,
            validation_sequences: 0,
            sequence_length: SEQ,
            steps: STEPS,
            dataset: serde_json::Value::Null,
            rates: Rates::default(),
        },
        devices: (0..world).map(|index| DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes, bus_id: None }).collect(),
        segment_bytes_available: 1 << 40,
        ram_bytes_available: 1 << 40,
    };
    (EnginePlan::of(&plan(&request).unwrap()).unwrap(), dataset)
}

/// AdamW of `step`.
fn adamw(step: u64) -> AdamwStep {
    AdamwStep {
        step,
        beta1: 0.9,
        beta2: 0.95,
        one_minus_beta1: 0.1,
        one_minus_beta2: 0.05,
        step_size: 1e-2,
        root_scale: 2.5,
        eps: 1e-8,
        gradient_scale: 0.5,
        keep: 0.999,
    }
}

/// Whose pages are the device's: how many of each block are staged, how many are held, for how many steps gradients of those
/// are kept, and whether sums of gradients stay on the device over groups.
type Pages = (usize, usize, u32, bool);

/// As [`run`], with pages of the device; with `alone` the device's updater does all pages.
fn run_on(tag: &str, tied: bool, train: &str, pages: Pages, alone: bool) -> Run {
    run_interrupted(tag, tied, train, pages, alone, Death::Never)
}

/// When a gang dies, and another one goes on.
#[derive(Clone, Copy)]
enum Death<'a> {
    Never,
    /// In the second step, of which it has updated the pages that are named.
    Early(&'a dyn Fn(PageId) -> bool),
    /// After a step was committed, with all that the device holds.
    After(u64),
}

/// Bits of all gradients of a step in the store, or of what lies in their place, by page.
fn gradients_by_page(store: &Store, step: u64) -> Vec<Vec<u32>> {
    let bits = |page| {
        ramtorch_cpu::read_gradients(store, page, step, |g| match g {
            ramtorch_store::Gradients::None => Vec::new(),
            ramtorch_store::Gradients::F32(g) => g.iter().map(|x| x.to_bits()).collect(),
            ramtorch_store::Gradients::Bf16(g) => g.iter().map(|x| u32::from(*x)).collect(),
        })
    };
    (0..store.layout().page_count()).map(bits).collect()
}

/// As [`run_on`], with a death.
fn run_interrupted(tag: &str, tied: bool, train: &str, (staged_pages, held, log, resident): Pages, alone: bool, death: Death<'_>) -> Run {
    let dir = tempfile::tempdir().unwrap();
    let a = architecture(tied);
    let (mut p, dataset) = planned(dir.path(), tied, train, 1);
    let data = dataset.open().unwrap();
    // As on a GPU: small pages, several in hand, staged pages, squares by the device.
    p.store = StoreSpec { page_parameters: Some(1024), spare_pages_per_rank: 3, ..p.store };
    (p.staged_pages, p.squares_on_device) = (vec![staged_pages; p.keep.len() - 1], true);
    p.held_pages = held;
    p.resident_gradients |= resident;
    // Nothing but the last block's weights stays, and so none but its pages are held, all of them at once.
    let last_alone = resident && log == 1 && held > 0;
    if last_alone {
        let n = p.keep.len();
        (p.resident, p.slots, p.held_gradients) = ((0..n).map(|b| b + 1 == n).collect(), 2, vec![true; n]);
    }
    // A tenth of the pages may come and go where sums were.
    let visiting = if resident && log > 1 { 3.min(30 - held) } else { 0 };
    if log > 1 {
        // Pages that are held are among the first; of the others some have a log, which changes nothing.
        p.store.log = GradientLog::of(log, (0..held as PageId).chain(((held + visiting) as PageId..31).step_by(3)));
        // Gradients of some blocks stay for them.
        p.held_gradients = (0..p.keep.len()).map(|b| b != 1).collect();
    }
    let store = filled(&format!("session-{tag}-{tied}"), &a, &p);
    let owner = SharedOwner::new(store.claim(0).unwrap());
    let model = Model::new(&a, store.layout(), p.dtype).unwrap();
    p.visiting_pages = visiting;
    assert!(visiting <= p.visiting_rooms(&model).len());
    p.uses = DeviceUse { optimizer: 0, ..device_use(&model, &p, &|_| Ok(0)).unwrap() };
    let dev = CpuDevice::open(0, p.dtype, 1, p.uses.allocated()).unwrap();
    let mut session = Session::new(Box::new(dev), model, store.clone(), &p, true).unwrap();
    assert_eq!(session.dev.allocated(), p.uses.allocated());
    session.join(&Arc::new(Collectives::new(store.clone(), 0, 1, 0))).unwrap();
    let mut updater = session.dev.page_updater(&store).unwrap().unwrap();
    updater.deliver_to(session.weights.direct());
    let mut held = session.take_held();
    assert_eq!(held.len(), p.held_pages + p.visiting_pages);
    let here = session.held_gradients();
    assert_eq!(here.is_some(), p.held_gradients.contains(&true) && p.packs());
    let gradients = session.device_gradients();
    assert_eq!(gradients.is_some(), p.device_gradients.is_some());
    let mut reader = gradients.as_ref().map(|g| session.dev.gradient_reader(g.format(), 1024).unwrap());
    let reader_of = Reader { data: &data, seq: SEQ, document_mask: false, padding: None };
    let batches = StepBatches::new(&[3, 1, 4, 15, 9, 2, 6, 5], p.micro_batch, p.group_len);
    let mut end = Run { state: Vec::new(), losses: Vec::new(), squares: Vec::new(), staged: 0, device: 0, behind: 0 };
    let mut due: Option<(AdamwStep, Vec<StagedPage>)> = None;
    for step in 1..=STEPS + 1 {
        end.device += std::thread::scope(|scope| {
            let (owner, updater, gradients, reader, held) = (&owner, updater.as_mut(), gradients.as_ref(), reader.as_mut(), &mut held);
            let here = here.as_ref();
            let update = move |(k, staged): (AdamwStep, Vec<StagedPage>)| {
                if alone {
                    return by_device(owner, &k, updater, &staged, gradients);
                }
                let kept = gradients.zip(reader).map(|(gradients, reader)| Kept { gradients, reader: reader.as_mut() });
                let pause = || std::thread::sleep(std::time::Duration::from_millis(if last_alone { 5 } else { 0 }));
                let updater: &mut dyn PageUpdater = &mut Slow { updater, pause: &pause };
                let done =
                    update_pages_recorded(owner, &k, Some(&mut *updater), staged, (held.as_mut_slice(), here), kept, &Default::default())
                        .unwrap();
                // Gradients of the next step come in between.
                std::thread::sleep(std::time::Duration::from_millis(2));
                write_back(owner, k.step, updater, held, k.step == STEPS).unwrap();
                done.device
            };
            // Beside the sweep, which waits for each page before its gradient leaves.
            let pending = due.take().map(|due| scope.spawn(move || update(due)));
            let committed = || pending.map_or(0, |p| p.join().unwrap());
            if step > STEPS {
                return committed();
            }
            let visits = session.visits(p.groups, true);
            session.weights.plan_visits(visits, step - 1);
            session.train_step(&reader_of, &batches, 1.0 / 128.0, p.groups, step - 1, &mut |_, _| Ok(())).unwrap();
            session.finish_gradients().unwrap();
            end.losses.push(session.sum_losses(&batches).unwrap().to_bits());
            end.squares.push(session.squares_by_device().unwrap().to_bits());
            committed()
        });
        if step <= STEPS {
            let staged = session.take_staged().unwrap();
            end.staged += staged.len();
            let k = adamw(step);
            if let (Death::Early(early), 2) = (death, step) {
                let gradients = gradients_by_page(&store, step);
                for page in owner.pages().filter(|page| early(*page)) {
                    ramtorch_cpu::update_page_early(&owner, &k, page).unwrap();
                }
                let kept = gradients_by_page(&store, step);
                let ahead = Arc::new(Ahead::find(&store, step));
                let pages = owner.pages().filter(|p| early(*p)).count();
                assert!(pages > 0 && ahead.count().0 == pages && kept != gradients);
                // What lies in the place of the others' gradients may be anything.
                let mut junk = CpuDevice::open(0, p.dtype, 1, 1 << 16).unwrap();
                let buf = junk.alloc(4 * 1024, "gradients of nobody").unwrap();
                junk.upload(Stream::CopyOut, buf, &[0x55; 4 * 1024]).unwrap();
                for range in owner.pages().filter(|page| !early(*page)).map(|page| store.layout().page_range(page)) {
                    let n = range.end - range.start;
                    let at = store.layout().gradient_at(range.start, step);
                    junk.store_gradients(Stream::CopyOut, buf.slice(0, n * 4), &store, at, n, false).unwrap();
                }
                junk.synchronize(Stream::CopyOut).unwrap();
                let dev = CpuDevice::open(0, p.dtype, 1, p.uses.allocated()).unwrap();
                let model = Model::new(&a, store.layout(), p.dtype).unwrap();
                let mut again = Session::new(Box::new(dev), model, store.clone(), &p, true).unwrap();
                again.join(&Arc::new(Collectives::new(store.clone(), 0, 1, 1))).unwrap();
                again.set_ahead(ahead);
                let visits = again.visits(p.groups, true);
                again.weights.plan_visits(visits, step - 1);
                again.train_step(&reader_of, &batches, 1.0 / 128.0, p.groups, step - 1, &mut |_, _| Ok(())).unwrap();
                again.finish_gradients().unwrap();
                assert_eq!(Some(&again.sum_losses(&batches).unwrap().to_bits()), end.losses.last(), "the loss of the step run again");
                assert_eq!(Some(&again.squares_by_device().unwrap().to_bits()), end.squares.last());
                for (page, after) in (0..).zip(gradients_by_page(&store, step)) {
                    let want = if early(page) { &kept } else { &gradients };
                    assert!(after == want[page as usize], "page {page}, early: {}", early(page));
                }
                again.close();
            }
            due = Some((k, staged));
            if let Death::After(last) = death {
                if step == last {
                    // The step is committed, and all that is on the device is gone.
                    let (k, staged) = due.take().unwrap();
                    update_pages_recorded(
                        &owner,
                        &k,
                        Some(updater.as_mut()),
                        staged,
                        (&mut held, here.as_ref()),
                        None,
                        &Default::default(),
                    )
                    .unwrap();
                    write_back(&owner, step, updater.as_mut(), &held, false).unwrap();
                    let lags = |page: &PageId| step - store.entry(*page).step;
                    end.behind = owner.pages().filter(|page| lags(page) > 0).count();
                    assert!(owner.pages().all(|page| lags(&page) <= store.layout().may_lag(page)), "further behind than the log reaches");
                    held.iter_mut().for_each(|h| h.at = None);
                    for page in owner.pages() {
                        (store.entry(page).step + 1..=step).for_each(|step| ramtorch_cpu::replay_page(&owner, &adamw(step), page).unwrap());
                    }
                }
            }
        }
    }
    drop((updater, reader));
    session.close();
    end.state = state_of(&store);
    end
}

/// Weights and moments of all parameters after the last step, as bits.
fn state_of(store: &Store) -> Vec<Vec<u32>> {
    use ramtorch_store::Part;
    let bits = |part| {
        let mut out = vec![0f32; store.layout().span() as usize];
        store.read_at_step(0, part, STEPS, &mut out).unwrap();
        out.into_iter().map(f32::to_bits).collect()
    };
    [Part::Weight, Part::Moment1, Part::Moment2].map(bits).into()
}

mod gang;

fn assert_same(a: &Run, b: &Run, what: &str) {
    assert_eq!(a.losses, b.losses, "{what}: losses");
    assert_eq!(a.squares, b.squares, "{what}: squares");
    assert!(a.state == b.state, "{what}: the store");
}

/// Pages come to the device during the backward pass, into memory of activations, and are updated there while the next forward
/// pass comes nearer to it.
#[test]
fn staged_pages_change_nothing() {
    for tied in [false, true] {
        let plain = run("plain", tied, "groups = 1\n", 0);
        assert!(plain.losses.windows(2).all(|w| f64::from_bits(w[1]) < f64::from_bits(w[0])), "it learns");
        for most in [1, 3, 40] {
            for alone in [false, true] {
                let staged = run_on(&format!("staged-{most}-{alone}"), tied, "groups = 1\n", (most, 0, 1, false), alone);
                assert!(staged.staged >= STEPS as usize * 3, "{} pages were staged", staged.staged);
                assert!(staged.device > 0 || !alone);
                assert_same(&staged, &plain, &format!("{most} pages a block, tied: {tied}, alone: {alone}"));
            }
        }
        let groups = run("groups", tied, "groups = 2\n", 0);
        assert_same(&run("groups-staged", tied, "groups = 2\n", 3), &groups, "two groups");
    }
}

/// Pages whose state stays on the device are published while the next step's gradients leave it.
#[test]
fn held_pages_change_nothing() {
    for tied in [false, true] {
        let plain = run("unheld", tied, "groups = 1\n", 0);
        for held in [1, 7, 30] {
            for staged in [0, 3] {
                let run = run_on(&format!("held-{held}-{staged}"), tied, "groups = 1\n", (staged, held, 1, false), false);
                assert!(run.device >= STEPS * held as u64, "{} pages by the device", run.device);
                assert_same(&run, &plain, &format!("{held} pages held, {staged} staged, tied: {tied}"));
            }
        }
        let groups = run("groups-unheld", tied, "groups = 2\n", 0);
        assert_same(&run_on("groups-held", tied, "groups = 2\n", (2, 9, 1, false), false), &groups, "two groups");
    }
}

/// The last block's sum is opened before its weights are wanted: what its held pages are made of lies there until they are.
#[test]
fn held_pages_of_the_last_block_change_nothing() {
    for groups in [1, 2] {
        let train = format!("groups = {groups}\n");
        let plain = run_on(&format!("last-unheld-{groups}"), false, &train, (0, 0, 1, true), false);
        let held = run_on(&format!("last-held-{groups}"), false, &train, (0, 3, 1, true), false);
        assert_same(&held, &plain, &format!("{groups} groups"));
    }
}

/// Pages that are written back at some steps only, and a death that takes with it what was not: it is made again from the log.
#[test]
fn a_log_of_gradients_changes_nothing() {
    for tied in [false, true] {
        // Rounded gradients stay in buffers of their own, or where their sums were.
        for (groups, sums) in [(1, false), (2, false), (1, true), (2, true)] {
            let train = format!("groups = {groups}\n");
            let plain = run_on(&format!("unlogged-{groups}-{sums}"), tied, &train, (0, 0, 1, sums), false);
            for (held, log) in [(1, 2), (9, 3), (30, 4), (30, 8)] {
                let what = format!("{held} pages held, {log} steps kept, {groups} groups, tied: {tied}, sums stay: {sums}");
                let tag = format!("log-{held}-{log}-{groups}-{sums}");
                assert_same(&run_on(&tag, tied, &train, (2, held, log, sums), false), &plain, &what);
                for last in 1..STEPS {
                    let died = run_interrupted(&format!("{tag}-{last}"), tied, &train, (0, held, log, sums), false, Death::After(last));
                    assert!(died.behind > 0 || held == 1, "no page was behind; {what}");
                    assert_same(&died, &plain, &format!("{what}, dead after step {last}"));
                }
            }
        }
    }
}

/// bf16 gradients that stay on the device have the bits of those in the segment.
#[test]
fn gradients_that_stay_on_the_device_change_nothing() {
    for tied in [false, true] {
        let segment = run("segment", tied, "groups = 1\n", 0);
        for (staged, alone) in [(0, false), (3, false), (0, true), (3, true)] {
            let train = "groups = 1\ngradients_in = \"device\"\n";
            let device = run_on(&format!("device-{staged}-{alone}"), tied, train, (staged, 0, 1, false), alone);
            assert_same(&device, &segment, &format!("{staged} staged, tied: {tied}, alone: {alone}"));
        }
    }
}

/// A step that is run again with pages of it updated already: its losses, its gradients' squares, the gradients of the other pages
/// and in the end the store are those of a run that nobody disturbed.
#[test]
fn a_step_is_run_again_with_pages_ahead_of_it() {
    for tied in [false, true] {
        for train in ["groups = 1\n", "groups = 1\ngradients = \"fp32\"\n", "groups = 2\n"] {
            let plain = run("never-early", tied, train, 0);
            let some: [&dyn Fn(PageId) -> bool; 3] = [&|page| page % 3 != 0, &|page| page > 20, &|_| true];
            for (i, early) in some.into_iter().enumerate() {
                let run = run_interrupted(&format!("early-{i}"), tied, train, (0, 0, 1, false), false, Death::Early(early));
                assert_same(&run, &plain, &format!("{train}, pages {i}, tied: {tied}"));
            }
        }
    }
}

/// Sums of several groups: in fp32 where they stay as they are, rounded after each group otherwise.
#[test]
fn gradients_of_several_groups_add_up_on_the_device() {
    let norms = |r: &Run| f64::from_bits(r.squares[0]).sqrt();
    for tied in [false, true] {
        let one = run("one", tied, "groups = 1\n", 0);
        for more in ["groups = 4\n", "groups = 2\ngradients = \"fp32\"\n"] {
            let several = run("several", tied, &format!("{more}gradients_in = \"device\"\n"), 2);
            let off = (norms(&several) / norms(&one) - 1.0).abs();
            assert!(off < 5e-3, "{more}: the first norm is off by {off}");
            assert_eq!(several.losses[0], one.losses[0], "the first step's loss does not depend on gradients");
            let last = f64::from_bits(several.losses[3]) / f64::from_bits(one.losses[3]) - 1.0;
            assert!(last.abs() < 2e-2, "{more}: the last loss is off by {last}");
        }
    }
}
