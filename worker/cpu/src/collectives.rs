//! Deterministic collectives between the processes of one node, through the store's shared memory.
//!
//! ```text
//!   barrier:  every rank writes (generation, count) into its own word, then waits for all words to reach it.
//!             Words only grow, and a gang's generation is larger than its predecessor's: what a killed gang left
//!             behind never counts, and nothing needs to be reset.
//!   gather, reduce:  piece by piece, alternating between two halves of the exchange area:
//!             copy own piece in ── barrier ── copy the pieces of the others, or add them up in rank order
//! ```
//! One barrier a piece is enough: a half is written again two pieces later, after a barrier that its readers pass
//! only when they are done.
//!
//! Progress: a rank tells how far it is with one word, and nobody waits for it but by looking. What it wrote before it told,
//! whoever looks can read. Behind the exchange area's part for collectives lie numbers that a step keeps for a gang that has to
//! begin it anew ([`Collectives::kept`]).

use crate::memory::{Bf16, Elem};
use crate::parameters::add_scratch;
use ramtorch_device::{EngineError, Gang, Ranks};
use ramtorch_store::{GradientFormat, Gradients, Store};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Ranks that the control words have room for.
pub const MAX_RANKS: usize = 64;
const VALUES: usize = 4;
const VALUES_AT: usize = 1024;
/// Behind the values of 4 channels, in two halves each.
const PROGRESS_AT: usize = VALUES_AT + 4 * 2 * MAX_RANKS * VALUES;

/// Above the count of a word.
const GENERATION_SHIFT: u32 = 40;

/// Independent sequences of collectives: one for each thread that takes part in some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The step loop.
    Step = 0,
    /// Collectives of CPU devices (their stream to peers).
    Peers = 1,
    /// The optimizer.
    Optimizer = 2,
    /// Checkpoints.
    Checkpoint = 3,
}

/// One rank's part in the collectives of a gang.
pub struct Collectives {
    store: Arc<Store>,
    rank: usize,
    world: usize,
    generation: u64,
    counts: [AtomicU64; 4],
    aborted: AtomicBool,
    /// Start of the exchange area, and f32 elements of one rank's half of it.
    exchange: usize,
    half: usize,
}

impl Collectives {
    /// `generation` counts gangs: larger than that of any earlier gang on this store.
    pub fn new(store: Arc<Store>, rank: usize, world: usize, generation: u64) -> Collectives {
        assert!(rank < world && world <= MAX_RANKS, "rank {rank} of {world}: at most {MAX_RANKS}");
        let (exchange, bytes) = store.exchange();
        let half = (bytes as u64).min(Self::exchange_bytes(world)) as usize / 4 / world / 2;
        Collectives {
            rank,
            world,
            generation,
            counts: Default::default(),
            aborted: AtomicBool::new(false),
            exchange: exchange as usize,
            half,
            store,
        }
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Ranks.
    pub fn world(&self) -> usize {
        self.world
    }

    /// Bytes of exchange area that `world` ranks use well.
    pub fn exchange_bytes(world: usize) -> u64 {
        if world == 1 { 0 } else { world as u64 * 2 * (1 << 20) }
    }

    /// Bytes of exchange area that `count` numbers take which outlive the gang.
    pub fn kept_bytes(count: u64) -> u64 {
        (count * 8).next_multiple_of(4096)
    }

    /// Numbers that outlive the gang, as many as the store has room for behind what collectives use: f64 as bits. Whoever is
    /// told of a rank's progress can read what that rank wrote here before.
    pub fn kept(&self) -> &[AtomicU64] {
        let (start, bytes) = self.store.exchange();
        let used = Self::exchange_bytes(self.world) as usize;
        if bytes <= used {
            return &[];
        }
        // SAFETY: page-aligned words of the exchange area, behind those that pieces of collectives lie in (`new`); the mapping
        // lives as long as the store that `self` holds; everyone accesses them as atomics.
        unsafe { std::slice::from_raw_parts(start.add(used).cast::<AtomicU64>(), (bytes - used) / 8) }
    }

    /// Tells the others that this rank has come to `count`, which may not be less than before.
    pub fn tell_progress(&self, count: u64) {
        let word = &self.store.control()[PROGRESS_AT + self.rank];
        word.store(self.generation << GENERATION_SHIFT | count, Ordering::Release);
    }

    /// How far the rank is that is least far; 0 where one of them has told nothing yet.
    ///
    /// # Errors
    /// This rank has given up, or a newer gang is at work.
    pub fn progress(&self) -> Result<u64, EngineError> {
        let mut least = u64::MAX;
        for word in &self.store.control()[PROGRESS_AT..PROGRESS_AT + self.world] {
            let told = word.load(Ordering::Acquire);
            let generation = told >> GENERATION_SHIFT;
            if generation > self.generation {
                self.abort();
                return Err(EngineError::internal("a newer gang works on this parameter store"));
            }
            let count = told & ((1 << GENERATION_SHIFT) - 1);
            least = least.min(if generation == self.generation { count } else { 0 });
        }
        if self.aborted() { Err(EngineError::internal("this rank has given up, after an error of its own")) } else { Ok(least) }
    }

    /// Makes every wait of this rank end with an error, now and later: this rank gives up.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
    }

