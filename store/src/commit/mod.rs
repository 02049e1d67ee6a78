//! The commit protocol: how a page, and the step record, go from one state to the next so that a reader, or a process
//! that comes after a crash, finds each of them wholly old or wholly new.
//!
//! ```text
//!              a page of rank r, and the physical pages that belong to r
//!
//!                 begin: take a spare                      publish: one atomic store
//!   ┌──────────┐  order writes        ┌────────────────┐   of {physical, turn, step}     ┌──────────────┐
//!   │ at s     │ ───────────────────▶ │ at s           │ ──────────────────────────────▶ │ at s+1       │
//!   │ live: A  │                      │ live: A        │                                 │ live: B      │
//!   │ spare: B │ ◀─────────────────── │ being filled: B│                                 │ spare: A     │
//!   └──────────┘  abandon, or death   └────────────────┘                                 └──────────────┘
//! ```
//!
//! - The live page is never written. What is written is a spare, and nothing points at a spare.
//! - *Which* pages are spare is written nowhere: it is what the page table does not point at, among the physical pages
//!   that belong to the rank. So there is no second place that could disagree after a crash, and recovery is
//!   [`Spares::recover`], which only reads.
//! - One process at a time updates the pages of a rank ([`Store::claim`](crate::Store::claim) sees to it).
//! - A reader copies the live page, then looks at the entry again. If it is unchanged, the copy is whole: before the
//!   physical page could be written again, the entry had to change, and [`Memory::order_writes`] makes that change
//!   visible first. `turn` counts publications, so an entry that was changed and changed back does not look unchanged.
//!
//! The same code runs over the mapped segment and over the model in the tests, which records each access, stops the
//! writer after every single one, and shows the reader or successor every memory that the hardware could have left.

mod cell;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod training_tests;

pub(crate) use cell::Cell;

use crate::layout::Owners;
use crate::spec::PageId;
use std::collections::VecDeque;

/// 64-bit words of memory that several processes see. A word is named by its number from the start.
///
/// Accesses to one word are never torn. Different words become visible to others in any order, but for what
/// [`publish`](Memory::publish) and [`order_writes`](Memory::order_writes) forbid.
pub(crate) trait Memory {
    /// The word, before anything read later. Sees all that was written before the [`publish`](Memory::publish) it sees.
    fn load(&self, word: usize) -> u64;
    /// The word; other reads may happen before it or after it.
    fn read(&self, word: usize) -> u64;
    /// What was read before this call was read before what is read after it.
    fn order_reads(&self);
    /// Sets the word; visible to others at some time.
    fn write(&self, word: usize, value: u64);
    /// Sets the word; everything written or published before is visible to whoever sees it.
    fn publish(&self, word: usize, value: u64);
    /// What was written or published before this call is visible to whoever sees a write after it.
    fn order_writes(&self);
}

/// Step of a page that was never published.
pub const NEVER: u64 = u64::MAX;

const PHYSICAL_BITS: u32 = 20;
const TURN_BITS: u32 = 8;
const STEP_BITS: u32 = 64 - PHYSICAL_BITS - TURN_BITS;
/// Largest step that an entry can hold. The one above it stands for [`NEVER`].
pub(crate) const STEP_MAX: u64 = (1 << STEP_BITS) - 2;

/// An entry of the page table: from the low end, 20 bits physical page, 8 bits publications (wrapping), 36 bits step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub physical: u32,
    pub turn: u8,
    pub step: u64,
}

impl Entry {
    pub fn decode(word: u64) -> Entry {
        let step = word >> (PHYSICAL_BITS + TURN_BITS);
        Entry {
            physical: (word & ((1 << PHYSICAL_BITS) - 1)) as u32,
            turn: (word >> PHYSICAL_BITS) as u8,
            step: if step > STEP_MAX { NEVER } else { step },
        }
    }

    pub fn encode(self) -> u64 {
        debug_assert!(self.physical < 1 << PHYSICAL_BITS && (self.step <= STEP_MAX || self.step == NEVER));
        let step = self.step.min(STEP_MAX + 1);
        u64::from(self.physical) | u64::from(self.turn) << PHYSICAL_BITS | step << (PHYSICAL_BITS + TURN_BITS)
    }
}

