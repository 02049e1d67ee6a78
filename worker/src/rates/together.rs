//! What the GPUs of a gang do at once: products, loads of weights, gathers and reductions beside one another, measured before the plan.
//!
//! ```text
//!   Compute   product product product …                 all rounds; how many a second, beside nothing and beside each of the others
//!   CopyIn    whole blocks          │ shares of blocks  │
//!   Peers                           │ gathers           │ reductions
//! ```
//! One thread a rank, in this process: the same calls that a worker's sweeps make. Alone, each of them is faster than in a step: a
//! gather takes multiprocessors from products, loads of all GPUs end in one memory.

use super::{one_block, temporary};
use crate::api::{EngineError, Together};
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_device::{DevBuf, Device, Gang, Gemm, Stream, caught};
use ramtorch_store::{Store, StoreSpec};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Sizes of what is timed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    /// Rows, columns and depth of a product.
    pub product: usize,
    /// Parameters of a block.
    pub block: u64,
    /// Seconds of a round.
    pub seconds: f64,
}

impl Sizes {
    /// Of a GPU's work: a layer of an 8B model has 218 million parameters.
    pub const GPU: Sizes = Sizes { product: 8192, block: 64 << 20, seconds: 0.25 };

    /// Device memory that a rank takes.
    pub fn bytes(self, dtype: u64) -> u64 {
        3 * (self.product * self.product) as u64 * dtype + self.block * (2 * dtype + 4) + (16 << 20)
    }
}

/// Opens the device of a rank.
pub(super) type Open<'a> = dyn Fn(usize) -> Result<Box<dyn Device>, EngineError> + Sync + 'a;

/// Rates of `world` ranks, each as its slowest has it. Where a rank fails, or all of it takes longer than a minute, they give up.
///
/// # Errors
/// Those of the devices and of their libraries.
pub(super) fn measure(world: usize, sizes: Sizes, open: &Open) -> Result<Together, EngineError> {
    let meeting = temporary(&StoreSpec { world_size: world as u32, exchange_bytes: Collectives::exchange_bytes(world), ..one_block(64) })?;
    let all: Vec<Arc<Collectives>> = (0..world).map(|rank| Arc::new(Collectives::new(meeting.clone(), rank, world, 1))).collect();
    // Nobody else tells the ranks. A gang that gives up does not wait for its peers any longer, on the device either.
    let give_up = || all.iter().for_each(|comm| comm.abort());
    let rank = |rank: usize| -> Result<Together, EngineError> {
        let comm = &all[rank];
        let result = caught("the measurement of a rank", || {
            let mut dev = open(rank)?;
            let gang: Arc<dyn Gang> = comm.clone();
            dev.join_gang(&gang)?;
            Rank::new(comm, dev.as_mut(), sizes)?.measure()
        });
        if result.is_err() {
            give_up();
        }
        result
    };
    let (ended, ends) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let spawn = |i: usize| {
            let (rank, ended) = (&rank, ended.clone());
            let run = move || {
                let result = rank(i);
                let _ = ended.send(());
                result
            };
            std::thread::Builder::new().name(format!("rates{i}")).spawn_scoped(scope, run)
        };
        let ranks = (0..world).map(spawn).collect::<Result<Vec<_>, _>>();
        let ranks = ranks.map_err(|e| {
            give_up(); // those that began wait for the others
            EngineError::internal(format!("no thread to measure with: {e}"))
        })?;
        let begin = Instant::now();
        if ranks.iter().any(|_| ends.recv_timeout(LIMIT.saturating_sub(begin.elapsed())).is_err()) {
            give_up();
        }
        let lost = || Err(EngineError::internal("a rank's measurement panicked"));
        let results: Vec<_> = ranks.into_iter().map(|r| r.join().unwrap_or_else(|_| lost())).collect();
        // All have the same figures. Who fails first is not known, and others only say that they gave up.
        results.into_iter().reduce(|a, b| a.and(b)).unwrap_or_else(lost)
    })
}

/// What is enqueued beside the products of a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// Loads of whole blocks.
    Pulls,
    /// Loads of shares, and gathers of blocks.
    Gathers,
    Reductions,
}