    /// Whether [`Collectives::abort`] was called.
    pub fn aborted(&self) -> bool {
        self.aborted.load(Ordering::Acquire)
    }

    /// Returns once every rank has come here.
    ///
    /// # Errors
    /// This rank has given up meanwhile.
    pub fn barrier(&self, channel: Channel) -> Result<(), EngineError> {
        self.arrive(channel)
    }

    fn arrive(&self, channel: Channel) -> Result<(), EngineError> {
        let gave_up = || EngineError::internal("this rank has given up, after an error of its own");
        if self.aborted() {
            return Err(gave_up());
        }
        let count = self.counts[channel as usize].fetch_add(1, Ordering::Relaxed) + 1;
        if self.world == 1 {
            return Ok(());
        }
        let mine = (self.generation << GENERATION_SHIFT) | count;
        let words = &self.store.control()[channel as usize * MAX_RANKS..][..self.world];
        words[self.rank].store(mine, Ordering::Release);
        for word in words {
            let mut tries = 0u32;
            loop {
                let theirs = word.load(Ordering::Acquire);
                if theirs >> GENERATION_SHIFT > self.generation {
                    // This process should have been dead before they started; it must not take their word for its peer's.
                    self.abort();
                    return Err(EngineError::internal("a newer gang works on this parameter store"));
                }
                if theirs >= mine {
                    break;
                }
                tries += 1;
                match tries {
                    0..64 => std::hint::spin_loop(),
                    64..2048 => std::thread::yield_now(),
                    _ if self.aborted() => return Err(gave_up()),
                    _ => std::thread::sleep(Duration::from_micros(50)),
                }
            }
        }
        Ok(())
    }

    /// Everyone's values, by rank.
    ///
    /// # Errors
    /// As [`Collectives::barrier`].
    pub fn gather(&self, channel: Channel, values: [f64; VALUES]) -> Result<Vec<[f64; VALUES]>, EngineError> {
        if self.world == 1 {
            return Ok(vec![values]);
        }
        // The next count's parity chooses the half: a rank that runs ahead by one gather writes the other one.
        let parity = (self.counts[channel as usize].load(Ordering::Relaxed) & 1) as usize;
        let base = VALUES_AT + (channel as usize * 2 + parity) * MAX_RANKS * VALUES;
        let words = &self.store.control()[base..base + MAX_RANKS * VALUES];
        for (w, v) in words[self.rank * VALUES..].iter().zip(values) {
            w.store(v.to_bits(), Ordering::Relaxed);
        }
        self.arrive(channel)?;
        Ok((0..self.world).map(|r| std::array::from_fn(|i| f64::from_bits(words[r * VALUES + i].load(Ordering::Relaxed)))).collect())
    }

    /// This half of `rank`'s part of the exchange area.
    fn area(&self, rank: usize) -> *mut f32 {
        let parity = (self.counts[Channel::Peers as usize].load(Ordering::Relaxed) & 1) as usize;
        (self.exchange + ((parity * self.world + rank) * self.half) * 4) as *mut f32
    }

    /// Elements of size `size` that each of `parts` parts of a piece has.
    fn piece(&self, size: usize, parts: usize) -> Result<usize, EngineError> {
        match self.half * 4 / size / parts {
            0 => Err(EngineError::internal(format!("{} ranks have an exchange area of {} elements each", self.world, self.half))),
            n => Ok(n),
        }
    }

