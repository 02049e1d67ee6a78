//! Whether the state loop goes round, for whoever else answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Beats whenever the state loop has looked at the clock: every second at least.
#[derive(Debug, Clone)]
pub struct Pulse {
    begin: Instant,
    /// Milliseconds from `begin` to the last beat.
    last: Arc<AtomicU64>,
}

impl Pulse {
    /// One that has beaten now.
    pub fn new(now: Instant) -> Pulse {
        Pulse { begin: now, last: Arc::default() }
    }

    pub(super) fn beat(&self, now: Instant) {
        let ms = now.saturating_duration_since(self.begin).as_millis();
        self.last.store(u64::try_from(ms).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long ago it beat.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.begin).saturating_sub(Duration::from_millis(self.last.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_as_old_as_its_last_beat() {
        let begin = Instant::now();
        let at = |s: u64| begin + Duration::from_secs(s);
        let pulse = Pulse::new(begin);
        let watched = pulse.clone();
        assert_eq!(watched.age(at(3)), Duration::from_secs(3));
        pulse.beat(at(3));
        assert_eq!((watched.age(at(3)), watched.age(at(8))), (Duration::ZERO, Duration::from_secs(5)));
        // A clock that was read before the beat.
        assert_eq!(watched.age(at(2)), Duration::ZERO);
    }
}
