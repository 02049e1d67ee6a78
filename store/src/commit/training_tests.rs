//! A trainer in miniature, over the same protocol: gradients from all weights, a record of the step, pages updated from
//! the gradients, all at once or each as soon as its own are there. Shows that what the store promises is enough for a run that
//! nothing can disturb. One of its ways keeps a page's state to itself for some steps, and the page's gradients in a log.

use super::model::{Access, Random, Recorder, every_image, some_image};
use super::*;
use proptest::prelude::*;

const RECORD: super::Cell<3> = super::Cell { selector: 0, slots: [1, 4] };
const COMPUTING: u64 = 0;
const GRADIENTS_COMPLETE: u64 = 1;
const COMMITTED: u64 = 2;
const UPDATING: u64 = 3;
const PAGES: u32 = 3;
const WIDTH: usize = 2;
const FIRST: usize = 7;
const GRADIENTS: usize = FIRST + PAGES as usize;
/// What is told of each page's gradients: all that is needed of those that are not there any more.
const KEPT: usize = GRADIENTS + PAGES as usize * WIDTH;
/// Of the held page: the gradients of the steps that do not lie where the others' do.
const LOG: usize = KEPT + PAGES as usize;
/// Steps whose gradients of it are kept.
const STEPS: u64 = 3;
const HELD: PageId = 0;
const DATA: usize = LOG + (STEPS as usize - 1) * WIDTH;

fn table() -> Table {
    Table {
        first: FIRST,
        page_count: PAGES,
        world_size: 2,
        spares_per_rank: 1,
        owners: (0..PAGES).map(|p| p % 2).collect::<Vec<_>>().into(),
    }
}

/// How the trainer updates pages.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Pace {
    /// When all gradients are complete.
    Late,
    /// All pages but the first when their own are.
    Early,
    /// As `Early`, without keeping the old weights: a faulty trainer.
    Forgetful,
    /// As `Late`; the state of one page stays with the trainer and is written back at every [`STEPS`]th step.
    Logged,
    /// As `Logged`, one step too late: a faulty trainer.
    Tardy,
}

impl Pace {
    fn is_early(self) -> bool {
        matches!(self, Pace::Early | Pace::Forgetful)
    }

    fn is_logged(self) -> bool {
        matches!(self, Pace::Logged | Pace::Tardy)
    }

    /// The held page is written back.
    fn is_due(self, step: u64) -> bool {
        step.is_multiple_of(if self == Pace::Tardy { STEPS + 1 } else { STEPS })
    }
}

fn data(physical: u32) -> usize {
    DATA + physical as usize * WIDTH
}

fn initial(page: PageId, i: usize) -> u64 {
    Random(u64::from(page) << 8 | i as u64).next()
}

fn start() -> Vec<u64> {
    let memory = Recorder::new(vec![0; data(table().physical_count())]);
    table().format(&memory);
    for rank in 0..table().world_size {
        let mut spares = Spares::recover(&memory, &table(), rank).unwrap();
        for page in table().owners.pages(rank) {
            let ticket = spares.begin(&memory, page, 0, Expect::Anything).unwrap().unwrap();
            (0..WIDTH).for_each(|i| memory.write(data(ticket.new) + i, initial(page, i)));
            spares.publish(&memory, ticket).unwrap();
        }
    }
    RECORD.write(&memory, &[0, COMMITTED, 0]);
    memory.words.into_inner()
}

/// Place of a gradient of `step`.
fn slot(page: PageId, i: usize, step: u64, pace: Pace) -> usize {
    match (step % STEPS) as usize {
        turn if turn > 0 && page == HELD && pace.is_logged() => LOG + (turn - 1) * WIDTH + i,
        _ => GRADIENTS + page as usize * WIDTH + i,
    }
}

fn advanced(memory: &Recorder, page: PageId, old: &[u64], step: u64, pace: Pace) -> Vec<u64> {
    old.iter().enumerate().map(|(i, old)| old.rotate_left(7).wrapping_add(memory.read(slot(page, i, step, pace)))).collect()
}

