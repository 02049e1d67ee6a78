//! The right to update the pages of one rank.
//!
//! ```text
//!            claim                          begin ──────▶ filling ──── publish ──▶ page at the new step
//!   free ───────────▶ claimed (Owner) ──────┘                 └─────── abandon, drop, death ──▶ page as it was
//!     ▲                    │
//!     └── drop, or death ──┘
//! ```
//! A claim is a lock of the operating system on one byte of the segment, so it ends with the process that holds it,
//! however that ends, and holds against other processes. Locks of one open file do not exclude each other; a list in
//! [`Store`] does that.

use crate::commit::{Expect, Spares, Ticket};
use crate::error::StoreError;
use crate::page::{Gradients, GradientsMut, PageMut, PageView, gradients, gradients_mut, page_mut, page_view};
use crate::snapshot::{Pins, Snapshot};
use crate::spec::PageId;
use crate::store::Store;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use ramtorch_failpoint::{Point, hit};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The right to update the pages of one rank. Ends when dropped.
#[derive(Debug)]
pub struct Owner<'a> {
    store: &'a Store,
    spares: Spares,
}

/// An update under way. Its spare may be written until it is published or abandoned; forgetting it leaves
/// the spare taken until the claim ends.
#[derive(Debug)]
#[must_use = "an update takes effect when it is published"]
pub struct Update {
    ticket: Ticket,
    step: u64,
}

impl Update {
    /// Page that is updated.
    pub fn page(&self) -> PageId {
        self.ticket.page
    }

    /// Step that it will be at.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Physical page of the present state, for [`Store::page_ptrs`]. Not to be written.
    pub fn live(&self) -> u32 {
        self.ticket.old
    }

    /// Physical page of the next state, to be written whole.
    pub fn spare(&self) -> u32 {
        self.ticket.new
    }
}

impl Store {
    /// Claims the pages of a rank. At most one claim a rank is live at any time, over all processes.
    ///
    /// # Errors
    /// [`StoreError::Claimed`], [`StoreError::Rank`], [`StoreError::ReadOnly`], or [`StoreError::Damaged`] when the page
    /// table makes no sense.
    pub fn claim(&self, rank: u32) -> Result<Owner<'_>, StoreError> {
        let world_size = self.layout().spec().world_size;
        if rank >= world_size {
            return Err(StoreError::Rank { rank, world_size });
        }
        if !self.mapping().is_writable() {
            return Err(StoreError::ReadOnly(self.name().to_owned()));
        }
        let mut claims = self.claims();
        if claims.contains(&rank) || !lock(self, rank, libc::F_WRLCK)? {
            return Err(StoreError::Claimed { name: self.name().to_owned(), rank });
        }
        match Spares::recover(self.mapping(), self.table(), rank) {
            Ok(spares) => {
                claims.insert(rank);
                Ok(Owner { store: self, spares })
            }
            Err(refusal) => {
                lock(self, rank, libc::F_UNLCK)?;
                Err(self.refusal(refusal, Some(rank)))
            }
        }
    }
}

