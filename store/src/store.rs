//! A mapped segment.

use crate::commit::{Entry, Memory, NEVER, Refusal, Table};
use crate::error::StoreError;
use crate::format::{self, HEADER_WORDS, Unusable};
use crate::layout::{CONTROL_WORDS, Layout};
use crate::mapping::Mapping;
use crate::name::SegmentName;
use crate::page::PagePtrs;
use crate::record::{GENERATION, RECORD, StepPhase, StepRecord, VALUES};
use crate::spec::{MomentFormat, PageId, StoreSpec};
use ramtorch_failpoint::{Point, hit};
use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where the state of a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    /// Physical page, for [`Store::page_ptrs`].
    pub physical: u32,
    /// Step that the page is at; [`NEVER`] before it was first written.
    pub step: u64,
}

/// A mapping of a parameter store. Any number of processes may map one, and threads share a mapping freely. Dropping it
/// unmaps; the segment stays until [`Store::unlink`].
#[derive(Debug)]
pub struct Store {
    name: SegmentName,
    layout: Layout,
    table: Table,
    mapping: Mapping,
    /// Ranks claimed through this mapping.
    claims: Mutex<HashSet<u32>>,
    /// Serialises writers of the record in this process.
    record_writer: Mutex<()>,
}

impl Store {
    /// Makes a segment, mode 0600, every page of it reserved and present, all pages unwritten. `name` is that of
    /// shm_open; a missing slash in front is added.
    ///
    /// # Errors
    /// A description that cannot be laid out, a name that is taken or not a name, too little room in /dev/shm or in RAM.
    /// Nothing is left behind.
    pub fn create(name: &str, spec: &StoreSpec) -> Result<Store, StoreError> {
        Store::create_near(name, spec, &[])
    }

