//! The protocol stopped after every single access, over every memory that could remain; read while it is at work; and
//! made faulty on purpose, to show that these tests see it.

use super::model::{Random, Recorder, Replay, every_image, some_image};
use super::*;
use proptest::prelude::*;

/// A small store: the table, then the physical pages of `width` words each.
#[derive(Debug, Clone)]
struct Small {
    table: Table,
    width: usize,
}

impl Small {
    fn new(page_count: u32, world_size: u32, spares_per_rank: u32, width: usize) -> Small {
        Small::owned((0..page_count).map(|p| p % world_size).collect(), world_size, spares_per_rank, width)
    }

    fn owned(owners: Vec<u32>, world_size: u32, spares_per_rank: u32, width: usize) -> Small {
        let page_count = owners.len() as u32;
        Small { table: Table { first: 0, page_count, world_size, spares_per_rank, owners: owners.into() }, width }
    }

    fn words(&self) -> usize {
        self.data(self.table.physical_count())
    }

    fn data(&self, physical: u32) -> usize {
        self.table.page_count as usize + physical as usize * self.width
    }

    fn formatted(&self) -> Vec<u64> {
        let recorder = Recorder::new(vec![0; self.words()]);
        self.table.format(&recorder);
        recorder.words.into_inner()
    }

    /// What page `page` holds at `step`.
    fn content(page: PageId, step: u64, i: usize) -> u64 {
        Random(u64::from(page) << 40 ^ step << 20 ^ i as u64).next()
    }

    fn fill(&self, memory: &impl Memory, ticket: &Ticket, step: u64) {
        for i in 0..self.width {
            memory.write(self.data(ticket.new) + i, Small::content(ticket.page, step, i));
        }
    }