/// Why the protocol does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// No such page.
    Page(PageId),
    /// The page is another rank's.
    NotOwner { page: PageId, owner: u32 },
    /// The page is not as few steps behind as it has to be.
    Step { page: PageId, found: u64, wanted: u64 },
    /// The page was never published.
    Uninitialised(PageId),
    /// The step does not fit an entry.
    StepRange(u64),
    /// Every spare is being filled.
    NoSpare,
    /// Spares are free, but none that may be taken now.
    Pinned,
    /// The page is being updated.
    UnderWay(PageId),
    /// The ticket is not of this list of spares.
    Foreign(PageId),
    /// The entry changed during every attempt to read the page.
    Busy(PageId),
    /// The entry names a physical page that is not its rank's.
    Stray { page: PageId, physical: u32 },
    /// Two entries name the same physical page.
    Shared { page: PageId, physical: u32 },
}

/// Where the page table lies, and whose the pages are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Table {
    /// Word of the first entry.
    pub first: usize,
    /// Entries.
    pub page_count: u32,
    /// Ranks.
    pub world_size: u32,
    /// Spare pages of each.
    pub spares_per_rank: u32,
    /// By page: the rank that updates it.
    pub owners: Owners,
}

impl Table {
    /// Physical pages there are.
    pub fn physical_count(&self) -> u32 {
        self.page_count + self.world_size * self.spares_per_rank
    }

    /// Rank that updates a page.
    pub fn owner(&self, page: PageId) -> u32 {
        self.owners.of(page)
    }

    /// Rank that a physical page belongs to, for ever. At first, page p lies in physical page p.
    fn holder(&self, physical: u32) -> u32 {
        match physical.checked_sub(self.page_count) {
            None => self.owner(physical),
            Some(spare) => spare / self.spares_per_rank,
        }
    }

    /// Physical pages of a rank, ascending.
    pub fn held_by(&self, rank: u32) -> impl Iterator<Item = u32> + use<> {
        let spares = self.page_count + rank * self.spares_per_rank;
        self.owners.pages(rank).chain(spares..spares + self.spares_per_rank)
    }

    fn word(&self, page: PageId) -> usize {
        self.first + page as usize
    }

    /// Writes the entries of a new segment.
    pub fn format(&self, memory: &impl Memory) {
        for page in 0..self.page_count {
            memory.write(self.word(page), Entry { physical: page, turn: 0, step: NEVER }.encode());
        }
    }

    /// The entry of a page, checked: its physical page is one of the owner's.
    pub fn entry(&self, memory: &impl Memory, page: PageId) -> Result<Entry, Refusal> {
        if page >= self.page_count {
            return Err(Refusal::Page(page));
        }
        self.check_entry(page, memory.load(self.word(page)))
    }

    fn check_entry(&self, page: PageId, word: u64) -> Result<Entry, Refusal> {
        let entry = Entry::decode(word);
        if entry.physical >= self.physical_count() || self.holder(entry.physical) != self.owner(page) {
            return Err(Refusal::Stray { page, physical: entry.physical });
        }
        Ok(entry)
    }

    /// Checks the whole table: no physical page is named twice, or by a page of another rank.
    pub fn check(&self, memory: &impl Memory) -> Result<(), Refusal> {
        let mut used = vec![false; self.physical_count() as usize];
        for page in 0..self.page_count {
            let physical = self.entry(memory, page)?.physical;
            if std::mem::replace(&mut used[physical as usize], true) {
                return Err(Refusal::Shared { page, physical });
            }
        }
        Ok(())
    }

    /// Copies a page out. `copy` gets the physical page, and what it copied counts only once this returns `Ok`; it may
    /// run several times.
    pub fn read_page(&self, memory: &impl Memory, page: PageId, attempts: u32, mut copy: impl FnMut(u32)) -> Result<Entry, Refusal> {
        if page >= self.page_count {
            return Err(Refusal::Page(page));
        }
        let word = self.word(page);
        for attempt in 0..attempts {
            if attempt > 0 {
                std::thread::yield_now();
            }
            let before = memory.load(word);
            let entry = self.check_entry(page, before)?;
            if entry.step == NEVER {
                return Err(Refusal::Uninitialised(page));
            }
            copy(entry.physical);
            memory.order_reads();
            if memory.read(word) == before {
                return Ok(entry);
            }
        }
        Err(Refusal::Busy(page))
    }
}

/// What a page must be like to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Whatever it is: its first contents, or contents that do not follow from the old ones.
    Anything,
    /// At most so many steps behind.
    Behind(u64),
}

