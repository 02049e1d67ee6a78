//! The state of one step, held while later steps are made.
//!
//! ```text
//!                     snapshot(s)                publish(p at s+1)                     release(p)
//!   page p at s, in A ──────────▶ A live, pinned ────────────────▶ A a spare, pinned ────────────▶ A a spare
//!                                       │                                                             ▲
//!                                       └── release(p) ──▶ A live ── publish(p at s+1) ───────────────┘
//! ```
//! A physical page can only be written once it is a spare *and* an update takes it. So the state of step s is at risk at
//! one moment alone: when an update of step s+1 (or a later one) of *any* page chooses its spare. That choice passes over
//! pinned pages, and waits where no other is free. Until the first page of step s+1 is published, no spare holds state of
//! step s at all, and nobody waits.
//!
//! A pin is known to the process that owns the pages, and ends with it; only that process writes them.

use crate::error::StoreError;
use crate::page::{MomentsRef, page_view};
use crate::read::Part;
use crate::spec::PageId;
use crate::split::join_slice;
use crate::store::Store;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Physical pages of a rank that must not be taken as spares, and who waits for them.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Snapshots that hold a physical page.
    pinned: HashMap<u32, u32>,
    /// Counts what may have made a spare usable: releases, publications.
    version: u64,
    waiting: u32,
    /// When the first of those who wait began.
    since: Option<Instant>,
    waited: Duration,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every method leaves it whole at each point where it could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn holds(&self, physical: u32) -> bool {
        self.lock().pinned.contains_key(&physical)
    }

    /// To be read before a spare is looked for, and given to [`Pins::wait`] where none was usable.
    pub(crate) fn version(&self) -> u64 {
        self.lock().version
    }

    /// A spare may have become usable.
    pub(crate) fn touch(&self) {
        self.lock().version += 1;
        self.changed.notify_all();
    }

    /// Returns once something has changed since `version`.
    pub(crate) fn wait(&self, version: u64) {
        let mut state = self.lock();
        if state.version != version {
            return;
        }
        state.waiting += 1;
        state.since.get_or_insert_with(Instant::now);
        while state.version == version {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        if state.waiting == 0 {
            if let Some(since) = state.since.take() {
                state.waited += since.elapsed();
            }
        }
    }

    /// Time for which someone has waited so far.
    pub(crate) fn waited(&self) -> Duration {
        let state = self.lock();
        state.waited + state.since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn pin(&self, physical: impl Iterator<Item = u32>) {
        let mut state = self.lock();
        physical.for_each(|p| *state.pinned.entry(p).or_default() += 1);
    }

    fn unpin(&self, physical: impl Iterator<Item = u32>) {
        let mut state = self.lock();
        for p in physical {
            if let Some(count) = state.pinned.get_mut(&p) {
                *count -= 1;
                if *count == 0 {
                    state.pinned.remove(&p);
                }
            }
        }
        drop(state);
        self.touch();
    }
}

/// The state of a rank's pages at one step, while the owner goes on: [`SharedOwner::snapshot`](crate::SharedOwner::snapshot).
/// Pages are held until they are released, all of them at the latest when it is dropped.
#[derive(Debug)]
pub struct Snapshot<'o> {
    store: &'o Store,
    pins: &'o Pins,
    step: u64,
    /// Pages that are held, and where.
    held: BTreeMap<PageId, u32>,
}

impl<'o> Snapshot<'o> {
    /// Pins the pages, which must be live now, under the lock that updates are begun under.
    pub(crate) fn of(store: &'o Store, pins: &'o Pins, step: u64, pages: impl Iterator<Item = PageId>) -> Result<Self, StoreError> {
        let mut held = BTreeMap::new();
        for page in pages {
            let entry = store.entry(page);
            if entry.step != step {
                return Err(StoreError::Step { page, found: entry.step, wanted: step });
            }
            held.insert(page, entry.physical);
        }
        pins.pin(held.values().copied());
        Ok(Snapshot { store, pins, step, held })
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Pages that it still holds, ascending: the order in which updates want their room.
    pub fn pages(&self) -> Vec<PageId> {
        self.held.keys().copied().collect()
    }

    /// Copies out parameters from `start` on, which lie in one page that is held.
    ///
    /// # Errors
    /// [`StoreError::NotHeld`], or moments of a store without.
    pub fn read(&self, start: u64, part: Part, out: &mut [f32]) -> Result<(), StoreError> {
        let layout = self.store.layout();
        let (end, span) = (start.saturating_add(out.len() as u64), layout.span());
        if end > span {
            return Err(StoreError::Parameters { start, end, span });
        }
        let Some(page) = layout.pages_of(start..end).next() else { return Ok(()) };
        let range = layout.page_range(page);
        let physical = self.held.get(&page).copied().filter(|_| end <= range.end).ok_or(StoreError::NotHeld(page))?;
        let at = (start - range.start) as usize..(end - range.start) as usize;
        // SAFETY: the physical page was live when it was pinned; a live page is not written, and a pinned one is not taken
        // as a spare, so nobody writes it while it is in `held`. Releasing it takes `&mut self`, and the claim on the
        // pages lasts as long as the owner that this borrows.
        let view = unsafe { page_view(self.store, physical, range) };
        let moments = match part {
            Part::Weight => {
                join_slice(&view.hi[at.clone()], &view.lo[at], out);
                return Ok(());
            }
            Part::Moment1 => view.m,
            Part::Moment2 => view.v,
        };
        match moments {
            MomentsRef::None => return Err(StoreError::NoMoments),
            MomentsRef::F32(x) => out.copy_from_slice(&x[at]),
            MomentsRef::Bf16(x) => out.iter_mut().zip(&x[at]).for_each(|(out, bits)| *out = f32::from_bits(u32::from(*bits) << 16)),
        }
        Ok(())
    }

    /// The state of a page is safe elsewhere: its room may be used.
    pub fn release(&mut self, page: PageId) {
        if let Some(physical) = self.held.remove(&page) {
            self.pins.unpin(std::iter::once(physical));
        }
    }
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        self.pins.unpin(std::mem::take(&mut self.held).into_values());
    }
}
