//! Which process is which: a pid alone is reused, and means nothing after a restart of the machine.

use crate::error::StoreError;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process, for as long as anyone may ask about it: no later process has the same three numbers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Of the running kernel.
    pub boot_id: String,
    /// Process id.
    pub pid: u32,
    /// When it was started, in clock ticks since boot.
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// This process.
    ///
    /// # Errors
    /// [`StoreError::System`] when /proc cannot be read.
    pub fn current() -> Result<ProcessIdentity, StoreError> {
        let pid = std::process::id();
        ProcessIdentity::of(pid)?.ok_or_else(|| StoreError::system(format!("find process {pid} in /proc"), Errno::ESRCH))
    }

    /// The process that has this pid now. `None`: there is none, or it has ended and waits to be reaped.
    ///
    /// # Errors
    /// [`StoreError::System`] when /proc cannot be read, or hides a process that is there.
    pub fn of(pid: u32) -> Result<Option<ProcessIdentity>, StoreError> {
        let path = format!("/proc/{pid}/stat");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            // Mounted with hidepid, /proc shows other users' processes as missing.
            Err(_) if kill(Pid::from_raw(pid as i32), None) == Err(Errno::ESRCH) => return Ok(None),
            Err(e) => return Err(StoreError::system(format!("read {path}"), e)),
        };
        match parse_stat(&text) {
            Some(('Z' | 'X', _)) => Ok(None),
            Some((_, start_ticks)) => Ok(Some(ProcessIdentity { boot_id: boot_id()?, pid, start_ticks })),
            None => Err(StoreError::system(format!("understand {path}"), std::io::Error::from(std::io::ErrorKind::InvalidData))),
        }
    }

    /// It is running. Also true when that cannot be found out: whoever asks is about to take something away.
    pub fn is_alive(&self) -> bool {
        match boot_id() {
            Ok(boot) if boot != self.boot_id => false,
            Ok(_) => ProcessIdentity::of(self.pid).map_or(true, |now| now.as_ref() == Some(self)),
            Err(_) => true,
        }
    }
}

fn boot_id() -> Result<String, StoreError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|e| StoreError::system(format!("read {path}"), e))?;
    Ok(text.trim().to_owned())
}

/// State and start time of /proc/PID/stat. The name, in parentheses, may hold anything, parentheses and blanks included.
fn parse_stat(text: &str) -> Option<(char, u64)> {
    let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3 of the file, the start time field 22.
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_alive_and_its_namesakes_are_not() {
        let me = ProcessIdentity::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessIdentity { start_ticks: me.start_ticks + 1, ..me.clone() }.is_alive());
        assert!(!ProcessIdentity { boot_id: "another boot".into(), ..me.clone() }.is_alive());
    }

    #[test]
    fn an_ended_child_is_dead_before_and_after_it_is_reaped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let identity = ProcessIdentity::of(child.id()).unwrap().unwrap();
        assert!(identity.is_alive());
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while identity.is_alive() {
            assert!(std::time::Instant::now() < deadline, "still alive after SIGKILL");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        child.wait().unwrap();
        assert!(!identity.is_alive());
        assert_eq!(ProcessIdentity::of(identity.pid).unwrap(), None);
    }

    #[test]
    fn names_with_parentheses_are_read_over() {
        let rest = "1 1 1 0 -1 0 0 0 0 0 1 2 0 0 20 0 1 0 4711 100 200";
        assert_eq!(parse_stat(&format!("12 (a) R (b)) S {rest}")), Some(('S', 4711)));
        for bad in ["", "12 (a", "12 (a) S 1 2", "12 (a)"] {
            assert_eq!(parse_stat(bad), None);
        }
    }
}
