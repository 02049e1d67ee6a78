//! Pages whose state is on the device before the optimizer begins.
//!
//! ```text
//!   held      stays from step to step, in memory of its own
//!   visiting  comes when a block's sum of gradients is closed, to where that was ─► updated ─► published before the sum is opened again
//!   staged    comes when a block's backward visit is done, to where its activations were ─► updated ─► published before its forward visit
//! ```

use super::Session;
use crate::api::EngineError;
use crate::plan::{held_pages, staged_pages};
use ramtorch_device::trace::Label;
use ramtorch_device::{DevBuf, Event, HeldPage, StagedPage, Stream, staged_rooms, state_bytes};
use ramtorch_store::PageId;

/// Pages whose state is brought to the device during the backward pass (`plan::staging`).
pub(super) struct Staging {
    /// Pages of each block, at most.
    pub(super) most: Vec<usize>,
    /// Of each block: the pages that go into its activations.
    pub(super) pages: Vec<Vec<PageId>>,
    /// After each block's backward visit.
    pub(super) visited: Vec<Event>,
    /// Those of the step that is enqueued.
    pub(super) staged: Vec<StagedPage>,
}

/// A page whose state lies where block `block`'s sum was, from the end of that sum to the beginning of the next step's.
pub(super) struct Visiting {
    pub(super) block: usize,
    pub(super) page: PageId,
    pub(super) state: Vec<DevBuf>,
}

impl Session {
    /// This rank's pages are those that it may hold, and stage.
    pub(super) fn own_pages(&mut self) {
        let layout = self.store.layout();
        let rooms = std::mem::take(&mut self.held_rooms);
        let visiting = std::mem::take(&mut self.visiting_rooms);
        let mut pages = held_pages(layout, &self.weights.stay(), rooms.len() + visiting.len(), self.ranks);
        let mut others = pages.split_off(pages.len().min(rooms.len()));
        // What is not written back at every step has to stay.
        others.retain(|page| layout.may_lag(*page) == 0);
        self.held = pages.into_iter().zip(rooms).map(|(page, room)| HeldPage::new(layout, page, room)).collect();
        // The last page leaves first, and the last block's sum is wanted first.
        for (i, page) in others.iter().enumerate() {
            let (block, room) = visiting[others.len() - 1 - i];
            let held = HeldPage::visitor(layout, *page, room);
            self.visiting.push(Visiting { block, page: *page, state: held.state.clone() });
            self.held.push(held);
        }
        let parts = |bufs: &Vec<DevBuf>| bufs.iter().map(|buf| staged_rooms(layout, *buf).len()).sum();
        let rooms: Vec<usize> = self.saved.iter().map(parts).collect();
        if let Some(staging) = &mut self.staging {
            staging.pages = staged_pages(layout, self.ranks.rank as u32, &self.model.places, &rooms, &staging.most);
            for pages in &mut staging.pages {
                pages.retain(|p| self.held.binary_search_by_key(p, |h| h.page).is_err());
            }
        }
    }

    /// Begins to bring the state of pages to where block `b`'s sum of gradients was, which is closed for this step.
    pub(super) fn fetch_visiting(&self, b: usize) -> Result<(), EngineError> {
        let (dev, layout) = (self.dev.as_ref(), self.store.layout());
        let bytes = state_bytes(layout.spec());
        let mut first = true;
        for visiting in self.visiting.iter().filter(|v| v.block == b) {
            let g = self.gradients.as_ref().ok_or_else(|| EngineError::internal("this session does not train"))?;
            if std::mem::take(&mut first) {
                // Rounded, and copied back.
                dev.wait(Stream::CopyIn, g.is_free(b))?;
            }
            let range = layout.page_range(visiting.page);
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("fetch page", (range.end - range.start) * bytes).page(visiting.page))?;
            let mut parts = visiting.state.iter().copied();
            StagedPage::load(dev, &self.store, visiting.page, || parts.next())?;
            dev.end(Stream::CopyIn, stretch)?;
        }
        Ok(())
    }

    /// Begins to bring the state of pages to where activations of block `b` were, whose backward visit is enqueued.
    pub(super) fn stage(&mut self, b: usize) -> Result<(), EngineError> {
        let Some(staging) = self.staging.as_mut().filter(|s| !s.pages[b].is_empty()) else { return Ok(()) };
        let dev = self.dev.as_ref();
        dev.record(staging.visited[b], Stream::Compute)?;
        dev.wait(Stream::CopyIn, staging.visited[b])?;
        let layout = self.store.layout();
        let bytes = state_bytes(layout.spec());
        let mut parts = self.saved[b].iter().flat_map(|buf| staged_rooms(layout, *buf));
        for &page in &staging.pages[b] {
            let range = layout.page_range(page);
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("stage page", (range.end - range.start) * bytes).page(page))?;
            staging.staged.push(StagedPage::load(dev, &self.store, page, || parts.next())?);
            dev.end(Stream::CopyIn, stretch)?;
        }
        Ok(())
    }

    /// The pages whose state stays on the device, ascending, for the optimizer.
    pub fn take_held(&mut self) -> Vec<HeldPage> {
        std::mem::take(&mut self.held)
    }

    /// The pages that were staged in the step that has just ended; blocks until they are there.
    pub fn take_staged(&mut self) -> Result<Vec<StagedPage>, EngineError> {
        let staged = self.staging.as_mut().map(|s| std::mem::take(&mut s.staged)).unwrap_or_default();
        // Those that visit are there then, too.
        if !staged.is_empty() || !self.visiting.is_empty() {
            self.dev.synchronize(Stream::CopyIn)?;
        }
        Ok(staged)
    }

    /// Pages, ascending, whose state goes to the device before the optimizer begins, or stays there.
    pub fn device_pages(&self) -> Vec<PageId> {
        let staged = self.staging.iter().flat_map(|s| s.pages.iter().flatten().copied());
        let mut pages: Vec<PageId> = staged.chain(self.held.iter().map(|h| h.page)).collect();
        pages.sort_unstable();
        pages
    }
}
