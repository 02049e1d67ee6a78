//! Watchers of a job. What they are told is made once and shared by all of them, and steps that come quickly are told
//! together: a thousand watchers of a job with fifty steps a second would otherwise be fifty thousand wake-ups a second.
//!
//! ```text
//!               metrics: told          metrics: gathered
//!   Calm ──────────────────────► Busy ◄───┐
//!    ▲                            │ └─────┘
//!    │  tick, nothing gathered    │   tick, or any other event: what was gathered is told first
//!    └────────────────────────────┘
//! ```

use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::watch_event::Event;
use std::sync::Arc;
use tokio::sync::broadcast;

/// Messages that a watcher may be behind before it is dropped; each is an event or more.
const BACKLOG: usize = 4096;
/// Metrics that are gathered at most.
const GATHERED_MAX: usize = 256;

/// Events in their order.
pub type Told = Arc<Vec<pb::WatchEvent>>;

/// All watchers of a job.
#[derive(Debug)]
pub struct Watchers {
    sender: broadcast::Sender<Told>,
    gathered: Vec<pb::WatchEvent>,
    busy: bool,
}

impl Default for Watchers {
    fn default() -> Watchers {
        Watchers { sender: broadcast::channel(BACKLOG).0, gathered: Vec::new(), busy: false }
    }
}

impl Watchers {
    /// One more, who knows everything that was told or gathered so far.
    pub fn subscribe(&mut self) -> broadcast::Receiver<Told> {
        self.flush();
        self.sender.subscribe()
    }

    /// Tells an event, soon. Nobody is waited for. `false`: there is no watcher any more.
    pub fn tell(&mut self, event: Event) -> bool {
        let metrics = matches!(event, Event::Metrics(_));
        self.gathered.push(pb::WatchEvent { event: Some(event) });
        if metrics && std::mem::replace(&mut self.busy, true) && self.gathered.len() < GATHERED_MAX {
            return self.sender.receiver_count() > 0;
        }
        self.flush()
    }

    /// Time passes. `false`: there is no watcher any more.
    pub fn tick(&mut self) -> bool {
        self.busy = !self.gathered.is_empty();
        self.flush()
    }

    /// Tells what was gathered. `false`: there is no watcher any more.
    pub fn flush(&mut self) -> bool {
        if !self.gathered.is_empty() {
            // Fails where nobody listens.
            let _ = self.sender.send(Arc::new(std::mem::take(&mut self.gathered)));
        }
        self.sender.receiver_count() > 0
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> Event {
        Event::Metrics(pb::Metrics { step, ..Default::default() })
    }

    /// Steps of the next message; 0 is another event.
    fn heard(receiver: &mut broadcast::Receiver<Told>) -> Vec<u64> {
        let step = |e: &pb::WatchEvent| if let Some(Event::Metrics(m)) = &e.event { m.step } else { 0 };
        receiver.try_recv().map_or(Vec::new(), |told| told.iter().map(step).collect())
    }

    #[test]
    fn steps_that_come_quickly_are_told_together_and_in_order() {
        let mut watchers = Watchers::default();
        let mut first = watchers.subscribe();
        assert!(watchers.tell(metrics(1)));
        assert_eq!(heard(&mut first), [1], "the first at once");
        assert!(watchers.tell(metrics(2)) && watchers.tell(metrics(3)));
        assert_eq!(heard(&mut first), []);
        watchers.tick();
        assert_eq!(heard(&mut first), [2, 3]);
        watchers.tell(metrics(4));
        watchers.tell(Event::Note(pb::Event::default()));
        assert_eq!(heard(&mut first), [4, 0], "what is no step waits for none");
        watchers.tick();
        watchers.tick();
        watchers.tell(metrics(5));
        assert_eq!(heard(&mut first), [5], "calm again");
    }

    #[test]
    fn a_new_watcher_hears_nothing_twice_and_the_end_loses_nothing() {
        let mut watchers = Watchers::default();
        let mut first = watchers.subscribe();
        watchers.tell(metrics(1));
        watchers.tell(metrics(2));
        let mut second = watchers.subscribe();
        watchers.tell(metrics(3));
        drop(watchers);
        assert_eq!([heard(&mut first), heard(&mut first), heard(&mut first)], [vec![1], vec![2], vec![3]]);
        assert_eq!(heard(&mut second), [3]);
        assert!(matches!(second.try_recv(), Err(broadcast::error::TryRecvError::Closed)));
    }

    #[test]
    fn gathering_is_bounded_and_ends_with_the_last_watcher() {
        let mut watchers = Watchers::default();
        let mut receiver = watchers.subscribe();
        for step in 0..=GATHERED_MAX as u64 {
            assert!(watchers.tell(metrics(step)));
        }
        assert_eq!((heard(&mut receiver).len(), heard(&mut receiver).len()), (1, GATHERED_MAX));
        drop(receiver);
        assert!(!watchers.tell(metrics(1)) && !watchers.tick());
    }
}
