//! A pid is not an identity: pids are used again. A pid with its start time and the boot is one.

use nix::poll::{PollFd, PollFlags, PollTimeout};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::os::fd::AsFd;
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

    /// Sends SIGKILL if this very process still lives, and waits for its end, at most `limit`. It need not be a child.
    ///
    /// # Errors
    /// It lives on (a process inside a hung driver call does), or may not be signalled.
    pub fn end(&self, boot_id: &str, limit: Duration) -> Result<bool, EndError> {
        if self.boot_id != boot_id {
            return Ok(false);
        }
        let error = |detail: String| EndError { pid: self.pid, detail };
        let Some(pid) = Pid::from_raw(self.pid) else { return Ok(false) };
        // The order matters: the descriptor pins whoever has the pid, and only then is the start time compared.
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(false),
            Err(e) => return Err(error(format!("pidfd_open: {e}"))),
        };
        if start_ticks(self.pid) != Some(self.start_ticks) {
            return Ok(false);
        }
        match pidfd_send_signal(&fd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => return Err(error(format!("kill: {e}"))),
        }
        let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, timeout) {
            Ok(n) if n > 0 => Ok(true),
            Ok(_) => Err(error(format!("still there {:.1} s after SIGKILL", limit.as_secs_f64()))),
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

    #[test]
    fn the_very_process_is_ended_and_no_other() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let real = Identity::of(pid, "boot").unwrap();
        let earlier = Identity { start_ticks: real.start_ticks - 1, ..real.clone() };
        assert_eq!(earlier.end("boot", Duration::from_secs(1)), Ok(false));
        assert_eq!(real.end("another boot", Duration::from_secs(1)), Ok(false));
        assert_eq!(child.try_wait().unwrap(), None, "nobody was signalled yet");
        assert_eq!(real.end("boot", Duration::from_secs(5)), Ok(true));
        child.wait().unwrap();
        assert_eq!(real.end("boot", Duration::from_secs(1)), Ok(false));
    }
}
