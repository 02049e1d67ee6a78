//! Interface; bodies follow.
#![allow(missing_docs, unused_variables)]
use crate::*;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;

/// Step of a page that was never published.
pub const NEVER: u64 = u64::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageEntry {
    pub physical: u32,
    /// [`NEVER`] before the first publication.
    pub step: u64,
}
#[derive(Debug, Clone, Copy)]
pub struct PagePtrs {
    pub hi: *mut u16,
    pub lo: *mut u16,
    pub m: *mut u8,
    pub v: *mut u8,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Weight,
    Moment1,
    Moment2,
}
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepPhase {
    Loading,
    Computing,
    GradientsComplete,
    Committed,
}
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    pub step: u64,
    pub phase: StepPhase,
    pub values: [f64; 24],
}
#[derive(Debug, Clone, Copy)]
pub enum MomentsRef<'a> {
    None,
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}
#[derive(Debug)]
pub enum MomentsMut<'a> {
    None,
    F32(&'a mut [f32]),
    Bf16(&'a mut [u16]),
}
#[derive(Debug, Clone, Copy)]
pub enum Gradients<'a> {
    None,
    F32(&'a [f32]),
    Bf16(&'a [u16]),
}
#[derive(Debug, Clone)]
pub struct PageView<'a> {
    pub params: Range<u64>,
    pub hi: &'a [u16],
    pub lo: &'a [u16],
    pub m: MomentsRef<'a>,
    pub v: MomentsRef<'a>,
}
#[derive(Debug)]
pub struct PageMut<'a> {
    pub params: Range<u64>,
    pub hi: &'a mut [u16],
    pub lo: &'a mut [u16],
    pub m: MomentsMut<'a>,
    pub v: MomentsMut<'a>,
}
/// An update under way: `old` and `new` are physical pages.
#[derive(Debug)]
#[must_use]
pub struct Update {
    pub(crate) page: PageId,
    pub(crate) old: u32,
    pub(crate) new: u32,
}
impl Update {
    pub fn page(&self) -> PageId {
        self.page
    }
    pub fn old(&self) -> u32 {
        self.old
    }
    pub fn new(&self) -> u32 {
        self.new
    }
}

pub struct Store {
    layout: Layout,
}
pub struct Owner<'a> {
    store: &'a Store,
}
fn soon() -> ! {
    panic!("the store is being written")
}
impl Store {
    pub fn create(name: &str, spec: &StoreSpec) -> Result<Store, StoreError> {
        soon()
    }
    pub fn attach(name: &str) -> Result<Store, StoreError> {
        soon()
    }
    pub fn attach_read_only(name: &str) -> Result<Store, StoreError> {
        soon()
    }
    pub fn unlink(name: &str) -> Result<(), StoreError> {
        soon()
    }
    pub fn populate(&self, threads: usize) -> Result<(), StoreError> {
        soon()
    }
    pub fn name(&self) -> &str {
        soon()
    }
    pub fn layout(&self) -> &Layout {
        &self.layout
    }
    pub fn generation(&self) -> u64 {
        soon()
    }
    pub fn set_generation(&self, generation: u64) {
        soon()
    }
    pub fn entry(&self, page: PageId) -> PageEntry {
        soon()
    }
    pub fn page_ptrs(&self, physical: u32) -> PagePtrs {
        soon()
    }
    pub fn gradient_ptr(&self, parameter: u64) -> *mut u8 {
        soon()
    }
    pub fn base(&self) -> *mut u8 {
        soon()
    }
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        soon()
    }
    pub fn exchange(&self) -> (*mut u8, usize) {
        soon()
    }
    pub fn control(&self) -> &[AtomicU64] {
        soon()
    }
    pub fn record(&self) -> StepRecord {
        soon()
    }
    pub fn set_record(&self, record: &StepRecord) -> Result<(), StoreError> {
        soon()
    }
    pub fn claim(&self, rank: u32) -> Result<Owner<'_>, StoreError> {
        soon()
    }
    /// Returns the least step of the pages read.
    pub fn read(&self, start: u64, part: Part, out: &mut [f32]) -> Result<u64, StoreError> {
        soon()
    }
    /// Errors unless every page read is at `step`.
    pub fn read_at_step(&self, start: u64, part: Part, step: u64, out: &mut [f32]) -> Result<(), StoreError> {
        soon()
    }
}
impl Owner<'_> {
    pub fn rank(&self) -> u32 {
        soon()
    }
    pub fn pages(&self) -> impl Iterator<Item = PageId> {
        std::iter::repeat_with(|| soon())
    }
    pub fn initialise(&mut self, page: PageId, step: u64, f: impl FnOnce(PageMut<'_>)) -> Result<(), StoreError> {
        soon()
    }
    pub fn update(&mut self, page: PageId, step: u64, f: impl FnOnce(PageView<'_>, PageMut<'_>, Gradients<'_>)) -> Result<(), StoreError> {
        let _ = self.store;
        soon()
    }
    /// For writers that are not the CPU: takes a spare; `None` when the page is at `step` already.
    pub fn begin(&mut self, page: PageId, step: u64) -> Result<Option<Update>, StoreError> {
        soon()
    }
    /// The new physical page is whole and visible: publish it.
    pub fn publish(&mut self, update: Update) -> Result<(), StoreError> {
        soon()
    }
    /// Gives the spare back.
    pub fn abandon(&mut self, update: Update) -> Result<(), StoreError> {
        soon()
    }
}

/// Identity of a process that a reused pid cannot fake.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProcessIdentity {
    pub boot_id: String,
    pub pid: u32,
    pub start_ticks: u64,
}
impl ProcessIdentity {
    pub fn current() -> Result<ProcessIdentity, StoreError> {
        soon()
    }
    pub fn of(pid: u32) -> Result<Option<ProcessIdentity>, StoreError> {
        soon()
    }
    pub fn is_alive(&self) -> bool {
        soon()
    }
}
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Registration {
    pub name: String,
    pub job: String,
    pub generation: u64,
    pub bytes: u64,
    pub owner: ProcessIdentity,
}
#[derive(Debug)]
pub struct Registry {
    pub(crate) folder: PathBuf,
}
impl Registry {
    pub fn open(folder: &Path) -> Result<Registry, StoreError> {
        soon()
    }
    /// Owner: this process. Replaces an earlier registration of the name. Call it before [`Store::create`].
    pub fn register(&self, name: &str, job: &str, generation: u64, bytes: u64) -> Result<(), StoreError> {
        let _ = &self.folder;
        soon()
    }
    pub fn forget(&self, name: &str) -> Result<(), StoreError> {
        soon()
    }
    pub fn list(&self) -> Result<Vec<Registration>, StoreError> {
        soon()
    }
    /// Unlinks and forgets every segment for which `keep` says false (as a rule `|r| r.owner.is_alive()`); returns those.
    pub fn sweep(&self, keep: impl FnMut(&Registration) -> bool) -> Result<Vec<Registration>, StoreError> {
        soon()
    }
}
pub fn shm_free_bytes() -> Result<u64, StoreError> {
    soon()
}
pub fn shm_total_bytes() -> Result<u64, StoreError> {
    soon()
}
/// The least of MemAvailable and what the memory control groups leave.
pub fn ram_available_bytes() -> Result<u64, StoreError> {
    soon()
}