    /// Initialises each page at step 0 where it was never published, then brings all to `last`, as an owner that starts
    /// does. `together` pages of a rank are under way at once.
    fn run(&self, memory: &impl Memory, last: u64, together: usize) -> Result<(), Refusal> {
        for rank in 0..self.table.world_size {
            let mut spares = Spares::recover(memory, &self.table, rank)?;
            for step in 0..=last {
                let pages: Vec<PageId> = (0..self.table.page_count).filter(|p| self.table.owner(*p) == rank).collect();
                for pages in pages.chunks(together) {
                    let mut tickets = Vec::new();
                    for page in pages {
                        let at = self.table.entry(memory, *page)?.step;
                        let expect = if at == NEVER { Expect::Anything } else { Expect::Behind(1) };
                        if at == NEVER || at < step {
                            tickets.extend(spares.begin(memory, *page, step, expect)?);
                        }
                    }
                    tickets.iter().for_each(|t| self.fill(memory, t, step));
                    for ticket in tickets {
                        spares.publish(memory, ticket)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Every page is wholly at the step that its entry says, and every rank finds its spares.
    fn check(&self, words: &[u64]) -> Result<Vec<u64>, String> {
        let memory = Recorder::new(words.to_vec());
        self.table.check(&memory).map_err(|e| format!("{e:?}"))?;
        let mut steps = Vec::new();
        for page in 0..self.table.page_count {
            let entry = self.table.entry(&memory, page).map_err(|e| format!("{e:?}"))?;
            steps.push(entry.step);
            let whole = |i| words[self.data(entry.physical) + i] == Small::content(page, entry.step, i);
            if entry.step != NEVER && !(0..self.width).all(whole) {
                return Err(format!("page {page} is torn at step {}", entry.step));
            }
        }
        for rank in 0..self.table.world_size {
            let spares = Spares::recover(&memory, &self.table, rank).map_err(|e| format!("{e:?}"))?;
            if spares.free() != self.table.spares_per_rank as usize {
                return Err(format!("rank {rank} found {} spares", spares.free()));
            }
        }
        Ok(steps)
    }

    /// Stops a run everywhere. From each memory left, checks it, has a successor finish, and checks the end.
    fn stop_everywhere(&self, last: u64, together: usize, forget_order: bool) -> Result<usize, String> {
        let start = self.formatted();
        let mut recorder = Recorder::new(start.clone());
        recorder.forget_order = forget_order;
        self.run(&recorder, last, together).map_err(|e| format!("{e:?}"))?;
        let log = recorder.log.into_inner();
        let mut images = 0;
        every_image(&start, &log, |image| {
            images += 1;
            self.check(image)?;
            let successor = Recorder::new(image.to_vec());
            self.run(&successor, last, together).map_err(|e| format!("{e:?}"))?;
            match self.check(&successor.words.borrow())?.iter().all(|s| *s == last) {
                true => Ok(()),
                false => Err("the successor did not finish".into()),
            }
        })?;
        Ok(images)
    }
}

#[test]
fn a_writer_stopped_anywhere_leaves_every_page_whole_and_a_successor_finishes() {
    for world_size in 1..=3 {
        for spares in 1..=2u32 {
            for page_count in [1, 2, 3, 5] {
                let small = Small::new(page_count, world_size, spares, 3);
                let images = small.stop_everywhere(3, spares as usize, false).unwrap();
                // 4 states of each page, stopped before and after each of 3 writes and the publication at the least.
                assert!(images >= 4 * page_count as usize * 5, "{images} memories only");
            }
        }
    }
}

#[test]
fn publishing_before_the_page_is_filled_is_seen_as_torn() {
    let small = Small::new(2, 1, 1, 3);
    let start = small.formatted();
    let recorder = Recorder::new(start.clone());
    let mut spares = Spares::recover(&recorder, &small.table, 0).unwrap();
    let ticket = spares.begin(&recorder, 1, 0, Expect::Anything).unwrap().unwrap();
    let copy = Ticket { page: ticket.page, old: ticket.old, new: ticket.new, next: ticket.next };
    spares.publish(&recorder, ticket).unwrap();
    small.fill(&recorder, &copy, 0);
    let log = recorder.log.into_inner();
    let result = every_image(&start, &log, |image| small.check(image).map(|_| ()));
    assert_eq!(result.unwrap_err(), "page 1 is torn at step 0");
}

#[test]
fn owners_may_have_any_pages() {
    // A rank with a run of pages, one with a single page, one with none.
    Small::owned(vec![1, 1, 0, 1], 3, 1, 1).stop_everywhere(1, 1, false).unwrap();
}

#[test]
fn a_writer_that_does_not_order_its_writes_is_seen_to_tear_pages() {
    // One spare: the page that was live a moment ago is written next, and must not be before its entry has moved on.
    let torn = Small::new(2, 1, 1, 2).stop_everywhere(1, 1, true).unwrap_err();
    assert!(torn.contains("torn"), "{torn}");
}

#[test]
fn entries_survive_encoding_at_their_limits() {
    for physical in [0, 1, (1 << 20) - 1] {
        for turn in [0, 255] {
            for step in [0, 1, STEP_MAX, NEVER] {
                let entry = Entry { physical, turn, step };
                assert_eq!(Entry::decode(entry.encode()), entry);
            }
        }
    }
}

#[test]
fn misuse_is_refused_and_changes_nothing() {
    let small = Small::new(4, 2, 1, 2);
    let memory = Recorder::new(small.formatted());
    let mut spares = Spares::recover(&memory, &small.table, 0).unwrap();
    let before = memory.words.borrow().clone();
    let refused = |spares: &mut Spares, page, step, expect| spares.begin(&memory, page, step, expect).unwrap_err();
    assert_eq!(refused(&mut spares, 4, 0, Expect::Anything), Refusal::Page(4));
    assert_eq!(refused(&mut spares, 1, 0, Expect::Anything), Refusal::NotOwner { page: 1, owner: 1 });
    assert_eq!(refused(&mut spares, 0, 1, Expect::Behind(1)), Refusal::Uninitialised(0));
    assert_eq!(refused(&mut spares, 0, STEP_MAX + 1, Expect::Anything), Refusal::StepRange(STEP_MAX + 1));
    let ticket = spares.begin(&memory, 0, 0, Expect::Anything).unwrap().unwrap();
    assert_eq!(refused(&mut spares, 0, 0, Expect::Anything), Refusal::UnderWay(0));
    assert_eq!(refused(&mut spares, 2, 0, Expect::Anything), Refusal::NoSpare);
    let mut other = Spares::recover(&memory, &small.table, 1).unwrap();
    assert_eq!(other.publish(&memory, ticket).unwrap_err(), Refusal::Foreign(0));
    assert_eq!(*memory.words.borrow(), before);
}

#[test]
fn steps_are_taken_one_at_a_time_and_once() {
    let small = Small::new(1, 1, 1, 2);
    let memory = Recorder::new(small.formatted());
    small.run(&memory, 5, 1).unwrap();
    let mut spares = Spares::recover(&memory, &small.table, 0).unwrap();
    assert!(spares.begin(&memory, 0, 5, Expect::Behind(1)).unwrap().is_none());
    assert_eq!(spares.begin(&memory, 0, 7, Expect::Behind(1)).unwrap_err(), Refusal::Step { page: 0, found: 5, wanted: 6 });
    assert_eq!(spares.begin(&memory, 0, 4, Expect::Behind(1)).unwrap_err(), Refusal::Step { page: 0, found: 5, wanted: 3 });
    let ticket = spares.begin(&memory, 0, 6, Expect::Behind(1)).unwrap().unwrap();
    spares.abandon(ticket).unwrap();
    assert_eq!((spares.free(), small.table.entry(&memory, 0).unwrap().step), (1, 5));
}

#[test]
fn a_damaged_table_is_an_error() {
    let small = Small::new(4, 2, 1, 2);
    let with = |page: usize, entry: Entry| {
        let mut words = small.formatted();
        words[page] = entry.encode();
        Recorder::new(words)
    };
    // Outside, of the other rank, another's spare, one that is live already.
    for physical in [6, 1000, 1, 5] {
        let memory = with(2, Entry { physical, turn: 0, step: 0 });
        assert_eq!(small.table.entry(&memory, 2).unwrap_err(), Refusal::Stray { page: 2, physical });
        assert!(small.table.check(&memory).is_err() && Spares::recover(&memory, &small.table, 0).is_err());
    }
    let memory = with(2, Entry { physical: 0, turn: 0, step: 0 });
    assert_eq!(small.table.check(&memory).unwrap_err(), Refusal::Shared { page: 2, physical: 0 });
    assert_eq!(Spares::recover(&memory, &small.table, 0).unwrap_err(), Refusal::Shared { page: 2, physical: 0 });
}

/// A reader, overtaken at random: what it accepts is one state. Returns (pages accepted, copies thrown away).
fn read_while_writing(small: Small, last: u64, together: usize, seed: u64, forget_order: bool) -> Result<(usize, usize), String> {
    let recorder = Recorder::new(small.formatted());
    small.run(&recorder, 0, together).unwrap();
    let start = recorder.words.borrow().clone();
    let mut writer = Recorder::new(start.clone());
    writer.forget_order = forget_order;
    small.run(&writer, last, together).unwrap();
    let memory = Replay::new(start, &writer.log.into_inner(), Random(seed));
    let (mut accepted, mut copies, mut order) = (0, 0, Random(!seed));
    while !memory.finished() {
        let page = order.below(small.table.page_count as usize) as PageId;
        let mut copy = vec![0; small.width];
        let read = small.table.read_page(&memory, page, 50, |physical| {
            copies += 1;
            let first = order.below(small.width);
            for i in (first..small.width).chain(0..first) {
                copy[i] = memory.read(small.data(physical) + i);
            }
        });
        match read {
            Ok(entry) if (0..small.width).all(|i| copy[i] == Small::content(page, entry.step, i)) => accepted += 1,
            Ok(entry) => return Err(format!("page {page} was read torn at step {}", entry.step)),
            Err(Refusal::Busy(_)) => {}
            Err(e) => return Err(format!("{e:?}")),
        }
    }
    Ok((accepted, copies - accepted))
}

#[test]
fn readers_are_overtaken_and_see_faulty_writers() {
    let thrown_away: usize = (0..200).map(|seed| read_while_writing(Small::new(2, 1, 1, 4), 6, 1, seed, false).unwrap().1).sum();
    assert!(thrown_away > 100, "the reader was hardly ever overtaken: {thrown_away}");
    let faulty = (0..200).filter(|seed| read_while_writing(Small::new(2, 1, 1, 4), 6, 1, *seed, true).is_err()).count();
    assert!(faulty > 0, "a writer without order was never noticed");
}

proptest! {
    #[test]
    fn readers_accept_whole_states_only(pages in 1u32..7, world in 1u32..4, spares in 1u32..3, width in 1usize..9, seed: u64) {
        read_while_writing(Small::new(pages, world, spares, width), 8, spares as usize, seed, false).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn runs_stopped_again_and_again_end_where_an_undisturbed_one_ends(
        pages in 1u32..9, world in 1u32..5, spares in 1u32..4, width in 1usize..12, stops in 1usize..6, seed: u64,
    ) {
        let small = Small::new(pages, world, spares, width);
        let mut random = Random(seed);
        let mut memory = small.formatted();
        for _ in 0..stops {
            let recorder = Recorder::new(memory.clone());
            small.run(&recorder, 4, spares as usize).unwrap();
            memory = some_image(&memory, &recorder.log.into_inner(), &mut random);
            small.check(&memory).map_err(TestCaseError::fail)?;
        }
        let recorder = Recorder::new(memory);
        small.run(&recorder, 4, spares as usize).unwrap();
        let steps = small.check(&recorder.words.into_inner()).map_err(TestCaseError::fail)?;
        prop_assert!(steps.iter().all(|s| *s == 4));
    }

    #[test]
    fn any_word_in_the_table_is_an_entry_or_an_error(page in 0usize..6, word: u64) {
        let small = Small::new(6, 2, 1, 1);
        let mut words = small.formatted();
        words[page] = word;
        let memory = Recorder::new(words);
        match small.table.entry(&memory, page as PageId) {
            Ok(entry) => prop_assert!(entry.physical < small.table.physical_count()),
            Err(e) => prop_assert!(matches!(e, Refusal::Stray { .. }), "{:?}", e),
        }
        let _ = (small.table.check(&memory), Spares::recover(&memory, &small.table, 0), Spares::recover(&memory, &small.table, 1));
    }
}

const CELL: super::Cell<3> = super::Cell { selector: 0, slots: [1, 4] };

#[test]
fn a_cell_is_old_or_new_wherever_its_writer_stops() {
    let start = vec![0; 7];
    let recorder = Recorder::new(start.clone());
    let value = |n: u64| [n * 3 + 1, n * 3 + 2, n * 3 + 3];
    (0..4).for_each(|n| CELL.write(&recorder, &value(n)));
    let log = recorder.log.into_inner();
    let mut seen = std::collections::BTreeSet::new();
    every_image(&start, &log, |image| {
        let read = CELL.read(&Recorder::new(image.to_vec()));
        let whole = read == [0; 3] || (0..4).any(|n| read == value(n));
        seen.insert(read);
        if whole { Ok(()) } else { Err(format!("{read:?}")) }
    })
    .unwrap();
    assert_eq!(seen.len(), 5);
}

proptest! {
    #[test]
    fn readers_of_a_cell_see_whole_values(seed: u64) {
        let recorder = Recorder::new(vec![0; 7]);
        (1..12u64).for_each(|n| CELL.write(&recorder, &[n, n * 1000, n * 1_000_000]));
        let memory = Replay::new(vec![0; 7], &recorder.log.into_inner(), Random(seed));
        let mut last = 0;
        while !memory.finished() {
            let [a, b, c] = CELL.read(&memory);
            prop_assert!(b == a * 1000 && c == a * 1_000_000 && a >= last);
            last = a;
        }
    }
}
