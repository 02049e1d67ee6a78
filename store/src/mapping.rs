//! A POSIX shared-memory object, mapped. The only place that maps memory.
//!
//! ```text
//!   create ──▶ reserved (every page allocated or an error) ──▶ mapped ──▶ drop: unmapped, the object stays
//!   open ────────────────────────────────────────────────────▶ mapped ──▶ drop
//!   unlink: the name goes at once, the memory when the last mapping does
//! ```

use crate::commit::Memory;
use crate::error::StoreError;
use crate::layout::SECTION_ALIGN;
use crate::name::SegmentName;
use crate::system;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap, shm_open, shm_unlink};
use nix::sys::stat::{Mode, SFlag, fchmod, fstat};
use ramtorch_failpoint::{Point, hit};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Bytes that one thread makes present at once, and that are reserved between two looks at pending signals.
const SLICE: u64 = 256 << 20;
/// More threads only wait for the kernel's locks.
const POPULATE_THREADS_MAX: usize = 32;

/// A mapping of a whole object. Dropping it unmaps and never unlinks.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    writable: bool,
    fd: OwnedFd,
}

// SAFETY: the mapping stays where it is until drop, and `&Mapping` gives access through raw pointers and atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes an object of `len` bytes, all zero, all allocated, readable by its user alone; `near` wishes ranges onto nodes
    /// of the machine's memory. Nothing is left behind when it fails.
    pub fn create(name: &SegmentName, len: u64, near: &[(Range<u64>, u32)]) -> Result<Mapping, StoreError> {
        let room = system::Room::now()?;
        room.check(name, len)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = shm_open(name.as_str(), flags, mode).map_err(|e| match e {
            Errno::EEXIST => StoreError::Exists(name.to_string()),
            e => StoreError::system(format!("create segment {name}"), e),
        })?;
        hit(Point::SegmentCreated);
        let made = fchmod(&fd, mode)
            .and_then(|()| nix::unistd::ftruncate(&fd, len as i64))
            .map_err(|e| StoreError::system(format!("set the size of segment {name} to {len} bytes"), e))
            .and_then(|()| Mapping::map(name, fd, len, true))
            .and_then(|mapping| {
                mapping.prefer(name, near);
                mapping.reserve(name).map(|()| mapping)
            });
        if made.is_err() {
            let _ = Mapping::unlink(name);
        }
        hit(Point::SegmentReserved);
        made
    }

    /// Maps an existing object.
    pub fn open(name: &SegmentName, writable: bool) -> Result<Mapping, StoreError> {
        // Not to be kept waiting by a pipe of that name.
        let flags = OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | if writable { OFlag::O_RDWR } else { OFlag::O_RDONLY };
        let fd = shm_open(name.as_str(), flags, Mode::empty()).map_err(|e| match e {
            Errno::ENOENT => StoreError::NotFound(name.to_string()),
            e => StoreError::system(format!("open segment {name}"), e),
        })?;
        let damaged = |reason: String| StoreError::Damaged { name: name.to_string(), reason };
        let status = fstat(&fd).map_err(|e| StoreError::system(format!("look at segment {name}"), e))?;
        if SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(damaged("it is not a regular file".into()));
        }
        if writable && status.st_uid != nix::unistd::geteuid().as_raw() {
            return Err(damaged(format!("it belongs to user {}, and is written by its own user only", status.st_uid)));
        }
        let len = u64::try_from(status.st_size).unwrap_or(0);
        if len == 0 || !len.is_multiple_of(SECTION_ALIGN) {
            return Err(damaged(format!("its length of {len} bytes is not that of a store")));
        }
        Mapping::map(name, fd, len, writable)
    }

    /// Takes the name away; a missing one is fine.
    pub fn unlink(name: &SegmentName) -> Result<(), StoreError> {
        hit(Point::SegmentUnlinking);
        match shm_unlink(name.as_str()) {
            Ok(()) | Err(Errno::ENOENT) => {
                hit(Point::SegmentUnlinked);
                Ok(())
            }
            Err(e) => Err(StoreError::system(format!("unlink segment {name}"), e)),
        }
    }

    fn map(name: &SegmentName, fd: OwnedFd, len: u64, writable: bool) -> Result<Mapping, StoreError> {
        let action = || format!("map the {len} bytes of segment {name}");
        let size = usize::try_from(len).ok().and_then(NonZeroUsize::new).ok_or_else(|| StoreError::system(action(), Errno::EINVAL))?;
        let prot = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours. The object can only be
        // read as bytes and words, of which every pattern is valid. It must not be truncated while it is mapped: the
        // format document says so, and nothing here ever truncates.
        let base = unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &fd, 0) }.map_err(|e| StoreError::system(action(), e))?.cast();
        let mapping = Mapping { base, len: size.get(), writable, fd };
        // Both are wishes: the mount decides on huge pages, and a core dump of the model helps nobody.
        for wish in [MmapAdvise::MADV_HUGEPAGE, MmapAdvise::MADV_DONTDUMP] {
            if let Err(e) = mapping.advise(0, mapping.len, wish) {
                tracing::debug!(segment = %name, ?wish, %e, "not granted");
            }
        }
        Ok(mapping)
    }

    /// Has memory of these ranges come from these nodes where they have room, once it is allocated. A wish.
    fn prefer(&self, name: &SegmentName, near: &[(Range<u64>, u32)]) {
        for (range, node) in near {
            assert!(range.start <= range.end && range.end <= self.len as u64 && range.start.is_multiple_of(SECTION_ALIGN));
            let Some(mask) = 1u64.checked_shl(*node) else { continue };
            // SAFETY: the range lies within the mapping; the call sets where its memory comes from and touches nothing. The
            // mask is one word, of which the kernel reads as many bits as it is told (one less than the number given).
            let answer = unsafe {
                libc::syscall(
                    libc::SYS_mbind,
                    self.base.as_ptr().add(range.start as usize),
                    range.end - range.start,
                    libc::MPOL_PREFERRED,
                    &raw const mask,
                    65u64,
                    0u32,
                )
            };
            if answer != 0 {
                tracing::debug!(segment = %name, node, error = %std::io::Error::last_os_error(), "memory is not placed");
                return;
            }
        }
    }

    /// Allocates every page of the object, so that no later access can fail for want of memory.
    fn reserve(&self, name: &SegmentName) -> Result<(), StoreError> {
        let no_room = |e: Errno| match (e, system::Room::now()) {
            (Errno::ENOSPC | Errno::EFAULT, Ok(room)) => {
                StoreError::ShmFull { name: name.to_string(), wanted: self.len as u64, free: room.shm_free }
            }
            (Errno::ENOMEM, Ok(room)) => StoreError::RamFull { name: name.to_string(), wanted: self.len as u64, free: room.ram_available },
            _ => StoreError::system(format!("reserve the {} bytes of segment {name}", self.len), e),
        };
        // Many threads first: faults allocate and clear in parallel, and honour the wish for huge pages, where
        // posix_fallocate is one thread's work. It then finds all there, and is the proof that nothing is missing.
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        match self.advise_in_parallel(MmapAdvise::MADV_POPULATE_WRITE, threads) {
            Ok(()) | Err(Errno::EINVAL) => {} // Linux before 5.14 does not know it
            Err(e) => return Err(no_room(e)),
        }
        for start in (0..self.len as u64).step_by(SLICE as usize) {
            let len = SLICE.min(self.len as u64 - start);
            // In slices, because a signal makes the kernel undo all that one call did.
            retry(|| nix::fcntl::posix_fallocate(&self.fd, start as i64, len as i64)).map_err(no_room)?;
        }
        Ok(())
    }

    /// Puts every page into this process's page tables, with several threads.
    pub fn populate(&self, name: &SegmentName, threads: usize) -> Result<(), StoreError> {
        let advice = if self.writable { MmapAdvise::MADV_POPULATE_WRITE } else { MmapAdvise::MADV_POPULATE_READ };
        match self.advise_in_parallel(advice, threads) {
            Err(Errno::EINVAL) => {
                // Linux before 5.14: a read of each page does the same, as the object is allocated whole.
                for offset in (0..self.len).step_by(SECTION_ALIGN as usize) {
                    std::hint::black_box(self.word(offset / 8).load(Ordering::Relaxed));
                }
                Ok(())
            }
            result => result.map_err(|e| StoreError::system(format!("make the {} bytes of segment {name} present", self.len), e)),
        }
    }

    fn advise_in_parallel(&self, advice: MmapAdvise, threads: usize) -> Result<(), Errno> {
        let next = AtomicU64::new(0);
        let work = || loop {
            let start = next.fetch_add(SLICE, Ordering::Relaxed);
            if start >= self.len as u64 {
                return Ok(());
            }
            let len = SLICE.min(self.len as u64 - start) as usize;
            if let Err(e) = retry(|| self.advise(start as usize, len, advice)) {
                next.store(self.len as u64, Ordering::Relaxed);
                return Err(e);
            }
        };
        let threads = threads.clamp(1, POPULATE_THREADS_MAX).min((self.len as u64).div_ceil(SLICE) as usize);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let first = work();
            others.into_iter().fold(first, |result, other| result.and(other.join().unwrap_or(Err(Errno::EIO))))
        })
    }

    fn advise(&self, start: usize, len: usize, advice: MmapAdvise) -> Result<(), Errno> {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: the range lies within the mapping, and none of the advices used changes its contents.
        unsafe { madvise(self.base.add(start).cast::<c_void>(), len, advice) }
    }

    /// First byte.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// May be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The object.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// The byte at `offset`, for `len` bytes.
    ///
    /// # Panics
    /// When the range is not within the mapping.
    pub fn at(&self, offset: u64, len: u64) -> *mut u8 {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len as u64), "{len} bytes at {offset} of a mapping of {}", self.len);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset as usize) }
    }

    /// Eight bytes of the mapping, as an atomic. On a read-only mapping it may be loaded, and a store is fatal.
    pub fn word(&self, index: usize) -> &AtomicU64 {
        let word = self.at(index as u64 * 8, 8).cast::<u64>();
        // SAFETY: in bounds (checked), aligned (the base is page-aligned, the offset a multiple of 8), mapped for as long
        // as `self` is borrowed; other processes access it as an atomic too, or not at all.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// Words from `first`, as atomics.
    pub fn words(&self, first: usize, count: usize) -> &[AtomicU64] {
        let words = self.at(first as u64 * 8, count as u64 * 8).cast::<AtomicU64>();
        // SAFETY: as for `word`; AtomicU64 has the layout of u64.
        unsafe { std::slice::from_raw_parts(words, count) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that mmap gave; whatever borrows from it borrows from `self`, and raw pointers handed
        // out are documented to end with the store.
        if let Err(e) = unsafe { munmap(self.base.cast::<c_void>(), self.len) } {
            tracing::warn!(%e, bytes = self.len, "a segment could not be unmapped");
        }
    }
}

impl Memory for Mapping {
    fn load(&self, word: usize) -> u64 {
        // A relaxed load and a fence instead of an acquire load: the former is defined on read-only memory.
        let value = self.word(word).load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        value
    }
    fn read(&self, word: usize) -> u64 {
        self.word(word).load(Ordering::Relaxed)
    }
    fn order_reads(&self) {
        fence(Ordering::Acquire);
    }
    fn write(&self, word: usize, value: u64) {
        debug_assert!(self.writable);
        self.word(word).store(value, Ordering::Relaxed);
    }
    fn publish(&self, word: usize, value: u64) {
        debug_assert!(self.writable);
        self.word(word).store(value, Ordering::Release);
    }
    fn order_writes(&self) {
        fence(Ordering::Release);
    }
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}