impl Owner<'_> {
    /// The rank.
    pub fn rank(&self) -> u32 {
        self.spares.rank()
    }

    /// Its pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageId> + use<> {
        self.store.layout().pages_of_rank(self.rank())
    }

    /// Gives a page contents that do not follow from its old ones: when it is loaded, or taken back to a checkpoint. `f`
    /// gets the new page zeroed.
    ///
    /// # Errors
    /// Not a page of this rank, a step out of range, or no spare page left.
    pub fn initialise(&mut self, page: PageId, step: u64, f: impl FnOnce(PageMut<'_>)) -> Result<(), StoreError> {
        self.try_initialise(page, step, |mut new| {
            new.clear();
            f(new);
            Ok(())
        })
    }

    /// As [`Owner::initialise`], for contents that may fail to come: when `f` fails, the page stays as it was, and a
    /// page that was never written still says so. `f` writes the page whole: it finds whatever was there before.
    ///
    /// # Errors
    /// That of `f`, and those of [`Owner::initialise`].
    pub fn try_initialise<E: From<StoreError>>(
        &mut self,
        page: PageId,
        step: u64,
        f: impl FnOnce(PageMut<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(update) = self.start(page, step, Expect::Anything)? {
            let store = self.store;
            let unwinding = Unwinding { owner: self, update: Some(update) };
            if let Some(update) = &unwinding.update {
                // SAFETY: the spare belongs to the update, which this frame holds; nobody else has a reference to it.
                let new = unsafe { page_mut(store, update.spare(), store.layout().page_range(page)) };
                f(new)?;
            }
            unwinding.publish()?;
        }
        Ok(())
    }

    /// Brings a page to `step` from the step before. `f` reads the old state and the gradients and writes the new state
    /// whole; then it is published. Does nothing if the page is at `step` already. When `f` panics, the page stays as
    /// it was.
    ///
    /// The gradients of the page must not change while `f` runs.
    ///
    /// # Errors
    /// Not a page of this rank, a page that is neither at `step` nor one behind, or no spare page left.
    pub fn update(&mut self, page: PageId, step: u64, f: impl FnOnce(PageView<'_>, PageMut<'_>, Gradients<'_>)) -> Result<(), StoreError> {
        if let Some(update) = self.begin(page, step)? {
            let store = self.store;
            let range = store.layout().page_range(page);
            let unwinding = Unwinding { owner: self, update: Some(update) };
            if let Some(update) = &unwinding.update {
                // SAFETY: the old page is live, and only this owner could make it a spare again, after `f`. The new page
                // belongs to the update, which this frame holds. Writing gradients takes a raw pointer, whose
                // documentation forbids it while pages are updated.
                let (old, new, gradients) = unsafe {
                    (
                        page_view(store, update.live(), range.clone()),
                        page_mut(store, update.spare(), range.clone()),
                        gradients(store, range, step),
                    )
                };
                f(old, new, gradients);
            }
            unwinding.publish()?;
        }
        Ok(())
    }

    /// First half of [`Owner::update`], for a writer that is not a closure: takes a spare page, to be filled through
    /// [`Store::page_ptrs`] (by a device, say). As many may be under way as the rank has spares. `None`: the page is at
    /// `step` already.
    ///
    /// # Errors
    /// As [`Owner::update`].
    pub fn begin(&mut self, page: PageId, step: u64) -> Result<Option<Update>, StoreError> {
        self.start(page, step, Expect::Behind(1))
    }

    /// Second half: the new page is written whole, and everything written is visible to this thread (a device's copies
    /// have ended, say). Makes it the page's state.
    ///
    /// # Errors
    /// [`StoreError::ForeignUpdate`] for an update that another owner began.
    pub fn publish(&mut self, update: Update) -> Result<(), StoreError> {
        hit(Point::PageWritten);
        self.spares.publish(self.store.mapping(), update.ticket).map_err(|e| self.store.refusal(e, Some(self.spares.rank())))?;
        hit(Point::PagePublished);
        Ok(())
    }

    /// Leaves the page as it is and gives the spare back.
    ///
    /// # Errors
    /// As [`Owner::publish`].
    pub fn abandon(&mut self, update: Update) -> Result<(), StoreError> {
        self.spares.abandon(update.ticket).map_err(|e| self.store.refusal(e, Some(self.spares.rank())))
    }

    fn start(&mut self, page: PageId, step: u64, expect: Expect) -> Result<Option<Update>, StoreError> {
        self.start_in(page, step, expect, |_| true)
    }

    fn start_in(&mut self, page: PageId, step: u64, expect: Expect, usable: impl Fn(u32) -> bool) -> Result<Option<Update>, StoreError> {
        let begun = self.spares.begin_in(self.store.mapping(), page, step, expect, usable);
        let ticket = begun.map_err(|e| self.store.refusal(e, Some(self.spares.rank())))?;
        if ticket.is_some() {
            hit(Point::PageBegun);
        }
        Ok(ticket.map(|ticket| Update { ticket, step }))
    }
}

impl Drop for Owner<'_> {
    fn drop(&mut self) {
        let mut claims = self.store.claims();
        if let Err(error) = lock(self.store, self.rank(), libc::F_UNLCK) {
            tracing::warn!(segment = self.store.name(), rank = self.rank(), %error, "a claim ends with the process only");
        }
        claims.remove(&self.rank());
    }
}

/// An [`Owner`] for several threads, which update different pages at the same time. As many updates may be under way as
/// the rank has spares; it is locked to begin and to publish, not in between.
#[derive(Debug)]
pub struct SharedOwner<'a> {
    store: &'a Store,
    /// Never handed out, so the claim lasts as long as this value.
    owner: Mutex<Owner<'a>>,
    /// Spares that hold state which a snapshot needs.
    pins: Pins,
}

/// Answer of [`SharedOwner::try_begin`].
#[derive(Debug)]
#[must_use = "an update takes effect when it is published"]
pub enum Begun {
    /// It is under way.
    Update(Update),
    /// The page is at the step already.
    Done,
    /// A snapshot holds every spare that is free.
    Pinned,
}

