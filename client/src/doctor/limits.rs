//! Limits of the process, its cgroup, and the clock.

use super::{Daemon, Facts, Finding};

/// 2025-01-01.
const EARLIEST: i64 = 1_735_689_600;
/// Each watcher and worker takes a few.
const FILES_LEAST: u64 = 4096;

pub fn all(facts: &Facts) -> Vec<Finding> {
    vec![locked(facts), files(facts), cgroup(facts), clock(facts)]
}

/// The soft limit of this name; `None` for unlimited.
fn limit(facts: &Facts, name: &str) -> Option<Result<u64, ()>> {
    let (process, _) = facts.process();
    let text = facts.read(&format!("{process}/limits"))?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    Some(line.split_whitespace().next()?.parse::<u64>().map_err(drop))
}

fn locked(facts: &Facts) -> Finding {
    const CHECK: &str = "locked memory";
    let who = facts.process().1;
    let advice = "workers lock the parameter store for the GPU: set LimitMEMLOCK=infinity in the unit, or `memlock unlimited` in /etc/security/limits.conf";
    match limit(facts, "Max locked memory") {
        Some(Err(())) => Finding::ok(CHECK, format!("unlimited for {who}")),
        Some(Ok(bytes)) if facts.path("/proc/driver/nvidia/version").exists() => {
            Finding::fail(CHECK, format!("{bytes} bytes for {who}"), advice)
        }
        Some(Ok(bytes)) => Finding::ok(CHECK, format!("{bytes} bytes for {who}; CPU devices lock nothing")),
        None => Finding::warn(CHECK, "cannot be read", advice),
    }
}

fn files(facts: &Facts) -> Finding {
    const CHECK: &str = "open files";
    let who = facts.process().1;
    let advice = "set LimitNOFILE=65536 in the unit, or `ulimit -n 65536` before ramtorchd is started";
    match limit(facts, "Max open files") {
        Some(Ok(n)) if n < FILES_LEAST => Finding::warn(CHECK, format!("{n} for {who}"), advice),
        Some(Ok(n)) => Finding::ok(CHECK, format!("{n} for {who}")),
        Some(Err(())) => Finding::ok(CHECK, format!("unlimited for {who}")),
        None => Finding::warn(CHECK, "cannot be read", advice),
    }
}

fn cgroup(facts: &Facts) -> Finding {
    const CHECK: &str = "cgroup memory";
    let (process, who) = facts.process();
    let text = facts.read(&format!("{process}/cgroup")).unwrap_or_default();
    let own = text.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or_default();
    let mut least: Option<(u64, String)> = None;
    let mut path = format!("/sys/fs/cgroup/{own}");
    while path.starts_with("/sys/fs/cgroup") {
        let limit = facts.read(&format!("{path}/memory.max")).and_then(|t| t.trim().parse::<u64>().ok());
        if let Some(bytes) = limit.filter(|b| least.as_ref().is_none_or(|(l, _)| b < l)) {
            least = Some((bytes, path.clone()));
        }
        match path.trim_end_matches('/').rfind('/') {
            Some(at) => path.truncate(at),
            None => break,
        }
    }
    let total = super::memory::total(facts).unwrap_or(u64::MAX);
    match least {
        Some((bytes, place)) if bytes < total / 10 * 9 => Finding::warn(
            CHECK,
            format!("{} of {} for {who} ({place})", gib(bytes), gib(total)),
            "parameter stores count against it: raise MemoryMax= of the unit, or the container's limit, where jobs should have all of the RAM",
        ),
        Some((bytes, _)) => Finding::ok(CHECK, format!("{} for {who}", gib(bytes))),
        None => Finding::ok(CHECK, format!("no limit for {who}")),
    }
}

fn clock(facts: &Facts) -> Finding {
    const CHECK: &str = "clock";
    let advice = "set the time and turn on a time service (timedatectl set-ntp true): certificates and checkpoints go by it";
    if facts.now < EARLIEST {
        return Finding::fail(CHECK, format!("it is before 2025 ({} s since 1970)", facts.now), advice);
    }
    if let Daemon::Up { started_unix_ms, .. } = facts.daemon {
        if started_unix_ms / 1000 > facts.now + 60 {
            return Finding::warn(CHECK, "the daemon started in the future: the clock was set back", advice);
        }
    }
    if facts.path("/run/systemd/timesync").exists() && !facts.path("/run/systemd/timesync/synchronized").exists() {
        return Finding::warn(CHECK, "not synchronized yet", advice);
    }
    Finding::ok(CHECK, "plausible")
}

pub fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests {
    use crate::doctor::tests::Machine;
    use crate::doctor::{Daemon, Status};

    const LIMITS: &str = "Max open files            1024                 4096                 files\nMax locked memory         8388608              8388608              bytes\n";

    #[test]
    fn limits_are_those_of_the_daemon_where_there_is_one() {
        let mut m = Machine::new();
        m.write("/proc/77/limits", LIMITS);
        assert_eq!(m.status("open files"), Status::Ok);
        m.facts.daemon = Daemon::Up { pid: 77, state_dir: "/s".into(), socket: None, segments: None, started_unix_ms: 0 };
        assert!(m.finding("open files").found.contains("1024 for the daemon"));
        assert_eq!((m.status("open files"), m.status("locked memory")), (Status::Warn, Status::Ok));
        m.write("/proc/driver/nvidia/version", "NVRM version: x 580.1 x");
        assert!(m.finding("locked memory").advice.contains("LimitMEMLOCK"));
    }

    #[test]
    fn the_tightest_cgroup_counts() {
        let m = Machine::new();
        m.write("/proc/self/cgroup", "0::/system.slice/x.service\n");
        assert_eq!(m.status("cgroup memory"), Status::Ok);
        m.write("/sys/fs/cgroup/system.slice/memory.max", "8589934592\n");
        m.write("/sys/fs/cgroup/system.slice/x.service/memory.max", "max\n");
        let f = m.finding("cgroup memory");
        assert!(f.status == Status::Warn && f.found.contains("8.0 GiB of 64.0 GiB") && f.found.contains("system.slice"), "{f:?}");
    }

    #[test]
    fn a_clock_that_cannot_be_right_is_told() {
        let mut m = Machine::new();
        m.write("/run/systemd/timesync/x", "");
        assert_eq!(m.status("clock"), Status::Warn);
        m.write("/run/systemd/timesync/synchronized", "");
        assert_eq!(m.status("clock"), Status::Ok);
        m.facts.now = 86_400;
        assert_eq!(m.status("clock"), Status::Fail);
    }
}