    /// Sums this rank's share of `buf` over ranks, in rank order; `add` adds a piece to a sum, `put` makes an element of one.
    fn scatter<T: Copy>(
        &self,
        buf: &mut [T],
        add: impl Fn(&[T], &mut Vec<f32>, bool),
        put: impl Fn(&[f32], &mut [T]),
    ) -> Result<(), EngineError> {
        if self.world == 1 {
            return Ok(());
        }
        let share = buf.len() / self.world;
        let piece = self.piece(size_of::<T>(), self.world)?;
        let mut sum = Vec::new();
        for at in (0..share).step_by(piece) {
            let n = piece.min(share - at);
            let areas: Vec<*mut T> = (0..self.world).map(|r| self.area(r).cast()).collect();
            for to in 0..self.world {
                // SAFETY: this half of this rank's part of the exchange area is written by this rank alone, and its
                // readers of two pieces ago have passed a barrier since (module text). In bounds by `piece`.
                unsafe { std::slice::from_raw_parts_mut(areas[self.rank].add(to * piece), n) }
                    .copy_from_slice(&buf[to * share + at..][..n]);
            }
            self.arrive(Channel::Peers)?;
            for (rank, area) in areas.iter().enumerate() {
                // SAFETY: written before the barrier, not again before the next one.
                add(unsafe { std::slice::from_raw_parts(area.add(self.rank * piece), n) }, &mut sum, rank == 0);
            }
            put(&sum, &mut buf[self.rank * share + at..][..n]);
        }
        Ok(())
    }
}

impl Gang for Collectives {
    fn ranks(&self) -> Ranks {
        Ranks { rank: self.rank, world: self.world }
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<(), EngineError> {
        // Values are floats: four bytes are exact in each.
        for part in bytes.chunks_mut(4 * VALUES) {
            let mut values = [0f64; VALUES];
            for (v, four) in values.iter_mut().zip(part.chunks(4)) {
                *v = four.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)).into();
            }
            let first = self.gather(Channel::Step, values)?[0];
            for (v, four) in first.iter().zip(part.chunks_mut(4)) {
                let n = four.len();
                four.copy_from_slice(&(*v as u32).to_be_bytes()[4 - n..]);
            }
        }
        Ok(())
    }

    fn aborted(&self) -> bool {
        Collectives::aborted(self)
    }

    fn abort(&self) {
        Collectives::abort(self);
    }

    fn all_gather(&self, buf: &mut [u8]) -> Result<(), EngineError> {
        if self.world == 1 {
            return Ok(());
        }
        let share = buf.len() / self.world;
        let piece = self.piece(1, 1)?;
        for at in (0..share).step_by(piece) {
            let n = piece.min(share - at);
            let areas: Vec<*mut u8> = (0..self.world).map(|r| self.area(r).cast()).collect();
            // SAFETY: as in `scatter`.
            unsafe { std::slice::from_raw_parts_mut(areas[self.rank], n) }.copy_from_slice(&buf[self.rank * share + at..][..n]);
            self.arrive(Channel::Peers)?;
            for (rank, area) in areas.iter().enumerate().filter(|(rank, _)| *rank != self.rank) {
                // SAFETY: as in `scatter`.
                buf[rank * share + at..][..n].copy_from_slice(unsafe { std::slice::from_raw_parts(*area, n) });
            }
        }
        Ok(())
    }

    fn reduce_scatter(&self, buf: &mut [f32]) -> Result<(), EngineError> {
        let add = |theirs: &[f32], sum: &mut Vec<f32>, first: bool| {
            if first {
                sum.clear();
                sum.extend_from_slice(theirs);
            } else {
                add_scratch(theirs, sum);
            }
        };
        self.scatter(buf, add, |sum, out| out.copy_from_slice(sum))
    }

    fn reduce_scatter_bf16(&self, buf: &mut [u16]) -> Result<(), EngineError> {
        let add = |theirs: &[u16], sum: &mut Vec<f32>, first: bool| {
            if first {
                sum.clear();
                sum.resize(theirs.len(), 0.0);
            }
            sum.iter_mut().zip(theirs).for_each(|(s, x)| *s += Bf16(*x).get());
        };
        self.scatter(buf, add, |sum, out| out.iter_mut().zip(sum).for_each(|(o, s)| *o = Bf16::put(*s).0))
    }
}