/// Answer of [`SharedOwner::update_early`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Early {
    /// It is published.
    Published,
    /// The page is at the step already.
    Done,
    /// A snapshot holds every spare that is free: nothing was done.
    Pinned,
}

impl<'a> SharedOwner<'a> {
    /// Shares an owner.
    pub fn new(owner: Owner<'a>) -> SharedOwner<'a> {
        SharedOwner { store: owner.store, owner: Mutex::new(owner), pins: Pins::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Owner<'a>> {
        // Every method of an owner leaves it whole at each point where it could panic.
        self.owner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store.
    pub fn store(&self) -> &'a Store {
        self.store
    }

    /// Its pages, ascending.
    pub fn pages(&self) -> impl Iterator<Item = PageId> + use<> {
        self.lock().pages()
    }

    /// As [`Owner::update`], for a closure that may fail: then the page stays as it was. `false`: it is at `step` already.
    ///
    /// # Errors
    /// That of `f`, and those of [`Owner::update`].
    pub fn update<E: From<StoreError>>(
        &self,
        page: PageId,
        step: u64,
        f: impl FnOnce(PageView<'_>, PageMut<'_>, Gradients<'_>) -> Result<(), E>,
    ) -> Result<bool, E> {
        let Some(update) = self.begin(page, step)? else { return Ok(false) };
        let range = self.store.layout().page_range(page);
        let mut unwinding = SharedUnwinding { owner: self, update: Some(update) };
        if let Some(update) = &unwinding.update {
            // SAFETY: the old page is live, and only the owner could make it a spare again, when this very update is
            // published, after `f`. The new page belongs to the update, which this frame holds; the claim cannot end
            // while `self` is borrowed. Writing gradients takes a raw pointer, whose documentation forbids it now.
            let (old, new, gradients) = unsafe {
                (
                    page_view(self.store, update.live(), range.clone()),
                    page_mut(self.store, update.spare(), range.clone()),
                    gradients(self.store, range, step),
                )
            };
            f(old, new, gradients)?;
        }
        if let Some(update) = unwinding.update.take() {
            self.publish(update)?;
        }
        Ok(true)
    }

    /// As [`SharedOwner::update`], at a time when a successor may still need the weights of the step before: once the new state
    /// is whole, and before it is published, `keep` puts the old weights where the page's gradients were. So whoever finds
    /// the page at `step` finds them there. Does not wait for snapshots.
    ///
    /// The record must say [`StepPhase::Updating`](crate::StepPhase::Updating) of `step`. All of the page's gradients must be in
    /// their place, nobody may read or write them from now until the record says that those of all pages are complete, and
    /// nobody in this gang may read the old weights any more.
    ///
    /// # Errors
    /// That of `f`, and those of [`Owner::update`].
    pub fn update_early<E: From<StoreError>>(
        &self,
        page: PageId,
        step: u64,
        f: impl FnOnce(PageView<'_>, PageMut<'_>, Gradients<'_>) -> Result<(), E>,
        keep: impl FnOnce(PageView<'_>, GradientsMut<'_>),
    ) -> Result<Early, E> {
        let update = match self.try_begin(page, step)? {
            Begun::Update(update) => update,
            Begun::Done => return Ok(Early::Done),
            Begun::Pinned => return Ok(Early::Pinned),
        };
        let range = self.store.layout().page_range(page);
        let mut unwinding = SharedUnwinding { owner: self, update: Some(update) };
        if let Some(update) = &unwinding.update {
            // SAFETY: as in `update`. Gradients are read by `f` and written by `keep`, one after the other, and by nobody else
            // (contract of this function); the old page is only read by both.
            unsafe {
                let old = || page_view(self.store, update.live(), range.clone());
                f(old(), page_mut(self.store, update.spare(), range.clone()), gradients(self.store, range.clone(), step))?;
                keep(old(), gradients_mut(self.store, range.clone(), step));
            }
            hit(Point::EarlyKept);
        }
        if let Some(update) = unwinding.update.take() {
            // A release: whoever sees the new entry sees the old weights in their place.
            self.publish(update)?;
        }
        Ok(Early::Published)
    }

    /// As [`Owner::begin`]. Waits while a [`Snapshot`] holds every spare that is free.
    ///
    /// # Errors
    /// As [`Owner::begin`].
    pub fn begin(&self, page: PageId, step: u64) -> Result<Option<Update>, StoreError> {
        self.start(page, step, Expect::Behind(1))
    }

    /// As [`SharedOwner::begin`], for a state that was made elsewhere: the page may be as many steps behind as its log has
    /// ([`GradientLog::steps`](crate::GradientLog)).
    ///
    /// # Errors
    /// As [`Owner::begin`].
    pub fn begin_behind(&self, page: PageId, step: u64) -> Result<Option<Update>, StoreError> {
        self.start(page, step, Expect::Behind(self.store.layout().may_lag(page) + 1))
    }

    fn start(&self, page: PageId, step: u64, expect: Expect) -> Result<Option<Update>, StoreError> {
        loop {
            let version = self.pins.version();
            match self.try_start(page, step, expect)? {
                Begun::Update(update) => return Ok(Some(update)),
                Begun::Done => return Ok(None),
                // Not under the lock: others publish meanwhile.
                Begun::Pinned => self.pins.wait(version),
            }
        }
    }

    /// As [`SharedOwner::begin`], without waiting.
    ///
    /// # Errors
    /// As [`Owner::begin`].
    pub fn try_begin(&self, page: PageId, step: u64) -> Result<Begun, StoreError> {
        self.try_start(page, step, Expect::Behind(1))
    }

    fn try_start(&self, page: PageId, step: u64, expect: Expect) -> Result<Begun, StoreError> {
        let begun = self.lock().start_in(page, step, expect, |physical| !self.pins.holds(physical));
        match begun {
            Ok(Some(update)) => Ok(Begun::Update(update)),
            Ok(None) => Ok(Begun::Done),
            Err(StoreError::Pinned(_)) => Ok(Begun::Pinned),
            Err(e) => Err(e),
        }
    }

    /// Holds the state of all pages, which must be at `step`, while they are updated: what an update would overwrite is
    /// not overwritten before it is released. Every other part of an update goes on.
    ///
    /// # Errors
    /// [`StoreError::Step`] for a page at another step.
    pub fn snapshot(&self, step: u64) -> Result<Snapshot<'_>, StoreError> {
        let owner = self.lock();
        Snapshot::of(self.store, &self.pins, step, owner.pages())
    }

    /// Time in which at least one update waited for a snapshot, since this owner was made.
    pub fn waited(&self) -> Duration {
        self.pins.waited()
    }

    /// As [`Owner::publish`].
    ///
    /// # Errors
    /// As [`Owner::publish`].
    pub fn publish(&self, update: Update) -> Result<(), StoreError> {
        self.lock().publish(update)?;
        self.pins.touch();
        Ok(())
    }

    /// As [`Owner::abandon`].
    ///
    /// # Errors
    /// As [`Owner::publish`].
    pub fn abandon(&self, update: Update) -> Result<(), StoreError> {
        self.lock().abandon(update)?;
        self.pins.touch();
        Ok(())
    }
}

/// Gives the spare back when a closure fails or panics.
struct SharedUnwinding<'o, 's> {
    owner: &'o SharedOwner<'s>,
    update: Option<Update>,
}

impl Drop for SharedUnwinding<'_, '_> {
    fn drop(&mut self) {
        if let Some(update) = self.update.take() {
            // It was begun by this very owner, so there is nothing to refuse.
            let _ = self.owner.abandon(update);
        }
    }
}

/// Gives the spare back when a closure fails or panics.
struct Unwinding<'o, 's> {
    owner: &'o mut Owner<'s>,
    update: Option<Update>,
}

impl Unwinding<'_, '_> {
    fn publish(mut self) -> Result<(), StoreError> {
        match self.update.take() {
            Some(update) => self.owner.publish(update),
            None => Ok(()),
        }
    }
}

impl Drop for Unwinding<'_, '_> {
    fn drop(&mut self) {
        if let Some(update) = self.update.take() {
            // It was begun by this very owner, so there is nothing to refuse.
            let _ = self.owner.abandon(update);
        }
    }
}

/// Locks (`F_WRLCK`) or unlocks (`F_UNLCK`) the byte of a rank. `false`: another process has it.
fn lock(store: &Store, rank: u32, kind: i32) -> Result<bool, StoreError> {
    let range = libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: rank.into(), l_len: 1, l_pid: 0 };
    match fcntl(store.mapping().fd(), FcntlArg::F_OFD_SETLK(&range)) {
        Ok(_) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(e) => Err(StoreError::system(format!("lock the pages of rank {rank} in segment {}", store.name()), e)),
    }
}
