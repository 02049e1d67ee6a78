//! Tells systemd how the service is, as sd_notify(3) does, and feeds its watchdog.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// Environment variables of the service manager. They are for this process, not for its workers.
pub const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Without a watchdog, the status line is told this often.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// Sends a state such as `READY=1`. Does nothing where no service manager listens.
pub fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let sent = || -> std::io::Result<usize> {
        let address = match path.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&path)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(e) = sent() {
        tracing::debug!("the service manager was not told {state}: {e}");
    }
}

/// Tells the service manager that the state loop goes round, and what it has.
#[derive(Debug)]
pub struct Watchdog {
    interval: Duration,
    fed: Option<Instant>,
    told: String,
}

impl Watchdog {
    /// As the service manager wants it; idle where there is none.
    pub fn from_environment() -> Watchdog {
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let mine = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        Watchdog::every(number("WATCHDOG_USEC").filter(|usec| mine && *usec > 0).map(Duration::from_micros))
    }

    fn every(limit: Option<Duration>) -> Watchdog {
        // Half of it is what sd_watchdog_enabled(3) advises; a third leaves room for one that is late.
        Watchdog { interval: limit.map_or(STATUS_INTERVAL, |l| (l / 3).min(STATUS_INTERVAL)), fed: None, told: String::new() }
    }

    /// To be called whenever the loop goes round.
    pub fn feed(&mut self, now: Instant, status: impl FnOnce() -> String) {
        if let Some(message) = self.message(now, status) {
            notify(&message);
        }
    }

    fn message(&mut self, now: Instant, status: impl FnOnce() -> String) -> Option<String> {
        if self.fed.is_some_and(|at| now.saturating_duration_since(at) < self.interval) {
            return None;
        }
        self.fed = Some(now);
        let status = status();
        let news = if status == self.told { String::new() } else { format!("\nSTATUS={status}") };
        self.told = status;
        Some(format!("WATCHDOG=1{news}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_watchdog_is_fed_in_time_and_told_what_is_new() {
        let mut dog = Watchdog::every(Some(Duration::from_secs(9)));
        let start = Instant::now();
        let mut at = |ms: u64, status: &str| dog.message(start + Duration::from_millis(ms), || status.to_string());
        assert_eq!(at(0, "a").as_deref(), Some("WATCHDOG=1\nSTATUS=a"));
        assert_eq!(at(2999, "b"), None);
        assert_eq!(at(3000, "a").as_deref(), Some("WATCHDOG=1"));
        assert_eq!(at(6000, "b").as_deref(), Some("WATCHDOG=1\nSTATUS=b"));
    }
}