    /// As [`Store::create`], on a machine whose memory has several nodes: each rank's pages come from its node in `nodes`, by
    /// rank, where that has room. Without `nodes`, or where the kernel does not want to, memory comes from anywhere.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_near(name: &str, spec: &StoreSpec, nodes: &[u32]) -> Result<Store, StoreError> {
        let name = SegmentName::new(name)?;
        let layout = Layout::new(spec)?;
        let manifest = format::manifest_bytes(&layout)?;
        let started = std::time::Instant::now();
        let table = table(&layout);
        let (pages, bytes) = (layout.sections().pages.start, layout.page_bytes());
        let place = |physical: u32| pages + u64::from(physical) * bytes..pages + u64::from(physical + 1) * bytes;
        let near: Vec<_> = nodes
            .iter()
            .zip(0..layout.spec().world_size)
            .flat_map(|(node, rank)| table.held_by(rank).map(move |physical| (place(physical), *node)))
            .collect();
        let mapping = Mapping::create(&name, layout.bytes(), &near)?;
        table.format(&mapping);
        write_bytes(&mapping, layout.sections().manifest.start, &manifest);
        let header = format::header(&layout, &manifest);
        (1..HEADER_WORDS).for_each(|i| mapping.write(i, header[i]));
        hit(Point::SegmentDescribed);
        // The magic number comes last: whoever sees it sees the rest.
        mapping.publish(0, header[0]);
        hit(Point::SegmentWhole);
        tracing::info!(segment = %name, bytes = layout.bytes(), parameters = layout.parameters(), pages = layout.page_count(),
            seconds = started.elapsed().as_secs_f64(), "parameter store made");
        Ok(Store::new(name, layout, table, mapping))
    }

    /// Maps a segment for reading and writing.
    ///
    /// # Errors
    /// None of that name, another user's, or one that is not sound: every number in its header, manifest, page table and
    /// step record is checked before any is used.
    pub fn attach(name: &str) -> Result<Store, StoreError> {
        Store::open(name, true)
    }

    /// Maps a segment for reading. Nothing that the process does through this mapping can change the segment.
    ///
    /// # Errors
    /// As [`Store::attach`].
    pub fn attach_read_only(name: &str) -> Result<Store, StoreError> {
        Store::open(name, false)
    }

    fn open(name: &str, writable: bool) -> Result<Store, StoreError> {
        let name = SegmentName::new(name)?;
        let mapping = Mapping::open(&name, writable)?;
        let damaged = |reason: String| StoreError::Damaged { name: name.to_string(), reason };
        if mapping.len() < HEADER_WORDS * 8 * 2 {
            return Err(damaged(format!("{} bytes are too few for its header", mapping.len())));
        }
        // Numbers are copied before they are checked, so that they stay what they were when they were checked.
        mapping.load(0);
        let header = std::array::from_fn(|i| mapping.read(i));
        let (start, len) = format::check_header(&header, mapping.len() as u64).map_err(|unusable| match unusable {
            Unusable::Version(found) => StoreError::Version { name: name.to_string(), found, supported: format::VERSION_LOG },
            Unusable::Because(reason) => damaged(reason),
        })?;
        let manifest = read_bytes(&mapping, start, len);
        let layout = format::layout_of(&header, &manifest).map_err(damaged)?;
        let table = table(&layout);
        let store = Store::new(name, layout, table, mapping);
        store.table.check(&store.mapping).map_err(|e| store.refusal(e, None))?;
        if let Err(phase) = StepRecord::decode(&RECORD.read(&store.mapping)) {
            return Err(StoreError::Damaged {
                name: store.name().to_owned(),
                reason: format!("its step record has the unknown phase {phase}"),
            });
        }
        Ok(store)
    }

    fn new(name: SegmentName, layout: Layout, table: Table, mapping: Mapping) -> Store {
        Store { name, layout, table, mapping, claims: Mutex::default(), record_writer: Mutex::default() }
    }

    /// Takes the name of a segment away; its memory goes when the last process unmaps it. A missing one is fine.
    ///
    /// # Errors
    /// Not a name, or another user's segment.
    pub fn unlink(name: &str) -> Result<(), StoreError> {
        Mapping::unlink(&SegmentName::new(name)?)
    }

    /// Puts all of the segment into this process's page tables, with several threads, so that no access faults later.
    ///
    /// # Errors
    /// [`StoreError::System`].
    pub fn populate(&self, threads: usize) -> Result<(), StoreError> {
        self.mapping.populate(&self.name, threads)
    }

    /// Name of the segment, with the slash.
    pub fn name(&self) -> &str {
        self.name.as_str()
    }

    /// Sizes and places.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Generation of the gang that works on the store; 0 at first.
    pub fn generation(&self) -> u64 {
        self.mapping.load(GENERATION)
    }

    /// Sets the generation. On a read-only mapping it does nothing, and says so in the log.
    pub fn set_generation(&self, generation: u64) {
        if self.mapping.is_writable() {
            self.mapping.publish(GENERATION, generation);
        } else {
            tracing::error!(segment = %self.name, generation, "the generation was not set: the mapping is read-only");
        }
    }

    /// Where a page is: one atomic load, after which the page's contents at that step are visible. An entry that damage
    /// has made meaningless reads as never written.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn entry(&self, page: PageId) -> PageEntry {
        match self.table.entry(&self.mapping, page) {
            Ok(Entry { physical, step, .. }) => PageEntry { physical, step },
            Err(Refusal::Page(_)) => panic!("page {page} of {}", self.layout.page_count()),
            Err(_) => PageEntry { physical: page, step: NEVER },
        }
    }

    /// Where the arrays of a physical page begin.
    ///
    /// # Panics
    /// When there is no such physical page; those that entries and updates name are there.
    pub fn page_ptrs(&self, physical: u32) -> PagePtrs {
        let parameters = u64::from(self.layout.page_parameters());
        let moment = parameters * self.layout.spec().moments.bytes();
        let at = |offset| self.mapping.at(self.page_offset(physical) + offset, 0);
        let (m, v) = match self.layout.spec().moments {
            MomentFormat::None => (std::ptr::null_mut(), std::ptr::null_mut()),
            _ => (at(parameters * 4), at(parameters * 4 + moment)),
        };
        PagePtrs { hi: at(0).cast(), lo: at(parameters * 2).cast(), m, v }
    }

    /// Bytes from the start of the segment to a physical page.
    pub(crate) fn page_offset(&self, physical: u32) -> u64 {
        assert!(physical < self.layout.physical_count(), "physical page {physical} of {}", self.layout.physical_count());
        self.layout.sections().pages.start + u64::from(physical) * self.layout.page_bytes()
    }

    /// Where a gradient is, in the store's format, by its place in the array of gradients ([`Layout::gradient_at`]); those behind
    /// it follow. Null in a store without gradients.
    ///
    /// They are written by the ranks that reduced them, each its own part, before the step record says
    /// [`StepPhase::GradientsComplete`], and must not be written from then until it says [`StepPhase::Committed`]. Those of a
    /// page that is updated early ([`SharedOwner::update_early`](crate::SharedOwner::update_early)) must not be written from
    /// then on: the page's old weights lie there. Those in the log must not be written before the page is published at their step
    /// or a later one.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn gradient_ptr(&self, at: u64) -> *mut u8 {
        assert!(at <= self.layout.gradient_span(), "gradient {at} of {}", self.layout.gradient_span());
        match self.layout.spec().gradients.bytes() {
            0 => std::ptr::null_mut(),
            bytes => self.mapping.at(self.layout.sections().gradients.start + at * bytes, 0),
        }
    }

    /// First byte of the mapping, page-aligned; for registration with a device.
    pub fn base(&self) -> *mut u8 {
        self.mapping.base()
    }

    /// Bytes of the mapping.
    #[expect(clippy::len_without_is_empty, reason = "no store is empty")]
    pub fn len(&self) -> usize {
        self.mapping.len()
    }

    /// The exchange area, page-aligned, and its bytes. What is in it is the engine's. Read-only where the mapping is.
    pub fn exchange(&self) -> (*mut u8, usize) {
        let range = &self.layout.sections().exchange;
        (self.mapping.at(range.start, range.end - range.start), (range.end - range.start) as usize)
    }

    /// The 4096 control words, zero at creation, for barriers between ranks. To be loaded only where the mapping is
    /// read-only; a store to one would end the process.
    pub fn control(&self) -> &[AtomicU64] {
        self.mapping.words(self.layout.sections().control.start as usize / 8, CONTROL_WORDS)
    }

    /// The step record, whole. One that damage has made meaningless reads as [`StepPhase::Loading`].
    pub fn record(&self) -> StepRecord {
        let words = RECORD.read(&self.mapping);
        StepRecord::decode(&words).unwrap_or(StepRecord { step: words[0], phase: StepPhase::Loading, values: [0.0; VALUES] })
    }

    /// Replaces the step record. Everything that this thread wrote before is visible to whoever reads it. One process at
    /// a time (rank 0) may do this.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`].
    pub fn set_record(&self, record: &StepRecord) -> Result<(), StoreError> {
        if !self.mapping.is_writable() {
            return Err(StoreError::ReadOnly(self.name.to_string()));
        }
        let _writer = self.record_writer.lock().unwrap_or_else(PoisonError::into_inner);
        RECORD.write(&self.mapping, &record.encode());
        Ok(())
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    pub(crate) fn claims(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A refusal of the protocol, in the user's terms. `rank`: who asked.
    pub(crate) fn refusal(&self, refusal: Refusal, rank: Option<u32>) -> StoreError {
        let damaged = |reason: String| StoreError::Damaged { name: self.name.to_string(), reason };
        let rank = rank.unwrap_or_default();
        match refusal {
            Refusal::Page(page) => StoreError::Page { page, page_count: self.layout.page_count() },
            Refusal::NotOwner { page, owner } => StoreError::NotOwner { page, owner, rank },
            Refusal::Step { page, found, wanted } => StoreError::Step { page, found, wanted },
            Refusal::Uninitialised(page) => StoreError::Uninitialised(page),
            Refusal::StepRange(step) => StoreError::StepRange(step),
            Refusal::NoSpare => StoreError::NoSpare(rank),
            Refusal::Pinned => StoreError::Pinned(rank),
            Refusal::UnderWay(page) => StoreError::UnderWay(page),
            Refusal::Foreign(page) => StoreError::ForeignUpdate(page),
            Refusal::Busy(page) => StoreError::Busy(page),
            Refusal::Stray { page, physical } => {
                damaged(format!("page {page} is said to lie in physical page {physical}, which is not its rank's"))
            }
            Refusal::Shared { page, physical } => {
                damaged(format!("page {page} is said to lie in physical page {physical}, as another page is"))
            }
        }
    }
}

fn table(layout: &Layout) -> Table {
    Table {
        first: layout.sections().page_table.start as usize / 8,
        page_count: layout.page_count(),
        world_size: layout.spec().world_size,
        spares_per_rank: layout.spec().spare_pages_per_rank,
        owners: layout.owners().clone(),
    }
}

/// Writes bytes at a multiple of 8, zeros up to the next one.
fn write_bytes(mapping: &Mapping, start: u64, bytes: &[u8]) {
    for (i, chunk) in bytes.chunks(8).enumerate() {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        mapping.write(start as usize / 8 + i, u64::from_le_bytes(word));
    }
}

fn read_bytes(mapping: &Mapping, start: u64, len: u64) -> Vec<u8> {
    let words = mapping.words(start as usize / 8, (len as usize).div_ceil(8));
    let mut bytes: Vec<u8> = words.iter().flat_map(|w| w.load(Ordering::Relaxed).to_le_bytes()).collect();
    bytes.truncate(len as usize);
    bytes
}
