//! Whether a job's memory fits: a pure function of what it needs, what is free, and what was promised to others.
//!
//! Three numbers matter. A parameter store takes shared memory, which is limited by the size of /dev/shm and by RAM.
//! Workers' private memory takes RAM alone. Segments that exist are already missing from what the kernel calls free;
//! those that are promised but not there yet are not, and are subtracted here.

use crate::node::{Memory, human_bytes};

/// Bytes that a job takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Its segment.
    pub segment: u64,
    /// Private memory of its workers.
    pub host: u64,
}

impl std::ops::AddAssign for Need {
    fn add_assign(&mut self, other: Need) {
        self.segment = self.segment.saturating_add(other.segment);
        self.host = self.host.saturating_add(other.host);
    }
}

/// What may be done with a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Start it.
    Admit,
    /// It fits once others have ended; the text says what is missing.
    Wait(String),
    /// It would not fit if it were alone; the text says what is missing.
    Never(String),
}

/// Bytes that a new segment may take, with `pending` promised to others but not allocated yet.
pub fn segment_limit(memory: Memory, pending: Need) -> u64 {
    ram_limit(memory, pending).min(memory.shm_free.saturating_sub(pending.segment))
}

/// Bytes of RAM that a new job may take in all, with `pending` promised to others but not allocated yet.
pub fn ram_limit(memory: Memory, pending: Need) -> u64 {
    memory.available.saturating_sub(pending.segment).saturating_sub(pending.host)
}

/// The memory that would be free if nothing that is `held` by other jobs were.
pub fn alone(memory: Memory, held: Need) -> Memory {
    Memory {
        available: memory.available.saturating_add(held.segment).saturating_add(held.host).min(memory.total),
        shm_free: memory.shm_free.saturating_add(held.segment).min(memory.shm_total),
        ..memory
    }
}

/// Judges a job. `pending` is promised and not allocated, `held` is allocated by jobs that will end.
pub fn judge(need: Need, memory: Memory, pending: Need, held: Need) -> Verdict {
    let mut others = held;
    others += pending;
    match shortage(need, memory, pending) {
        None => Verdict::Admit,
        // Pending promises are not allocated yet: alone, only what is held comes back.
        Some(now) => match shortage(need, alone(memory, held), Need::default()) {
            Some(ever) => Verdict::Never(ever),
            None if others == Need::default() => Verdict::Never(now),
            None => Verdict::Wait(now),
        },
    }
}

fn shortage(need: Need, memory: Memory, pending: Need) -> Option<String> {
    let shm_free = memory.shm_free.saturating_sub(pending.segment);
    if need.segment > shm_free {
        return Some(format!(
            "the parameter store takes {} of shared memory, and /dev/shm has {} free of {}: {} are missing; \
             free some, or mount it larger (mount -o remount,size=... /dev/shm)",
            human_bytes(need.segment),
            human_bytes(shm_free),
            human_bytes(memory.shm_total),
            human_bytes(need.segment - shm_free)
        ));
    }
    let ram = memory.available.saturating_sub(pending.segment).saturating_sub(pending.host);
    let all = need.segment.saturating_add(need.host);
    if all > ram {
        return Some(format!(
            "the job takes {} of RAM ({} parameter store, {} in its workers), and {} of {} are available: {} are missing",
            human_bytes(all),
            human_bytes(need.segment),
            human_bytes(need.host),
            human_bytes(ram),
            human_bytes(memory.total),
            human_bytes(all - ram)
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GIB: u64 = 1 << 30;

    fn memory(available: u64, shm_free: u64) -> Memory {
        Memory { total: 64 * GIB, available, shm_total: 32 * GIB, shm_free }
    }

    fn need(segment: u64, host: u64) -> Need {
        Need { segment, host }
    }

    #[test]
    fn the_missing_bytes_are_named() {
        let Verdict::Never(text) = judge(need(40 * GIB, 0), memory(60 * GIB, 32 * GIB), need(0, 0), need(0, 0)) else { panic!() };
        assert!(text.contains("8.0 GiB are missing") && text.contains("/dev/shm"), "{text}");
        let Verdict::Never(text) = judge(need(20 * GIB, 30 * GIB), memory(44 * GIB, 32 * GIB), need(0, 0), need(0, 0)) else { panic!() };
        assert!(text.contains("6.0 GiB are missing") && text.contains("RAM"), "{text}");
    }

    #[test]
    fn what_others_hold_is_waited_for() {
        let free = memory(30 * GIB, 12 * GIB);
        assert!(matches!(judge(need(16 * GIB, 0), free, need(0, 0), need(20 * GIB, 0)), Verdict::Wait(_)));
        assert!(matches!(judge(need(16 * GIB, 0), free, need(0, 0), need(0, 0)), Verdict::Never(_)));
        assert!(matches!(judge(need(12 * GIB, 0), free, need(4 * GIB, 0), need(0, 0)), Verdict::Wait(_)), "a promise is as good");
    }

    fn any_need() -> impl Strategy<Value = Need> {
        (0u64..100 * GIB, 0u64..100 * GIB).prop_map(|(s, h)| need(s, h))
    }

    proptest! {
        #[test]
        fn what_is_admitted_fits_beside_every_promise(n in any_need(), p in any_need(), h in any_need(), a in 0u64..64 * GIB, s in 0u64..32 * GIB) {
            let m = memory(a, s);
            let admitted = judge(n, m, p, h) == Verdict::Admit;
            let fits = n.segment + n.host + p.segment + p.host <= a && n.segment + p.segment <= s;
            // Where promises alone are more than there is, nothing but an empty job is admitted.
            prop_assert!(!admitted || fits || n == need(0, 0) || (n.segment == 0 && n.host + p.segment + p.host <= a));
            prop_assert!(!fits || admitted);
            if admitted {
                prop_assert!(n.segment <= segment_limit(m, p));
            }
        }

        #[test]
        fn never_means_not_even_alone(n in any_need(), p in any_need(), h in any_need(), a in 0u64..64 * GIB, s in 0u64..32 * GIB) {
            let m = memory(a, s);
            match judge(n, m, p, h) {
                Verdict::Never(_) => {
                    let later = judge(n, alone(m, h), need(0, 0), need(0, 0));
                    prop_assert!(later != Verdict::Admit || (p == need(0, 0) && h == need(0, 0)));
                }
                Verdict::Wait(_) => prop_assert_eq!(judge(n, alone(m, h), need(0, 0), need(0, 0)), Verdict::Admit),
                Verdict::Admit => {}
            }
        }

        #[test]
        fn needing_less_is_never_judged_worse(n in any_need(), less in 0u64..GIB, p in any_need(), h in any_need(), a in 0u64..64 * GIB) {
            let rank = |v: Verdict| match v { Verdict::Admit => 0, Verdict::Wait(_) => 1, Verdict::Never(_) => 2 };
            let smaller = need(n.segment.saturating_sub(less), n.host.saturating_sub(less));
            let m = memory(a, a / 2);
            prop_assert!(rank(judge(smaller, m, p, h)) <= rank(judge(n, m, p, h)));
        }
    }
}