/// Reads the gradients of page `page` at `step`. Only its owner calls this, after the reduction of the whole step.
pub fn read_gradients<R>(store: &Store, page: u32, step: u64, f: impl FnOnce(Gradients<'_>) -> R) -> R {
    read_gradient_range(store, store.layout().page_range(page), step, f)
}

/// Reads the gradients of parameters `range` at `step`, which lie in one piece
/// ([`Layout::gradient_parts`](ramtorch_store::Layout::gradient_parts)); nobody writes them meanwhile.
///
/// # Panics
/// Where the range lies outside the store or in several pieces: a defect of the engine.
pub fn read_gradient_range<R>(store: &Store, range: Range<u64>, step: u64, f: impl FnOnce(Gradients<'_>) -> R) -> R {
    let layout = store.layout();
    assert!(range.start <= range.end && range.end <= layout.span(), "gradients {range:?} outside the store");
    assert!(layout.gradient_parts(range.clone()).len() <= 1, "gradients {range:?} in pieces");
    let n = (range.end - range.start) as usize;
    let p = store.gradient_ptr(layout.gradient_at(range.start, step));
    match store.layout().spec().gradients {
        GradientFormat::None => f(Gradients::None),
        // SAFETY: in bounds of the gradient array; whoever may write this range is done, and it is read now.
        GradientFormat::F32 => f(Gradients::F32(unsafe { std::slice::from_raw_parts(p.cast(), n) })),
        // SAFETY: as above.
        GradientFormat::Bf16 => f(Gradients::Bf16(unsafe { std::slice::from_raw_parts(p.cast(), n) })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_store::{BlockSpec, GradientLog, MomentFormat, StoreSpec, TensorSpec};

    fn store(tag: &str) -> Arc<Store> {
        let tensor = TensorSpec { name: "w".into(), shape: vec![64], joined: false, decay: true };
        let spec = StoreSpec {
            blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor] }],
            world_size: 2,
            moments: MomentFormat::F32,
            gradients: GradientFormat::F32,
            page_parameters: Some(1024),
            spare_pages_per_rank: 1,
            exchange_bytes: 4096,
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        let name = format!("/ramtorch-collectives-{tag}-{}", std::process::id());
        let _ = Store::unlink(&name);
        let store = Store::create(&name, &spec).unwrap();
        Store::unlink(&name).unwrap();
        Arc::new(store)
    }

    /// A rank that outlives its gang must not take the word of its successor's gang for its peer's.
    #[test]
    fn a_rank_that_outlives_its_gang_stops_at_the_next_barrier() {
        let store = store("fence");
        let late = Collectives::new(store.clone(), 0, 2, 3);
        let new = Collectives::new(store, 1, 2, 4);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| new.barrier(Channel::Step));
            let mut refused = late.barrier(Channel::Step);
            // Until the other thread has arrived, the late rank waits for its dead peer.
            while refused.is_ok() {
                refused = late.barrier(Channel::Step);
            }
            assert!(refused.unwrap_err().message.contains("newer gang"));
            assert!(late.barrier(Channel::Optimizer).is_err(), "it has given up for good");
            new.abort();
            assert!(waits.join().unwrap().is_err(), "the new gang's peer has not come");
        });
    }

    /// Runs `f` as each of `world` ranks at once; what it made, by rank.
    fn gang<T: Send>(tag: &str, world: usize, f: impl Fn(&Collectives) -> T + Sync) -> Vec<T> {
        let store = store(&format!("{tag}{world}"));
        std::thread::scope(|scope| {
            let ranks: Vec<_> = (0..world)
                .map(|rank| {
                    let (store, f) = (store.clone(), &f);
                    scope.spawn(move || f(&Collectives::new(store, rank, world, 1)))
                })
                .collect();
            ranks.into_iter().map(|r| r.join().unwrap()).collect()
        })
    }

    fn value(rank: usize, i: usize) -> f32 {
        ((rank * 7919 + i * 104_729) % 1009) as f32 * 1.000_1e-3 - 0.5
    }

    #[test]
    fn shares_are_gathered_and_sums_scattered_in_rank_order() {
        for world in [2, 3, 4, 8] {
            // Shares longer than a piece, which is short of them at the end; one after the other, as in a step.
            let share = 64 * 11;
            let ranks = gang("peers", world, |c| {
                let mut all = vec![0u8; share * world];
                all[c.rank * share..][..share].iter_mut().enumerate().for_each(|(i, b)| *b = (c.rank * 31 + i) as u8);
                let mut sums: Vec<f32> = (0..share * world).map(|i| value(c.rank, i)).collect();
                let mut halves: Vec<u16> = sums.iter().map(|x| Bf16::put(*x).0).collect();
                c.all_gather(&mut all).unwrap();
                c.reduce_scatter(&mut sums).unwrap();
                c.reduce_scatter_bf16(&mut halves).unwrap();
                let mine = c.rank * share..(c.rank + 1) * share;
                (all, sums[mine.clone()].to_vec(), halves[mine].to_vec())
            });
            for (rank, (all, sums, halves)) in ranks.iter().enumerate() {
                assert!(all.iter().enumerate().all(|(i, b)| *b == (i / share * 31 + i % share) as u8), "{world} ranks");
                for i in 0..share {
                    let at = rank * share + i;
                    let want = (1..world).fold(value(0, at), |sum, r| sum + value(r, at));
                    assert_eq!(sums[i].to_bits(), want.to_bits(), "{world} ranks");
                    let want: f32 = (0..world).map(|r| Bf16::put(value(r, at)).get()).fold(0.0, |a, b| a + b);
                    assert_eq!(halves[i], Bf16::put(want).0);
                }
            }
        }
    }

    #[test]
    fn progress_is_that_of_the_slowest_rank_of_this_gang() {
        let store = store("progress");
        let (old, new): (Vec<_>, Vec<_>) =
            (0..2).map(|r| (Collectives::new(store.clone(), r, 2, 1), Collectives::new(store.clone(), r, 2, 2))).unzip();
        old[0].tell_progress(7);
        old[1].tell_progress(9);
        assert_eq!((old[0].progress().unwrap(), new[0].progress().unwrap()), (7, 0), "what an earlier gang told counts for nobody");
        new[1].tell_progress(3);
        assert_eq!(new[0].progress().unwrap(), 0);
        assert!(old[0].progress().is_err() && old[0].aborted(), "a rank that outlives its gang stops");
        new[0].tell_progress(5);
        assert_eq!(new[1].progress().unwrap(), 3);
        new[1].abort();
        assert!(new[1].progress().is_err());
    }

    #[test]
    fn numbers_are_kept_behind_what_collectives_use() {
        let tensor = TensorSpec { name: "w".into(), shape: vec![64], joined: false, decay: true };
        let spec = |world: usize, kept: u64| StoreSpec {
            blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor.clone()] }],
            world_size: world as u32,
            moments: MomentFormat::F32,
            gradients: GradientFormat::F32,
            page_parameters: Some(1024),
            spare_pages_per_rank: 1,
            exchange_bytes: Collectives::exchange_bytes(world) + Collectives::kept_bytes(kept),
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        for world in [1, 2] {
            let name = format!("/ramtorch-kept-{world}-{}", std::process::id());
            let store = Arc::new(Store::create(&name, &spec(world, 700)).unwrap());
            Store::unlink(&name).unwrap();
            let rank = |r| Collectives::new(store.clone(), r, world, 1);
            let all: Vec<_> = (0..world).map(rank).collect();
            assert_eq!(all[0].kept().len(), 1024);
            all[0].kept()[699].store(5f64.to_bits(), Ordering::Relaxed);
            // Pieces of a reduction fill all that is theirs.
            let len = world * (Collectives::exchange_bytes(world) as usize / 4 + 64);
            std::thread::scope(|scope| all.iter().for_each(|c| drop(scope.spawn(|| c.reduce_scatter(&mut vec![1.0; len]).unwrap()))));
            assert_eq!(all[world - 1].kept()[699].load(Ordering::Relaxed), 5f64.to_bits());
        }
        assert_eq!(Collectives::new(store("nothing-kept"), 0, 2, 1).kept().len(), 0);
    }

    #[test]
    fn the_first_ranks_bytes_reach_everyone() {
        let ranks = gang("broadcast", 3, |c| {
            let mut bytes: Vec<u8> = (0..130u32).map(|i| if c.rank == 0 { (i * 3 + 1) as u8 } else { 0 }).collect();
            c.broadcast(&mut bytes).unwrap();
            bytes
        });
        let want: Vec<u8> = (0..130u32).map(|i| (i * 3 + 1) as u8).collect();
        assert!(ranks.iter().all(|r| *r == want));
    }

    #[test]
    fn what_a_killed_gang_left_counts_for_nobody() {
        let store = store("left");
        let old: Vec<_> = (0..2).map(|r| Collectives::new(store.clone(), r, 2, 1)).collect();
        std::thread::scope(|scope| {
            for rank in &old {
                scope.spawn(|| (0..9).for_each(|_| rank.barrier(Channel::Step).unwrap()));
            }
        });
        let alone = Collectives::new(store, 0, 2, 2);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| alone.barrier(Channel::Step));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!waits.is_finished());
            alone.abort();
            assert!(waits.join().unwrap().is_err());
        });
    }
}
