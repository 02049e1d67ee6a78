//! Who may have how many connections: all together, and of each user or address, so that nobody takes the places of the others.
//!
//! ```text
//!   accepted ─► fewer than its share? ─ no ─► closed
//!                    └ yes ─► a place left? ─ yes ─► served until it ends
//!                                  └ no ─► an administrator, and one kept for them left? ─ yes ─► served
//!                                                 └ no ─► closed
//! ```

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

/// Places that root and the daemon's own user have beside those for everybody.
const KEPT: usize = 16;

/// Counts connections by `K`: a user, or an address.
#[derive(Debug)]
pub(super) struct Places<K> {
    most: usize,
    /// Of one `K`.
    share: usize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    all: usize,
    kept: usize,
    by: HashMap<K, usize>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub(super) struct Place<K: Eq + Hash> {
    places: Arc<Places<K>>,
    of: K,
    kept: bool,
}

impl<K: Eq + Hash + Clone> Places<K> {
    /// `most` for all; nobody has more than half of them.
    pub(super) fn new(most: usize) -> Arc<Places<K>> {
        let taken = Taken { all: 0, kept: 0, by: HashMap::new() };
        Arc::new(Places { most, share: most.div_ceil(2).max(1), taken: Mutex::new(taken) })
    }

    /// A place for `of`, or why there is none.
    pub(super) fn take(self: &Arc<Self>, of: K, administrator: bool) -> Result<Place<K>, &'static str> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let own = taken.by.get(&of).copied().unwrap_or(0);
        let kept = if own < self.share && taken.all < self.most {
            false
        } else if administrator && taken.kept < KEPT {
            true
        } else if own >= self.share {
            return Err("it has half of all connections already");
        } else {
            return Err("all connections are taken");
        };
        if kept {
            taken.kept += 1;
        } else {
            taken.all += 1;
            *taken.by.entry(of.clone()).or_default() += 1;
        }
        Ok(Place { places: self.clone(), of, kept })
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if self.kept {
            taken.kept -= 1;
            return;
        }
        taken.all -= 1;
        if let Some(own) = taken.by.get_mut(&self.of) {
            *own -= 1;
            // Who is gone leaves no entry.
            if *own == 0 {
                taken.by.remove(&self.of);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_has_more_than_half_and_administrators_come_in() {
        let places = Places::new(4);
        let take = |who: u32, admin| places.take(who, admin);
        let first = take(1, false).unwrap();
        let second = take(1, false).unwrap();
        assert!(take(1, false).unwrap_err().contains("half"));
        let others = [take(2, false).unwrap(), take(2, false).unwrap()];
        assert!(take(3, false).unwrap_err().contains("taken"));
        let kept: Vec<_> = (0..KEPT).map(|_| take(0, true).unwrap()).collect();
        assert!(take(0, true).is_err());
        drop(kept);
        assert!(take(0, true).is_ok(), "places that were kept come back");
        drop(first);
        let third = take(3, false).unwrap();
        assert!(take(1, false).is_err(), "its place is another's now");
        drop((second, third, others));
        let taken = places.taken.lock().unwrap();
        assert_eq!((taken.all, taken.kept, taken.by.len()), (0, 0, 0));
    }

    #[test]
    fn one_place_is_still_a_place() {
        let places = Places::new(1);
        let place = places.take("alice", false).unwrap();
        assert!(places.take("bob", false).is_err());
        drop(place);
        assert!(places.take("bob", false).is_ok());
    }
}
