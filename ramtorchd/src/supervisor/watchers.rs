//! Watchers of a job. What they are told is made once and shared by all of them. Two things keep a thousand of them from
//! being noticed by anybody else: steps that come quickly are told together, the more watchers the longer they are
//! gathered; and not everybody is woken at once, but group after group, with room for other work in between.
//!
//! ```text
//!               metrics: told             metrics: gathered
//!   Calm ──────────────────────► Pause(n) ◄───┐
//!    ▲                            │  │ └──────┘
//!    │ n ticks, nothing gathered  │  │ n ticks, or any other event: what was gathered is told first
//!    └────────────────────────────┘  └──────► Pause(n)
//! ```

use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::watch_event::Event;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::broadcast;

/// Messages that a watcher may be behind before it is dropped; each is an event or more.
const BACKLOG: usize = 4096;
/// Metrics that are gathered at most.
const GATHERED_MAX: usize = 256;
/// For so many watchers, metrics are gathered for a tick.
const WATCHERS_PER_TICK: usize = 250;
/// Watchers that are woken at once.
const GROUP: usize = 64;

/// Events in their order.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// Number of the first of them.
    pub first: u64,
    events: Arc<Vec<pb::WatchEvent>>,
}

impl Told {
    /// The events from number `since` on.
    pub fn since(&self, since: u64) -> &[pb::WatchEvent] {
        let known = usize::try_from(since.saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.events.get(known..).unwrap_or_default()
    }

    /// These events.
    #[cfg(test)]
    pub fn new(first: u64, events: Vec<pb::WatchEvent>) -> Told {
        Told { first, events: Arc::new(events) }
    }
}

/// What a watcher hears.
#[derive(Debug)]
pub struct Ear {
    /// Messages. The first ones may tell of what this watcher knows from what it was given when it came.
    pub receiver: broadcast::Receiver<Told>,
    /// Number of the first event that it does not know.
    pub since: u64,
}

/// All watchers of a job.
#[derive(Debug, Default)]
pub struct Watchers {
    groups: Vec<broadcast::Sender<Told>>,
    /// What some groups were not told yet: the number of the next one, and what.
    on_its_way: VecDeque<(usize, Told)>,
    gathered: Vec<pb::WatchEvent>,
    /// Events that were ever told or gathered.
    count: u64,
    /// Ticks for which metrics are gathered from now on.
    pause: usize,
}

impl Watchers {
    /// One more, who knows everything that was told or gathered so far and does not hear it again.
    pub fn subscribe(&mut self) -> Ear {
        let receiver = match self.groups.iter().find(|group| group.receiver_count() < GROUP) {
            Some(group) => group.subscribe(),
            None => {
                let (group, receiver) = broadcast::channel(BACKLOG);
                self.groups.push(group);
                receiver
            }
        };
        Ear { receiver, since: self.count }
    }

    /// Whether nobody watches any more.
    pub fn is_empty(&self) -> bool {
        self.groups.iter().all(|group| group.receiver_count() == 0)
    }

    /// Takes an event, which [`Watchers::pump`] tells.
    pub fn tell(&mut self, event: Event) {
        let metrics = matches!(event, Event::Metrics(_));
        self.gathered.push(pb::WatchEvent { event: Some(event) });
        self.count += 1;
        if !metrics || self.pause == 0 || self.gathered.len() >= GATHERED_MAX {
            self.send_off();
        }
    }

    /// Time passes.
    pub fn tick(&mut self) {
        self.pause = self.pause.saturating_sub(1);
        if self.pause == 0 && !self.gathered.is_empty() {
            self.send_off();
        }
    }

    fn send_off(&mut self) {
        let watchers: usize = self.groups.iter().map(broadcast::Sender::receiver_count).sum();
        self.pause = 1 + watchers / WATCHERS_PER_TICK;
        let first = self.count - self.gathered.len() as u64;
        self.on_its_way.push_back((0, Told { first, events: Arc::new(std::mem::take(&mut self.gathered)) }));
    }

    /// Wakes one group. `true`: there are others.
    pub fn pump(&mut self) -> bool {
        let Some((next, told)) = self.on_its_way.front_mut() else { return false };
        if let Some(group) = self.groups.get(*next) {
            // Fails where nobody listens.
            let _ = group.send(told.clone());
        }
        *next += 1;
        if *next >= self.groups.len() {
            self.on_its_way.pop_front();
        }
        !self.on_its_way.is_empty()
    }