struct Rank<'a> {
    comm: &'a Collectives,
    dev: &'a dyn Device,
    sizes: Sizes,
    store: Arc<Store>,
    /// Two factors and a product.
    matrices: [DevBuf; 3],
    /// Where blocks are loaded to, in the compute format, where they are gathered, and where gradients are.
    weights: DevBuf,
    gathered: DevBuf,
    gradients: DevBuf,
    done: [ramtorch_device::Event; 3],
}

/// All of it takes some seconds, most of them for connecting.
const LIMIT: Duration = Duration::from_secs(60);
/// Streams of a round, in the order of its events.
const STREAMS: [Stream; 3] = [Stream::Compute, Stream::CopyIn, Stream::Peers];
/// A round that does not end within so many times what it should is given up.
const PATIENCE: f64 = 100.0;

impl<'a> Rank<'a> {
    fn new(comm: &'a Collectives, dev: &'a mut dyn Device, sizes: Sizes) -> Result<Rank<'a>, EngineError> {
        // Registered by this rank alone, as a worker's mapping is.
        let store = temporary(&one_block(sizes.block))?;
        let mut owner = store.claim(0).map_err(crate::errors::store)?;
        for page in owner.pages().collect::<Vec<_>>() {
            // Not zeros, and memory that is there.
            owner.initialise(page, 0, |p| p.hi.iter_mut().for_each(|x| *x = 0x3c00)).map_err(crate::errors::store)?;
        }
        drop(owner);
        dev.register_store(&store)?;
        let dtype = dev.dtype();
        let (square, block) = ((sizes.product * sizes.product) as u64 * dtype.size(), comm.ranks().padded(sizes.block));
        let mut alloc = |bytes: u64| dev.alloc(bytes, "measurement");
        let matrices = [alloc(square)?, alloc(square)?, alloc(square)?];
        let (weights, gathered, gradients) = (alloc(block * dtype.size())?, alloc(block * dtype.size())?, alloc(block * 4)?);
        let done = [dev.event()?, dev.event()?, dev.event()?];
        let dev: &dyn Device = dev;
        for buf in &matrices[..2] {
            super::gpu::randomise(dev, *buf, dtype, 0.5)?;
        }
        Ok(Rank { comm, dev, sizes, store, matrices, weights, gathered, gradients, done })
    }

    fn product(&self) -> Result<(), EngineError> {
        let n = self.sizes.product;
        let [a, b, d] = self.matrices;
        let d_dtype = self.dev.dtype();
        self.dev.gemm(&Gemm {
            m: n,
            n,
            k: n,
            transpose_a: false,
            transpose_b: true,
            a,
            b,
            d,
            d_dtype,
            accumulate: false,
            add: None,
            bias: None,
        })
    }

    /// The first `count` parameters of a block, as a sweep loads them.
    fn load(&self, count: u64) -> Result<(), EngineError> {
        let (layout, size) = (self.store.layout(), self.dev.dtype().size());
        for page in 0..layout.page_count() {
            let r = layout.page_range(page);
            let end = r.end.min(count);
            if end > r.start {
                let dst = self.weights.slice(r.start * size, (end - r.start) * size);
                self.dev.load_parameters(Stream::CopyIn, dst, &self.store, self.store.entry(page).physical, 0, end - r.start)?;
            }
        }
        Ok(())
    }

    /// Seconds that `products`, and `others` of what is beside them, took on their streams, all ranks at once.
    fn round(&self, products: usize, beside: Beside, others: usize) -> Result<[f64; 3], EngineError> {
        for stream in STREAMS {
            self.dev.synchronize(stream)?;
        }
        self.comm.barrier(Channel::Step)?;
        let begin = Instant::now();
        // In turns: a stream that is filled first would run ahead.
        for i in 0..products.max(others) {
            if i < products {
                self.product()?;
            }
            if i >= others {
                continue;
            }
            match beside {
                Beside::Nothing => {}
                Beside::Pulls => self.load(self.sizes.block)?,
                Beside::Gathers => {
                    self.load(self.sizes.block / self.comm.world() as u64)?;
                    self.dev.all_gather(self.gathered)?;
                }
                Beside::Reductions => self.dev.reduce_scatter(self.gradients, ramtorch_device::Dtype::F32)?,
            }
        }
        for (event, stream) in self.done.iter().zip(STREAMS) {
            self.dev.record(*event, stream)?;
        }
        let (mut seconds, mut left) = ([0.0; 3], [true; 3]);
        while left.contains(&true) {
            for i in 0..3 {
                if left[i] && self.dev.is_done(self.done[i])? {
                    (seconds[i], left[i]) = (begin.elapsed().as_secs_f64(), false);
                }
            }
            if self.comm.aborted() || begin.elapsed().as_secs_f64() > PATIENCE * self.sizes.seconds {
                return Err(EngineError::internal("a round of the measurement does not end"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(seconds)
    }

    /// The slowest rank's.
    fn slowest(&self, values: [f64; 3]) -> Result<[f64; 3], EngineError> {
        let [a, b, c] = values;
        let all = self.comm.gather(Channel::Step, [a, b, c, 0.0])?;
        Ok([0, 1, 2].map(|i| all.iter().map(|x| x[i]).fold(0.0, f64::max)))
    }

    /// How many of something that takes so long go into a round, the same on all ranks.
    fn count(&self, seconds: f64) -> usize {
        (self.sizes.seconds / seconds.max(1e-6)).clamp(2.0, 1000.0) as usize
    }

    fn measure(&self) -> Result<Together, EngineError> {
        self.round(1, Beside::Gathers, 1)?; // links are set up, kernels are loaded
        self.round(1, Beside::Reductions, 1)?;
        let alone = self.slowest(self.round(4, Beside::Nothing, 0)?)?[0] / 4.0;
        let products = self.count(alone);
        let quiet = self.slowest(self.round(products, Beside::Nothing, 0)?)?[0] / products as f64;
        let beside = |what: Beside| -> Result<[f64; 2], EngineError> {
            let took = |seconds: [f64; 3]| seconds[1].max(seconds[2]);
            let others = self.count(took(self.slowest(self.round(0, what, 2)?)?) / 2.0);
            let seconds = self.slowest(self.round(products, what, others)?)?;
            // Where products go on alone, less than they lost beside the others is seen.
            let (own, other) = (seconds[0], took(seconds));
            let lost = (own - products as f64 * quiet).max(0.0) / own.min(other);
            Ok([other / others as f64, 1.0 - lost.min(0.95)])
        };
        let (pulled, gathered, reduced) = (beside(Beside::Pulls)?, beside(Beside::Gathers)?, beside(Beside::Reductions)?);
        let size = self.dev.dtype().size();
        let bytes = (self.sizes.block * size) as f64;
        Ok(Together {
            pull_bytes: bytes / pulled[0],
            pull_products: pulled[1],
            gather_bytes: bytes / gathered[0],
            gather_products: gathered[1],
            reduce_bytes: (self.sizes.block * 4) as f64 / reduced[0],
            reduce_products: reduced[1],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_cpu::CpuDevice;
    use ramtorch_device::Dtype;

    const TINY: Sizes = Sizes { product: 64, block: 1 << 14, seconds: 0.01 };

    fn open(rank: usize) -> Result<Box<dyn Device>, EngineError> {
        Ok(Box::new(CpuDevice::open(rank as u32, Dtype::Bf16, 1, TINY.bytes(2))?))
    }

    #[test]
    fn a_gang_is_measured_at_work() {
        for world in [2, 3] {
            let t = measure(world, TINY, &open).unwrap();
            let rates = [t.pull_bytes, t.gather_bytes, t.reduce_bytes];
            let left = [t.pull_products, t.gather_products, t.reduce_products];
            assert!(rates.iter().all(|x| *x > 1e5 && x.is_finite()) && left.iter().all(|x| (0.05..=1.0).contains(x)), "{t:?}");
        }
    }

    #[test]
    fn a_rank_that_fails_ends_all() {
        let opens = |rank: usize| if rank == 1 { Err(EngineError::internal("no such GPU")) } else { open(rank) };
        let e = measure(3, TINY, &opens).unwrap_err();
        assert!(!e.message.is_empty(), "{e}");
    }
}
