//! Deterministic collectives between the processes of one node, through the store's shared memory.
//!
//! ```text
//!   barrier:  every rank writes (generation, count) into its own word, then waits for all words to reach it.
//!             Words only grow, and a gang's generation is larger than its predecessor's: what a killed gang left
//!             behind never counts, and nothing needs to be reset.
//!   reduce:   chunk by chunk, alternating between two halves of the exchange area:
//!             copy own chunk in ── barrier ── owners add the chunks of all ranks, in rank order
//! ```
//! One barrier a chunk is enough: a half is written again two chunks later, after a barrier that its readers pass
//! only when they are done.

use crate::parameters::{add_scratch, put_gradients};
use ramtorch_device::EngineError;
use ramtorch_store::{GradientFormat, Gradients, Store};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Ranks that the control words have room for.
pub const MAX_RANKS: usize = 64;
const VALUES: usize = 4;
const VALUES_AT: usize = 1024;

/// Above the count of a word.
const GENERATION_SHIFT: u32 = 40;

/// Independent sequences of collectives: one for each thread that takes part in some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel {
    /// The step loop.
    Step = 0,
    /// Gradient reduction (the copy-out stream).
    Reduce = 1,
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
        let half = bytes / 4 / world / 2;
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

    /// Sums `gradients` (parameters `start..`) over ranks; each owner's part goes to the store's gradient array.
    pub fn reduce_gradients(&self, gradients: &[f32], start: u64, accumulate: bool) {
        let layout = self.store.layout();
        assert!(start + gradients.len() as u64 <= layout.span(), "gradients past the end of the store");
        if self.world == 1 {
            put_gradients(gradients, &self.store, start, accumulate);
            return;
        }
        let chunk = self.half.max(1);
        let mut sum = Vec::new();
        for (i, part) in gradients.chunks(chunk).enumerate() {
            let parity = (self.counts[Channel::Reduce as usize].load(Ordering::Relaxed) & 1) as usize;
            let area = |rank: usize| self.exchange + ((parity * self.world + rank) * self.half) * 4;
            // SAFETY: this half of this rank's part of the exchange area is written by this rank alone, and its
            // readers of two chunks ago have passed a barrier since (module text). In bounds by `half`.
            unsafe { std::slice::from_raw_parts_mut(area(self.rank) as *mut f32, part.len()) }.copy_from_slice(part);
            if self.arrive(Channel::Reduce).is_err() {
                return; // the step is given up; its gradients are never used
            }
            let first = start + (i * chunk) as u64;
            let here = first..first + part.len() as u64;
            for page in layout.pages_of(here.clone()) {
                if layout.page_owner(page) as usize != self.rank {
                    continue;
                }
                let range = layout.page_range(page);
                let (a, b) = (range.start.max(here.start), range.end.min(here.end));
                let (at, n) = ((a - here.start) as usize, (b - a) as usize);
                sum.clear();
                for rank in 0..self.world {
                    // SAFETY: written before the barrier, not again before the next one.
                    let theirs = unsafe { std::slice::from_raw_parts((area(rank) as *const f32).add(at), n) };
                    if rank == 0 { sum.extend_from_slice(theirs) } else { add_scratch(theirs, &mut sum) }
                }
                put_gradients(&sum, &self.store, a, accumulate);
            }
        }
    }
}

/// Reads the reduced gradients of page `page`. Only its owner calls this, after the reduction of the whole step.
pub fn read_gradients<R>(store: &Store, page: u32, f: impl FnOnce(Gradients<'_>) -> R) -> R {
    let range = store.layout().page_range(page);
    let n = (range.end - range.start) as usize;
    let p = store.gradient_ptr(range.start);
    match store.layout().spec().gradients {
        GradientFormat::None => f(Gradients::None),
        // SAFETY: in bounds of the gradient array; the owner is the only writer of this range, and it reads now.
        GradientFormat::F32 => f(Gradients::F32(unsafe { std::slice::from_raw_parts(p.cast(), n) })),
        // SAFETY: as above.
        GradientFormat::Bf16 => f(Gradients::Bf16(unsafe { std::slice::from_raw_parts(p.cast(), n) })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_store::{BlockSpec, MomentFormat, StoreSpec, TensorSpec};

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