    /// Tells everything to everybody.
    pub fn finish(&mut self) {
        if !self.gathered.is_empty() {
            self.send_off();
        }
        while self.pump() {}
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn metrics(step: u64) -> Event {
        Event::Metrics(pb::Metrics { step, ..Default::default() })
    }

    /// Steps of the next message; 0 is another event.
    fn heard(ear: &mut Ear) -> Vec<u64> {
        let step = |e: &pb::WatchEvent| if let Some(Event::Metrics(m)) = &e.event { m.step } else { 0 };
        ear.receiver.try_recv().map_or(Vec::new(), |told| told.since(ear.since).iter().map(step).collect())
    }

    #[test]
    fn steps_that_come_quickly_are_told_together_and_in_order() {
        let mut watchers = Watchers::default();
        let mut first = watchers.subscribe();
        let mut tell = |watchers: &mut Watchers, event| {
            watchers.tell(event);
            while watchers.pump() {}
            heard(&mut first)
        };
        assert_eq!(tell(&mut watchers, metrics(1)), [1], "the first at once");
        assert_eq!(tell(&mut watchers, metrics(2)), [0u64; 0]);
        watchers.tick();
        assert_eq!(tell(&mut watchers, metrics(3)), [2]);
        assert_eq!(tell(&mut watchers, Event::Note(pb::Event::default())), [3, 0], "what is no step waits for none");
        watchers.tick();
        assert_eq!(tell(&mut watchers, metrics(4)), [4], "calm again");
    }

    #[test]
    fn many_watchers_are_told_less_often_and_group_after_group() {
        let mut watchers = Watchers::default();
        let mut all: Vec<_> = (0..4 * WATCHERS_PER_TICK).map(|_| watchers.subscribe()).collect();
        watchers.tell(metrics(1));
        let mut woken = Vec::new();
        loop {
            let more = watchers.pump();
            woken.push(all.iter_mut().filter(|e| !e.receiver.is_empty()).map(heard).count());
            if !more {
                break;
            }
        }
        assert_eq!(woken.iter().sum::<usize>(), all.len());
        assert!(woken.iter().all(|n| (1..=GROUP).contains(n)));
        watchers.tell(metrics(2));
        for tick in 1..=5 {
            assert!(!watchers.pump(), "after {tick} ticks");
            watchers.tick();
        }
        assert!(watchers.pump());
        drop(all);
        assert!(watchers.is_empty());
    }

    #[test]
    fn gathering_is_bounded() {
        let mut watchers = Watchers::default();
        let mut receiver = watchers.subscribe();
        (0..=GATHERED_MAX as u64).for_each(|step| watchers.tell(metrics(step)));
        while watchers.pump() {}
        assert_eq!((heard(&mut receiver).len(), heard(&mut receiver).len()), (1, GATHERED_MAX));
    }

    proptest! {
        /// Whatever happens in between, each hears every event since it came, once and in order, and then the end.
        #[test]
        fn nothing_is_lost_and_nothing_comes_twice(happenings in prop::collection::vec(0u8..8, 0..200), crowd in 0usize..200) {
            let mut watchers = Watchers::default();
            let mut step = 0;
            let mut all: Vec<(u64, Ear)> = (0..crowd).map(|_| (0, watchers.subscribe())).collect();
            for what in happenings {
                match what {
                    0 => watchers.tick(),
                    1 => {
                        watchers.pump();
                    }
                    2 => all.push((step, watchers.subscribe())),
                    3 => watchers.tell(Event::Note(pb::Event::default())),
                    _ => {
                        step += 1;
                        watchers.tell(metrics(step));
                    }
                }
            }
            drop(watchers);
            for (since, mut ear) in all {
                let mut steps = Vec::new();
                while !ear.receiver.is_empty() {
                    steps.extend(heard(&mut ear).into_iter().filter(|s| *s > 0));
                }
                prop_assert_eq!(steps, (since + 1..=step).collect::<Vec<_>>());
                prop_assert!(matches!(ear.receiver.try_recv(), Err(broadcast::error::TryRecvError::Closed)));
            }
        }
    }
}