/// A page on its way to a new state. The physical page `new` may be written until the ticket is given back.
#[derive(Debug)]
#[must_use = "the spare page stays taken until the ticket is published or abandoned"]
pub(crate) struct Ticket {
    pub page: PageId,
    pub old: u32,
    pub new: u32,
    next: Entry,
}

/// The spare pages of one rank, known only to the process that updates its pages.
#[derive(Debug)]
pub(crate) struct Spares {
    table: Table,
    rank: u32,
    /// In the order in which they became free: the longest free is taken first, which leaves readers the most time.
    free: VecDeque<u32>,
    /// (page, physical page being filled)
    under_way: Vec<(PageId, u32)>,
}

impl Spares {
    /// Works out the spare pages of a rank from the page table. Nobody else may be updating the rank's pages.
    pub fn recover(memory: &impl Memory, table: &Table, rank: u32) -> Result<Spares, Refusal> {
        let mut used = std::collections::HashSet::new();
        for page in table.owners.pages(rank) {
            let physical = table.entry(memory, page)?.physical;
            if !used.insert(physical) {
                return Err(Refusal::Shared { page, physical });
            }
        }
        let free: VecDeque<u32> = table.held_by(rank).filter(|physical| !used.contains(physical)).collect();
        debug_assert_eq!(free.len(), table.spares_per_rank as usize);
        Ok(Spares { table: table.clone(), rank, free, under_way: Vec::new() })
    }

    /// Rank whose spares these are.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Spares that are neither live nor being filled.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a spare to write the state of `page` at `step` into. `None`: the page is at that step already (only with
    /// [`Expect::Behind`]).
    #[cfg(test)]
    pub fn begin(&mut self, memory: &impl Memory, page: PageId, step: u64, expect: Expect) -> Result<Option<Ticket>, Refusal> {
        self.begin_in(memory, page, step, expect, |_| true)
    }

    /// As `begin`, in a spare that is `usable`.
    pub fn begin_in(
        &mut self,
        memory: &impl Memory,
        page: PageId,
        step: u64,
        expect: Expect,
        usable: impl Fn(u32) -> bool,
    ) -> Result<Option<Ticket>, Refusal> {
        if step > STEP_MAX {
            return Err(Refusal::StepRange(step));
        }
        let entry = self.table.entry(memory, page)?;
        let owner = self.table.owner(page);
        if owner != self.rank {
            return Err(Refusal::NotOwner { page, owner });
        }
        if let Expect::Behind(most) = expect {
            match entry.step {
                NEVER => return Err(Refusal::Uninitialised(page)),
                at if at == step => return Ok(None),
                at if at > step || step - at > most => return Err(Refusal::Step { page, found: at, wanted: step.saturating_sub(1) }),
                _ => {}
            }
        }
        if self.under_way.iter().any(|(p, _)| *p == page) {
            return Err(Refusal::UnderWay(page));
        }
        let place = self.free.iter().position(|physical| usable(*physical));
        let none = if self.free.is_empty() { Refusal::NoSpare } else { Refusal::Pinned };
        let new = place.and_then(|place| self.free.remove(place)).ok_or(none)?;
        self.under_way.push((page, new));
        // The spare was live once, and a reader may still be copying it. Whoever sees a byte of what is written from
        // here on must also see that the entry has moved away from it.
        memory.order_writes();
        let next = Entry { physical: new, turn: entry.turn.wrapping_add(1), step };
        Ok(Some(Ticket { page, old: entry.physical, new, next }))
    }

    /// The new state is whole: makes it the page's.
    pub fn publish(&mut self, memory: &impl Memory, ticket: Ticket) -> Result<(), Refusal> {
        self.give_back(&ticket)?;
        memory.publish(self.table.word(ticket.page), ticket.next.encode());
        self.free.push_back(ticket.old);
        Ok(())
    }

    /// The new state is not wanted: the page stays as it is.
    pub fn abandon(&mut self, ticket: Ticket) -> Result<(), Refusal> {
        self.give_back(&ticket)?;
        self.free.push_back(ticket.new);
        Ok(())
    }

    fn give_back(&mut self, ticket: &Ticket) -> Result<(), Refusal> {
        let found = self.under_way.iter().position(|u| *u == (ticket.page, ticket.new));
        self.under_way.swap_remove(found.ok_or(Refusal::Foreign(ticket.page))?);
        Ok(())
    }
}
