//! Who may do what.
//!
//! ```text
//!  unix socket: uid from the kernel ─┐
//!                                    ├─► policy: user? admin? ─► limits: rate, open calls ─► service, as a Caller
//!  TCP: name in a TLS certificate ───┘        │ no                    │ too much
//!                                       PERMISSION_DENIED       RESOURCE_EXHAUSTED
//! ```
//! A job belongs to the user who submitted it. Others see in lists that it is there and what it holds; only its owner and
//! administrators read it, watch it, or end it. The paths that a call names are checked in `paths`,
//! and that what it would write over is the caller's, in `outputs`.

pub mod config;
pub mod gate;
mod health;
mod idle;
pub mod outputs;
pub mod paths;
mod places;
mod punctual;
pub mod sandbox;
pub mod serve;
pub mod tls;

use config::{AccessConfig, UserRef};
use nix::unistd::{Gid, Group, Uid, User};
use std::collections::HashMap;
use std::ffi::CString;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is known of a user's groups is looked up again after so long.
const REMEMBERED: Duration = Duration::from_secs(30);
/// Users that are remembered; more are looked up each time.
const REMEMBERED_MAX: usize = 10_000;

/// Somebody who may use this daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// User id; that of the local user whom a certificate stands for.
    pub uid: u32,
    /// May see and end everybody's jobs, and the daemon.
    pub admin: bool,
}

impl Caller {
    /// The daemon itself.
    pub fn daemon() -> Caller {
        Caller { uid: nix::unistd::geteuid().as_raw(), admin: true }
    }

    /// Whether the job of user `uid` is this caller's to look into.
    pub fn may_touch(&self, uid: u32) -> bool {
        self.admin || self.uid == uid
    }
}

/// A user who must not use this daemon, or one who cannot be found out about.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Denied(pub String);

/// The rules of `[access]`. Root and the daemon's own user are always administrators.
#[derive(Debug)]
pub struct Policy {
    config: AccessConfig,
    own_uid: u32,
    known: Mutex<HashMap<u32, (Instant, Result<Caller, Denied>)>>,
}

impl Policy {
    /// Rules of a daemon.
    pub fn new(config: AccessConfig) -> Policy {
        Policy { config, own_uid: nix::unistd::geteuid().as_raw(), known: Mutex::default() }
    }

    /// What user `uid` may do. Looks into the user database, which may be slow: not on the state task.
    ///
    /// # Errors
    /// He may do nothing; the text says what an operator can change.
    pub fn judge(&self, uid: u32, now: Instant) -> Result<Caller, Denied> {
        if let Some(verdict) = self.known(uid, now) {
            return verdict;
        }
        let verdict = self.look_up(uid);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() < REMEMBERED_MAX || known.contains_key(&uid) {
            known.insert(uid, (now, verdict.clone()));
        }
        verdict
    }

    /// As [`Policy::judge`], as far as it is known without looking anywhere.
    pub fn known(&self, uid: u32, now: Instant) -> Option<Result<Caller, Denied>> {
        if uid == 0 || uid == self.own_uid {
            return Some(Ok(Caller { uid, admin: true }));
        }
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&uid).filter(|(at, _)| now.saturating_duration_since(*at) < REMEMBERED).map(|(_, verdict)| verdict.clone())
    }

    fn look_up(&self, uid: u32) -> Result<Caller, Denied> {
        let c = &self.config;
        let user = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let name = user.as_ref().map_or_else(|| format!("user {uid}"), |u| format!("user {} ({uid})", u.name));
        let named = |list: &[UserRef]| list.iter().any(|r| r.is(uid, user.as_ref().map(|u| u.name.as_str())));
        let groups =
            if c.groups.is_empty() && c.admin_groups.is_empty() { Vec::new() } else { user.as_ref().map(groups_of).unwrap_or_default() };
        let member = |list: &[String]| list.iter().any(|g| groups.iter().any(|have| have == g));
        let admin = named(&c.admins) || member(&c.admin_groups);
        if admin || named(&c.users) || member(&c.groups) {
            return Ok(Caller { uid, admin });
        }
        let who = if c.groups.is_empty() { String::new() } else { format!(", or make them a member of {}", c.groups.join(" or ")) };
        Err(Denied(format!("{name} may not use this daemon; its operator can name the user in [access] users{who}")))
    }
}

/// Names of the groups that a user is in by the user database.
fn groups_of(user: &User) -> Vec<String> {
    let Ok(name) = CString::new(user.name.as_str()) else { return Vec::new() };
    let ids: Vec<Gid> = nix::unistd::getgrouplist(&name, user.gid).unwrap_or_else(|_| vec![user.gid]);
    ids.into_iter().filter_map(|gid| Group::from_gid(gid).ok().flatten()).map(|g| g.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Policy {
        let mut p = Policy::new(toml::from_str(text).unwrap());
        // Tests may run as root; rules are for others.
        p.own_uid = 4242;
        p
    }

    #[test]
    fn root_and_the_daemons_own_user_are_always_let_in() {
        let p = policy("");
        let now = Instant::now();
        assert_eq!(p.judge(0, now), Ok(Caller { uid: 0, admin: true }));
        assert_eq!(p.judge(4242, now), Ok(Caller { uid: 4242, admin: true }));
        assert!(p.judge(4243, now).unwrap_err().0.contains("4243"));
    }

    #[test]
    fn users_and_groups_are_let_in_by_name_and_by_number() {
        let daemon = User::from_name("daemon").unwrap().unwrap();
        let group = Group::from_gid(daemon.gid).unwrap().unwrap().name;
        let now = Instant::now();
        let judge = |text: &str| policy(text).judge(daemon.uid.as_raw(), now).map(|c| c.admin);
        assert_eq!(judge("users = [\"daemon\"]"), Ok(false));
        assert_eq!(judge(&format!("users = [{}]", daemon.uid)), Ok(false));
        assert_eq!(judge(&format!("groups = [\"{group}\"]")), Ok(false));
        assert_eq!(judge("admins = [\"daemon\"]"), Ok(true));
        assert_eq!(judge(&format!("admin_groups = [\"{group}\"]")), Ok(true));
        assert!(judge("users = [\"nobody\"]\ngroups = [\"no-such-group\"]").unwrap_err().0.contains("no-such-group"));
        assert_eq!(policy("users = [54321]").judge(54_321, now).map(|c| c.admin), Ok(false), "a number needs no entry");
    }

    #[test]
    fn a_verdict_is_remembered_for_a_while_only() {
        let mut p = policy("users = [54321]");
        let now = Instant::now();
        assert!(p.judge(54_321, now).is_ok());
        p.config.users.clear();
        assert!(p.judge(54_321, now + REMEMBERED / 2).is_ok());
        assert!(p.judge(54_321, now + REMEMBERED * 2).is_err());
    }

    #[test]
    fn jobs_are_their_owners_and_the_administrators() {
        assert!(Caller { uid: 5, admin: false }.may_touch(5));
        assert!(!Caller { uid: 5, admin: false }.may_touch(6));
        assert!(Caller { uid: 5, admin: true }.may_touch(6));
    }
}
