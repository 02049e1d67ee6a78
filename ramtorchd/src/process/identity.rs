//! A pid is not an identity: pids are used again. A pid with its start time and the boot is one.

use nix::poll::{PollFd, PollFlags, PollTimeout};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// One process, past or present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start_ticks: u64,
    /// Boot in which it ran.
    pub boot_id: String,
}

/// A process that could not be ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("process {pid} could not be ended: {detail}")]
pub struct EndError {
    /// Process id.
    pub pid: i32,
    /// Why.
    pub detail: String,
}

impl Identity {
    /// Who has this pid now.
    pub fn of(pid: i32, boot_id: &str) -> Option<Identity> {
        Some(Identity { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id.to_string() })
    }

    /// Sends SIGKILL if this very process still lives; `None`: it does not. It need not be a child.
    ///
    /// # Errors
    /// It may not be signalled.
    pub fn kill(&self, boot_id: &str) -> Result<Option<Dying>, EndError> {
        if self.boot_id != boot_id {
            return Ok(None);
        }
        let error = |detail: String| EndError { pid: self.pid, detail };
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(None) };
        // The order matters: the descriptor pins whoever has the pid, and only then is the start time compared.
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(error(format!("pidfd_open: {e}"))),
        };
        if start_ticks(self.pid) != Some(self.start_ticks) {
            return Ok(None);
        }
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(Some(Dying { pid: self.pid, fd })),
            Err(e) => Err(error(format!("kill: {e}"))),
        }
    }
}

/// A process that was sent SIGKILL.
#[derive(Debug)]
pub struct Dying {
    pid: i32,
    fd: OwnedFd,
}

impl Dying {
    /// Waits for its end, at most `limit`.
    ///
    /// # Errors
    /// It lives on: a process inside a hung driver call does.
    pub fn wait(self, limit: Duration) -> Result<(), EndError> {
        let error = |detail: String| EndError { pid: self.pid, detail };
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(n) if n > 0 => Ok(()),
            Ok(_) => Err(error("it is still there after SIGKILL".into())),
            Err(e) => Err(error(format!("poll: {e}"))),
        }
    }
}

/// Start time of a live (or not yet reaped) process.
fn start_ticks(pid: i32) -> Option<u64> {
    parse_start_ticks(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22. The name in field 2 may hold blanks and brackets, so that fields are counted after the last `)`.
fn parse_start_ticks(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_hostile_name_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 1";
        assert_eq!(parse_start_ticks(stat), Some(987_654));
        assert_eq!(parse_start_ticks("7 (a"), None);
    }

    /// Whether it was there, and is not any more.
    fn end(identity: &Identity, boot_id: &str) -> Result<bool, EndError> {
        let Some(dying) = identity.kill(boot_id)? else { return Ok(false) };
        dying.wait(Duration::from_secs(5)).map(|()| true)
    }

    #[test]
    fn the_very_process_is_ended_and_no_other() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let real = Identity::of(pid, "boot").unwrap();
        let earlier = Identity { start_ticks: real.start_ticks - 1, ..real.clone() };
        assert_eq!(end(&earlier, "boot"), Ok(false));
        assert_eq!(end(&real, "another boot"), Ok(false));
        assert_eq!(child.try_wait().unwrap(), None, "nobody was signalled yet");
        assert_eq!(end(&real, "boot"), Ok(true));
        child.wait().unwrap();
        assert_eq!(end(&real, "boot"), Ok(false));
    }
}
