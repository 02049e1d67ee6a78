//! A trainer in miniature, over the same protocol: gradients from all weights, a record of the step, pages updated from
//! the gradients. Shows that what the store promises is enough for a run that nothing can disturb.

use super::model::{Access, Random, Recorder, every_image, some_image};
use super::*;
use proptest::prelude::*;

const RECORD: super::Cell<2> = super::Cell { selector: 0, slots: [1, 3] };
const COMPUTING: u64 = 0;
const GRADIENTS_COMPLETE: u64 = 1;
const COMMITTED: u64 = 2;
const PAGES: u32 = 3;
const WIDTH: usize = 2;
const GRADIENTS: usize = 5 + PAGES as usize;
const DATA: usize = GRADIENTS + PAGES as usize * WIDTH;
const TABLE: Table = Table { first: 5, page_count: PAGES, world_size: 2, spares_per_rank: 1 };

fn data(physical: u32) -> usize {
    DATA + physical as usize * WIDTH
}

fn initial(page: PageId, i: usize) -> u64 {
    Random(u64::from(page) << 8 | i as u64).next()
}

fn start() -> Vec<u64> {
    let memory = Recorder::new(vec![0; data(TABLE.physical_count())]);
    TABLE.format(&memory);
    for rank in 0..TABLE.world_size {
        let mut spares = Spares::recover(&memory, TABLE, rank).unwrap();
        for page in (rank..PAGES).step_by(TABLE.world_size as usize) {
            let ticket = spares.begin(&memory, page, 0, Expect::Anything).unwrap().unwrap();
            (0..WIDTH).for_each(|i| memory.write(data(ticket.new) + i, initial(page, i)));
            spares.publish(&memory, ticket).unwrap();
        }
    }
    RECORD.write(&memory, &[0, COMMITTED]);
    memory.words.into_inner()
}

/// Trains to step `last` from whatever it finds.
fn train(memory: &Recorder, last: u64) {
    loop {
        let [step, phase] = RECORD.read(memory);
        match phase {
            COMMITTED if step == last => return,
            COMMITTED => RECORD.write(memory, &[step + 1, COMPUTING]),
            COMPUTING => {
                let mut sum = step;
                for page in 0..PAGES {
                    let entry = TABLE.entry(memory, page).unwrap();
                    assert_eq!(entry.step + 1, step, "page {page} was updated before the gradients were complete");
                    (0..WIDTH).for_each(|i| sum = Random(sum ^ memory.read(data(entry.physical) + i)).next());
                }
                (0..PAGES as usize * WIDTH).for_each(|i| memory.write(GRADIENTS + i, Random(sum ^ i as u64).next()));
                RECORD.write(memory, &[step, GRADIENTS_COMPLETE]);
            }
            _ => {
                for rank in 0..TABLE.world_size {
                    let mut spares = Spares::recover(memory, TABLE, rank).unwrap();
                    for page in (rank..PAGES).step_by(TABLE.world_size as usize) {
                        let Some(ticket) = spares.begin(memory, page, step, Expect::StepBefore).unwrap() else { continue };
                        for i in 0..WIDTH {
                            let gradient = memory.read(GRADIENTS + page as usize * WIDTH + i);
                            let old = memory.read(data(ticket.old) + i);
                            memory.write(data(ticket.new) + i, old.rotate_left(7).wrapping_add(gradient));
                        }
                        spares.publish(memory, ticket).unwrap();
                    }
                }
                RECORD.write(memory, &[step, COMMITTED]);
            }
        }
    }
}

fn weights(words: &[u64]) -> Vec<u64> {
    let memory = Recorder::new(words.to_vec());
    let physical = (0..PAGES).map(|p| TABLE.entry(&memory, p).unwrap().physical);
    physical.flat_map(|p| words[data(p)..data(p) + WIDTH].to_vec()).collect()
}

fn undisturbed(last: u64) -> (Vec<Access>, Vec<u64>) {
    let memory = Recorder::new(start());
    train(&memory, last);
    (memory.log.into_inner(), weights(&memory.words.into_inner()))
}

#[test]
fn a_run_stopped_anywhere_ends_with_the_same_bits() {
    let (log, expected) = undisturbed(4);
    every_image(&start(), &log, |image| {
        let successor = Recorder::new(image.to_vec());
        train(&successor, 4);
        if weights(&successor.words.borrow()) == expected { Ok(()) } else { Err(format!("other weights from {image:?}")) }
    })
    .unwrap();
}

proptest! {
    #[test]
    fn a_run_stopped_many_times_ends_with_the_same_bits(stops in 1usize..12, seed: u64) {
        let expected = undisturbed(6).1;
        let (mut memory, mut random) = (start(), Random(seed));
        for _ in 0..stops {
            let recorder = Recorder::new(memory.clone());
            train(&recorder, 6);
            memory = some_image(&memory, &recorder.log.into_inner(), &mut random);
        }
        let recorder = Recorder::new(memory);
        train(&recorder, 6);
        prop_assert_eq!(weights(&recorder.words.into_inner()), expected);
    }
}