/// The held page's state at `step`, made from what lies in memory and the log: what a trainer that did not die has with it.
fn held_at(memory: &Recorder, step: u64, pace: Pace) -> Vec<u64> {
    let entry = table().entry(memory, HELD).unwrap();
    let stored = (0..WIDTH).map(|i| memory.read(data(entry.physical) + i)).collect();
    (entry.step + 1..=step).fold(stored, |state: Vec<u64>, step| advanced(memory, HELD, &state, step, pace))
}

/// What the step's record tells of its gradients, made from what is told of each page's.
fn told(memory: &Recorder) -> u64 {
    (0..PAGES as usize).fold(0, |sum, page| Random(sum ^ memory.read(KEPT + page)).next())
}

/// Brings one page to `step` from its gradients, if it is not there.
fn update(memory: &Recorder, spares: &mut Spares, page: PageId, step: u64, pace: Pace, keep: bool) {
    let behind = match pace {
        Pace::Logged if page == HELD => STEPS,
        Pace::Tardy if page == HELD => STEPS + 1,
        _ => 1,
    };
    let Some(ticket) = spares.begin(memory, page, step, Expect::Behind(behind)).unwrap() else { return };
    let old: Vec<u64> = (0..WIDTH).map(|i| memory.read(data(ticket.old) + i)).collect();
    let before = if behind > 1 { held_at(memory, step - 1, pace) } else { old.clone() };
    for (i, new) in advanced(memory, page, &before, step, pace).into_iter().enumerate() {
        memory.write(data(ticket.new) + i, new);
    }
    if keep {
        (0..WIDTH).for_each(|i| memory.write(slot(page, i, step, pace), old[i]));
    }
    spares.publish(memory, ticket).unwrap();
}

/// Gradients of `step`, from the weights of the step before; those of the pages behind first.
fn sweep(memory: &Recorder, step: u64, pace: Pace, mut recorded: bool) {
    let entry = |page| table().entry(memory, page).unwrap();
    let ahead: Vec<bool> = (0..PAGES).map(|page| entry(page).step == step).collect();
    assert!(recorded || ahead.iter().all(|a| !a), "a page was updated before the record said so");
    let mut sum = step;
    for page in 0..PAGES {
        let lag = if page == HELD && pace.is_logged() { STEPS } else { 1 };
        assert!(pace == Pace::Tardy || entry(page).step <= step && step - entry(page).step <= lag);
        let held = if pace.is_logged() && page == HELD { Some(held_at(memory, step - 1, pace)) } else { None };
        for i in 0..WIDTH {
            let weight = if ahead[page as usize] { slot(page, i, step, pace) } else { data(entry(page).physical) + i };
            sum = Random(sum ^ held.as_ref().map_or_else(|| memory.read(weight), |held| held[i])).next();
        }
    }
    let mut spares: Vec<Spares> = (0..table().world_size).map(|rank| Spares::recover(memory, &table(), rank).unwrap()).collect();
    for page in (0..PAGES).rev().filter(|page| !ahead[*page as usize]) {
        let place = |i| slot(page, i, step, pace);
        (0..WIDTH).for_each(|i| memory.write(place(i), Random(sum ^ (page as usize * WIDTH + i) as u64).next()));
        let all = (0..WIDTH).fold(0, |all, i| Random(all ^ memory.read(place(i))).next());
        memory.write(KEPT + page as usize, all);
        if pace.is_early() && page > 0 {
            if !std::mem::replace(&mut recorded, true) {
                let told = RECORD.read(memory)[2];
                RECORD.write(memory, &[step, UPDATING, told]);
            }
            update(memory, &mut spares[table().owner(page) as usize], page, step, pace, pace == Pace::Early);
        }
    }
    let before = RECORD.read(memory)[2];
    RECORD.write(memory, &[step, GRADIENTS_COMPLETE, Random(before ^ told(memory)).next()]);
}

