//! Pauses at random, for tests in which everybody is late.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A generator of pauses: the same ones for a seed, in the order in which they are asked for. None at all for seed 0.
#[derive(Debug)]
pub struct Pauses(AtomicU64);

impl Pauses {
    /// Those of `seed`.
    pub fn of(seed: u64) -> Pauses {
        let pauses = Pauses(AtomicU64::new(0));
        pauses.begin(seed);
        pauses
    }

    /// Those of `seed` from now on.
    pub fn begin(&self, seed: u64) {
        // Seeds that follow one another have nothing in common.
        self.0.store(if seed == 0 { 0 } else { seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }, Ordering::Relaxed);
    }

    /// One time in `every`, sleeps for less than `most`.
    pub fn pause(&self, every: u64, most: Duration) {
        let step = |x: u64| x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407) | 1;
        let next = |x: u64| (x != 0).then(|| step(x));
        let Ok(x) = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) else { return };
        if (x >> 33).is_multiple_of(every) {
            std::thread::sleep(most.mul_f64((x >> 40) as f64 / (1 << 24) as f64));
        }
    }
}
