//! How much of what is limited one user may have, so that nobody takes the places of the others.
//!
//! ```text
//!   an administrator ─► fewer than all, and some more that are kept for them? ─ no ─► refused
//!   anybody else ─► fewer than the user's share? ─ yes ─► fewer than all? ─ yes ─► admitted
//! ```
//! Administrators have no share: a daemon that somebody started for himself is his alone.

use crate::access::Caller;

/// Jobs that administrators may have beside `jobs.active_max`.
pub const KEPT_JOBS: usize = 16;
/// Calls that they may have served beside `jobs.one_off_max`. Each is a process with memory of its own.
pub const KEPT_ONE_OFFS: usize = 2;

/// Limits of one kind of thing.
#[derive(Debug, Clone, Copy)]
pub struct Shares {
    /// For all together.
    pub most: usize,
    /// For one user.
    pub of_one: usize,
    /// For administrators, when all are taken.
    pub kept: usize,
}

/// What is full, with how many there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The user's share.
    Own(usize),
    /// Everything.
    All(usize),
}

impl Shares {
    /// Whether `caller`, who has `own` of the `all` that there are, may have one more.
    ///
    /// # Errors
    /// What is full.
    pub fn admit(&self, caller: &Caller, all: usize, own: usize) -> Result<(), Full> {
        match caller.admin {
            true if all < self.most.saturating_add(self.kept) => Ok(()),
            false if own >= self.of_one => Err(Full::Own(own)),
            false if all < self.most => Ok(()),
            _ => Err(Full::All(all)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_has_a_share_and_administrators_come_in() {
        let shares = Shares { most: 4, of_one: 2, kept: 1 };
        let user = |all, own| shares.admit(&Caller { uid: 7, admin: false }, all, own);
        let admin = |all, own| shares.admit(&Caller { uid: 0, admin: true }, all, own);
        assert_eq!([user(0, 0), user(3, 1)], [Ok(()); 2]);
        assert_eq!([user(2, 2), user(4, 2), user(4, 1)], [Err(Full::Own(2)), Err(Full::Own(2)), Err(Full::All(4))]);
        assert_eq!([admin(3, 3), admin(4, 0)], [Ok(()); 2]);
        assert_eq!(admin(5, 0), Err(Full::All(5)));
    }
}
