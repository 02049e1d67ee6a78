//! Memory as the protocol may meet it: what a writer does is recorded, and every memory that it could leave to others
//! when it is stopped can be made from the record.
//!
//! Between two calls of `order_writes` lies a *stretch*. Whoever sees anything of a stretch sees all stretches before it.
//! Within a stretch, publications are seen in order, each with all that came before it; other writes are seen in any
//! order, and may be seen before a publication that precedes them. A memory left by a stopped writer is therefore: all
//! stretches before some stretch, and of that one the first k publications, the writes before the k-th, and any of the
//! writes after it.

use super::Memory;
use std::cell::{Cell as StdCell, RefCell};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Write { word: usize, value: u64 },
    Publish { word: usize, value: u64 },
    OrderWrites,
}

/// A writer's view: its own accesses take effect at once, and are recorded.
#[derive(Debug, Clone)]
pub struct Recorder {
    pub words: RefCell<Vec<u64>>,
    pub log: RefCell<Vec<Access>>,
    /// Leaves `order_writes` out, as a faulty protocol would.
    pub forget_order: bool,
}

impl Recorder {
    pub fn new(words: Vec<u64>) -> Recorder {
        Recorder { words: RefCell::new(words), log: RefCell::new(Vec::new()), forget_order: false }
    }
}

impl Memory for Recorder {
    fn load(&self, word: usize) -> u64 {
        self.words.borrow()[word]
    }
    fn read(&self, word: usize) -> u64 {
        self.words.borrow()[word]
    }
    fn order_reads(&self) {}
    fn write(&self, word: usize, value: u64) {
        self.words.borrow_mut()[word] = value;
        self.log.borrow_mut().push(Access::Write { word, value });
    }
    fn publish(&self, word: usize, value: u64) {
        self.words.borrow_mut()[word] = value;
        self.log.borrow_mut().push(Access::Publish { word, value });
    }
    fn order_writes(&self) {
        if !self.forget_order {
            self.log.borrow_mut().push(Access::OrderWrites);
        }
    }
}

fn word_of(access: &Access) -> Option<usize> {
    match access {
        Access::Write { word, .. } | Access::Publish { word, .. } => Some(*word),
        Access::OrderWrites => None,
    }
}

fn apply(words: &mut [u64], access: Access) {
    if let Access::Write { word, value } | Access::Publish { word, value } = access {
        words[word] = value;
    }
}

/// Calls `visit` with every memory that a writer with this record could leave, until it fails.
///
/// # Panics
/// When a stretch has more free writes than can be enumerated.
pub fn every_image(start: &[u64], log: &[Access], mut visit: impl FnMut(&[u64]) -> Result<(), String>) -> Result<(), String> {
    let mut whole = start.to_vec();
    for stretch in log.split(|a| *a == Access::OrderWrites) {
        let mut published = whole.clone();
        let mut from = 0;
        loop {
            let free: Vec<Access> = stretch[from..].iter().copied().filter(|a| matches!(a, Access::Write { .. })).collect();
            assert!(free.len() <= 16, "{} free writes: choose a smaller case", free.len());
            for chosen in 0u32..1 << free.len() {
                let mut image = published.clone();
                for (i, access) in free.iter().enumerate() {
                    if chosen & 1 << i != 0 {
                        apply(&mut image, *access);
                    }
                }
                visit(&image)?;
            }
            let Some(next) = stretch[from..].iter().position(|a| matches!(a, Access::Publish { .. })) else { break };
            stretch[from..=from + next].iter().for_each(|a| apply(&mut published, *a));
            from += next + 1;
        }
        stretch.iter().for_each(|a| apply(&mut whole, *a));
    }
    Ok(())
}

/// One of the memories of [`every_image`], as the choices fall.
pub fn some_image(start: &[u64], log: &[Access], random: &mut Random) -> Vec<u64> {
    let order = visible_order(log, random);
    let mut image = start.to_vec();
    order[..random.below(order.len() + 1)].iter().for_each(|a| apply(&mut image, *a));
    image
}

/// The accesses in an order in which they could become visible, one after another.
pub fn visible_order(log: &[Access], random: &mut Random) -> Vec<Access> {
    let mut order = Vec::with_capacity(log.len());
    for stretch in log.split(|a| *a == Access::OrderWrites) {
        let mut left: Vec<Access> = stretch.to_vec();
        while !left.is_empty() {
            // A publication comes next once nothing is left before it; a write, once nothing to the same word is.
            let ready: Vec<usize> = (0..left.len())
                .filter(|i| match left[*i] {
                    Access::Publish { .. } => *i == 0,
                    _ => left[..*i].iter().all(|before| word_of(before) != word_of(&left[*i])),
                })
                .collect();
            order.push(left.remove(ready[random.below(ready.len())]));
        }
    }
    order
}

/// A reader's view while a writer is at work: before each read, some more of what the writer did becomes visible.
pub struct Replay {
    words: RefCell<Vec<u64>>,
    order: Vec<Access>,
    done: StdCell<usize>,
    random: RefCell<Random>,
}

impl Replay {
    pub fn new(start: Vec<u64>, log: &[Access], mut random: Random) -> Replay {
        let order = visible_order(log, &mut random);
        Replay { words: RefCell::new(start), order, done: StdCell::new(0), random: RefCell::new(random) }
    }

    pub fn finished(&self) -> bool {
        self.done.get() == self.order.len()
    }
}

impl Memory for Replay {
    fn load(&self, word: usize) -> u64 {
        let left = self.order.len() - self.done.get();
        // Mostly still, at times a burst: a reader must be overtaken by whole publications, too.
        let mut random = self.random.borrow_mut();
        let more = match random.below(4) {
            0 => random.below(left.min(24) + 1),
            1 => left.min(1),
            _ => 0,
        };
        let mut words = self.words.borrow_mut();
        self.order[self.done.get()..self.done.get() + more].iter().for_each(|a| apply(&mut words, *a));
        self.done.set(self.done.get() + more);
        words[word]
    }
    fn read(&self, word: usize) -> u64 {
        self.load(word)
    }
    fn order_reads(&self) {}
    fn write(&self, _: usize, _: u64) {
        unreachable!("a reader does not write")
    }
    fn publish(&self, _: usize, _: u64) {
        unreachable!("a reader does not write")
    }
    fn order_writes(&self) {
        unreachable!("a reader does not write")
    }
}

/// Numbers that look random (SplitMix64); the seed comes from the property test, so a failure can be repeated.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least 0, less than `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}
