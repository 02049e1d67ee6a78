//! Pages whose state is on the device before the optimizer begins.
//!
//! ```text
//!   held      stays from step to step, in memory of its own
//!   visiting  comes when a block's sum of gradients is closed, to where that was ─► updated ─► published before the sum is opened again
//!   staged    comes when a block's backward visit is done, to where activations were ─► updated ─► published before they are written again
//! ```
//! What is brought is the state that the step before has published. For pages of this rank's shares the forward pass has waited for that;
//! a page across borders of shares may belong to a rank that has no part of it in its own, whose host then runs ahead of the page.

use super::Session;
use crate::api::EngineError;
use crate::plan::{held_pages, staged_pages};
use ramtorch_device::trace::Label;
use ramtorch_device::{DevBuf, Event, HeldPage, StagedPage, Stream, staged_parts, staged_rooms, state_bytes};
use ramtorch_store::PageId;

/// Pages whose state is brought to the device during the backward pass (`plan::staging`).
pub(super) struct Staging {
    /// Pages after each block's visit, at most.
    pub(super) most: Vec<usize>,
    /// After each block's visit: the pages that are brought, and where to.
    pub(super) pages: Vec<Vec<(PageId, Vec<DevBuf>)>>,
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
        if let Some(staging) = &mut self.staging {
            // A block's output is the next one's input: it is done with before the block's visit.
            let bufs = self.saved.iter().zip(&self.boundaries).map(|(saved, output)| saved.iter().chain(output));
            let parts: Vec<Vec<DevBuf>> = bufs.map(|bufs| bufs.flat_map(|buf| staged_rooms(layout, *buf)).collect()).collect();
            let rooms: Vec<usize> = parts.iter().map(Vec::len).collect();
            let held = |page: PageId| self.held.binary_search_by_key(&page, |h| h.page).is_ok();
            let pages = staged_pages(layout, self.ranks.rank as u32, &self.model.places, &rooms, &staging.most, &held);
            let mut parts: Vec<_> = parts.into_iter().map(Vec::into_iter).collect();
            let each = staged_parts(u64::from(layout.page_parameters()));
            let mut room = |(page, block): (PageId, usize)| (page, parts[block].by_ref().take(each as usize).collect());
            staging.pages = pages.into_iter().map(|pages| pages.into_iter().map(&mut room).collect()).collect();
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

    /// Begins to bring the state of pages, of step `before`, to where activations were, when the backward visit of block `b` is over,
    /// which is enqueued.
    pub(super) fn stage(&mut self, b: usize, before: u64) -> Result<(), EngineError> {
        let Some(staging) = self.staging.as_mut().filter(|s| !s.pages[b].is_empty()) else { return Ok(()) };
        let dev = self.dev.as_ref();
        dev.record(staging.visited[b], Stream::Compute)?;
        dev.wait(Stream::CopyIn, staging.visited[b])?;
        let layout = self.store.layout();
        let bytes = state_bytes(layout.spec());
        for (page, room) in &staging.pages[b] {
            let range = layout.page_range(*page);
            self.weights.await_state(dev, *page, before)?;
            let stretch = dev.begin(Stream::CopyIn, &Label::copy("stage page", (range.end - range.start) * bytes).page(*page))?;
            let mut parts = room.iter().copied();
            staging.staged.push(StagedPage::load(dev, &self.store, *page, || parts.next())?);
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
        let staged = self.staging.iter().flat_map(|s| s.pages.iter().flatten().map(|(page, _)| *page));
        let mut pages: Vec<PageId> = staged.chain(self.held.iter().map(|h| h.page)).collect();
        pages.sort_unstable();
        pages
    }
}