/// Trains to step `last` from whatever it finds.
fn train(memory: &Recorder, last: u64, pace: Pace) {
    loop {
        let [step, phase, told] = RECORD.read(memory);
        match phase {
            COMMITTED if step == last => return,
            COMMITTED if pace.is_early() => sweep(memory, step + 1, pace, false),
            COMMITTED => RECORD.write(memory, &[step + 1, COMPUTING, told]),
            COMPUTING => sweep(memory, step, pace, false),
            UPDATING => sweep(memory, step, pace, true),
            _ => {
                for rank in 0..table().world_size {
                    let mut spares = Spares::recover(memory, &table(), rank).unwrap();
                    let stays = |page: &PageId| pace.is_logged() && *page == HELD && step < last && !pace.is_due(step);
                    for page in table().owners.pages(rank).filter(|page| !stays(page)) {
                        update(memory, &mut spares, page, step, pace, false);
                    }
                }
                RECORD.write(memory, &[step, COMMITTED, told]);
            }
        }
    }
}

/// All weights, and what the records told.
fn weights(words: &[u64]) -> Vec<u64> {
    let memory = Recorder::new(words.to_vec());
    let physical = (0..PAGES).map(|p| table().entry(&memory, p).unwrap().physical);
    physical.flat_map(|p| words[data(p)..data(p) + WIDTH].to_vec()).chain([RECORD.read(&memory)[2]]).collect()
}

fn undisturbed(last: u64, pace: Pace) -> (Vec<Access>, Vec<u64>) {
    let memory = Recorder::new(start());
    train(&memory, last, pace);
    (memory.log.into_inner(), weights(&memory.words.into_inner()))
}

/// Stops a run everywhere, and has a successor finish from each memory left.
fn stop_everywhere(pace: Pace) -> Result<(), String> {
    let (log, expected) = undisturbed(4, pace);
    every_image(&start(), &log, |image| {
        let successor = Recorder::new(image.to_vec());
        train(&successor, 4, pace);
        if weights(&successor.words.borrow()) == expected { Ok(()) } else { Err(format!("other weights from {image:?}")) }
    })
}

#[test]
fn a_run_stopped_anywhere_ends_with_the_same_bits() {
    stop_everywhere(Pace::Late).unwrap();
}

#[test]
fn a_run_that_updates_pages_early_ends_with_the_same_bits_wherever_it_is_stopped() {
    assert_eq!(undisturbed(4, Pace::Early).1, undisturbed(4, Pace::Late).1);
    stop_everywhere(Pace::Early).unwrap();
}

#[test]
fn a_run_that_writes_a_page_back_at_some_steps_ends_with_the_same_bits_wherever_it_is_stopped() {
    assert_eq!(undisturbed(7, Pace::Logged).1, undisturbed(7, Pace::Late).1);
    stop_everywhere(Pace::Logged).unwrap();
}

#[test]
fn a_page_that_is_written_back_too_late_is_missed() {
    assert_ne!(undisturbed(7, Pace::Tardy).1, undisturbed(7, Pace::Late).1);
}

#[test]
fn old_weights_that_are_not_kept_are_missed() {
    assert_eq!(undisturbed(4, Pace::Forgetful).1, undisturbed(4, Pace::Late).1);
    assert!(stop_everywhere(Pace::Forgetful).unwrap_err().contains("other weights"));
}

proptest! {
    #[test]
    fn a_run_stopped_many_times_ends_with_the_same_bits(stops in 1usize..12, pace in 0usize..3, seed: u64) {
        let pace = [Pace::Late, Pace::Early, Pace::Logged][pace];
        let expected = undisturbed(6, Pace::Late).1;
        let (mut memory, mut random) = (start(), Random(seed));
        for _ in 0..stops {
            let recorder = Recorder::new(memory.clone());
            train(&recorder, 6, pace);
            memory = some_image(&memory, &recorder.log.into_inner(), &mut random);
        }
        let recorder = Recorder::new(memory);
        train(&recorder, 6, pace);
        prop_assert_eq!(weights(&recorder.words.into_inner()), expected);
    }
}
