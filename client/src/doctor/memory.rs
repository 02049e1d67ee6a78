//! RAM, shared memory, huge pages, and parameter stores that nobody owns.

use super::limits::gib;
use super::{Daemon, Facts, Finding};

pub fn all(facts: &Facts) -> Vec<Finding> {
    vec![shm(facts), huge_pages(facts), leftovers(facts), remove_ipc(facts)]
}

/// Bytes of RAM.
pub fn total(facts: &Facts) -> Option<u64> {
    let text = facts.read("/proc/meminfo")?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

fn shm(facts: &Facts) -> Finding {
    const CHECK: &str = "/dev/shm";
    let (Some((all, free)), Some(ram)) = (facts.shm, total(facts)) else {
        return Finding::fail(
            CHECK,
            "it or the RAM cannot be measured",
            "parameter stores live there: mount a tmpfs on /dev/shm, and /proc",
        );
    };
    let found = format!("{} of {}, RAM {}", gib(free), gib(all), gib(ram));
    let percent = all.saturating_mul(100) / ram.max(1);
    let advice = "parameter stores live there: add `tmpfs /dev/shm tmpfs size=95% 0 0` to /etc/fstab and `mount -o remount,size=95% /dev/shm` (nothing is reserved by it); a container takes --shm-size";
    if all <= 64 << 20 {
        return Finding::fail(CHECK, found, advice);
    }
    if percent < 75 {
        return Finding::warn(CHECK, format!("{found}: {percent} % of the RAM at most"), advice);
    }
    if free < all / 20 {
        return Finding::warn(
            CHECK,
            format!("{found}: almost full"),
            "`ls -l /dev/shm` shows whose it is; `ramtorch list` the jobs that hold stores",
        );
    }
    Finding::ok(CHECK, format!("{} free of {}, RAM {}", gib(free), gib(all), gib(ram)))
}

fn huge_pages(facts: &Facts) -> Finding {
    const CHECK: &str = "huge pages";
    let mounts = facts.read("/proc/mounts").unwrap_or_default();
    let options = mounts.lines().filter_map(|l| l.split_once(" /dev/shm ")).next_back().map(|(_, rest)| rest).unwrap_or_default();
    let of_mount = options.split([',', ' ']).find_map(|o| o.strip_prefix("huge="));
    let forced = facts.read("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    match of_mount {
        Some(mode @ ("advise" | "always" | "within_size")) if !forced.contains("[deny]") => {
            Finding::ok(CHECK, format!("/dev/shm has huge={mode}"))
        }
        _ if forced.contains("[force]") => Finding::ok(CHECK, "forced for all shared memory"),
        _ => Finding::warn(
            CHECK,
            format!("/dev/shm has {}", of_mount.map_or("none".to_string(), |m| format!("huge={m}"))),
            "page-locking and copies are faster with them: systemctl enable --now ramtorch-shm-huge (or mount -o remount,huge=advise /dev/shm)",
        ),
    }
}

fn leftovers(facts: &Facts) -> Finding {
    const CHECK: &str = "parameter stores";
    let names: Vec<String> = facts.names("/dev/shm").into_iter().filter(|n| n.starts_with("ramtorch-")).collect();
    let bytes = |n: &String| std::fs::metadata(facts.path("/dev/shm").join(n)).map_or(0, |m| m.len());
    let known: Option<&Vec<String>> = match &facts.daemon {
        Daemon::Up { segments, .. } => segments.as_ref(),
        Daemon::Down(_) => None,
    };
    if names.is_empty() {
        return Finding::ok(CHECK, "none");
    }
    let Some(known) = known else {
        let sum: u64 = names.iter().map(bytes).sum();
        let found = format!("{} in /dev/shm, {}", names.len(), gib(sum));
        return match &facts.daemon {
            Daemon::Up { .. } => Finding::ok(CHECK, format!("{found}; whose they are, administrators are told")),
            Daemon::Down(_) => {
                Finding::warn(CHECK, found, "no daemon runs: start it, and it goes on with those of its jobs and removes the rest")
            }
        };
    };
    let strange: Vec<&String> = names.iter().filter(|n| !known.contains(n)).collect();
    if strange.is_empty() {
        return Finding::ok(CHECK, format!("{} of this daemon's jobs", names.len()));
    }
    let sum: u64 = strange.iter().map(|n| bytes(n)).sum();
    let list: Vec<&str> = strange.iter().take(4).map(|n| n.as_str()).collect();
    Finding::warn(
        CHECK,
        format!("{} that no job of this daemon has, {}: {}", strange.len(), gib(sum), list.join(", ")),
        "they are another daemon's, or its who was killed and never started again; if no ramtorchd of their owner runs: rm /dev/shm/NAME",
    )
}

/// systemd-logind removes the shared memory of users who log out, unless they are system users.
fn remove_ipc(facts: &Facts) -> Finding {
    const CHECK: &str = "RemoveIPC";
    if !facts.path("/run/systemd/system").exists() {
        return Finding::ok(CHECK, "no systemd here");
    }
    // Up to 999 by default: login.defs(5), SYS_UID_MAX.
    let most =
        facts.read("/etc/login.defs").and_then(|t| t.lines().find_map(|l| l.strip_prefix("SYS_UID_MAX")?.trim().parse::<u32>().ok()));
    if facts.uid <= most.unwrap_or(999) {
        return Finding::ok(CHECK, format!("user {} is root or a system user, whose shared memory stays", facts.uid));
    }
    let mut value = None;
    let mut files = vec!["/usr/lib/systemd/logind.conf".to_string(), "/etc/systemd/logind.conf".to_string()];
    for folder in ["/usr/lib/systemd/logind.conf.d", "/etc/systemd/logind.conf.d"] {
        files.extend(facts.names(folder).into_iter().map(|n| format!("{folder}/{n}")));
    }
    for text in files.iter().filter_map(|f| facts.read(f)) {
        for line in text.lines() {
            if let Some(v) = line.trim().strip_prefix("RemoveIPC=") {
                value = Some(v.trim().to_ascii_lowercase());
            }
        }
    }
    let off = value.as_deref().is_some_and(|v| ["no", "0", "false", "off", "n", "f"].contains(&v));
    let linger = facts.names("/var/lib/systemd/linger");
    if off {
        return Finding::ok(CHECK, "off");
    }
    let hint = if linger.is_empty() { "" } else { " (lingering users are spared while they linger)" };
    Finding::warn(
        CHECK,
        format!("on, and the daemon's user {} is no system user{hint}", facts.uid),
        "when this user logs out, the parameter stores are removed and jobs go back to checkpoints: run the service (user ramtorch), `loginctl enable-linger`, or set RemoveIPC=no in /etc/systemd/logind.conf",
    )
}

#[cfg(test)]
mod tests {
    use crate::doctor::tests::Machine;
    use crate::doctor::{Daemon, Status};

    #[test]
    fn shared_memory_is_weighed_against_ram() {
        let mut m = Machine::new();
        let mut status = |all: u64, free: u64| {
            m.facts.shm = Some((all, free));
            m.status("/dev/shm")
        };
        assert_eq!(status(60 << 30, 50 << 30), Status::Ok);
        assert_eq!(status(32 << 30, 30 << 30), Status::Warn);
        assert_eq!(status(60 << 30, 1 << 30), Status::Warn);
        assert_eq!(status(64 << 20, 64 << 20), Status::Fail);
    }

    #[test]
    fn huge_pages_are_those_of_the_mount() {
        let m = Machine::new();
        assert_eq!(m.status("huge pages"), Status::Ok);
        m.write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise never [deny] force\n");
        assert_eq!(m.status("huge pages"), Status::Warn);
        m.write("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size advise [never] deny force\n");
        m.write("/proc/mounts", "tmpfs /dev/shm tmpfs rw,huge=always 0 0\ntmpfs /dev/shm tmpfs rw 0 0\n");
        assert!(m.finding("huge pages").advice.contains("ramtorch-shm-huge"), "the mount on top counts");
    }

    #[test]
    fn stores_that_no_job_has_are_named() {
        let mut m = Machine::new();
        assert_eq!(m.finding("parameter stores").found, "none");
        m.write("/dev/shm/ramtorch-abc-1", "x");
        m.write("/dev/shm/ramtorch-old-1", "x");
        m.write("/dev/shm/else", "x");
        assert!(m.finding("parameter stores").advice.contains("start it"));
        let up = |segments| Daemon::Up { pid: 1, state_dir: "/s".into(), socket: None, segments, started_unix_ms: 0 };
        m.facts.daemon = up(Some(vec!["ramtorch-abc-1".into()]));
        let f = m.finding("parameter stores");
        assert!(f.status == Status::Warn && f.found.contains("ramtorch-old-1") && !f.found.contains("abc"), "{f:?}");
        m.facts.daemon = up(Some(vec!["ramtorch-abc-1".into(), "ramtorch-old-1".into()]));
        assert_eq!(m.status("parameter stores"), Status::Ok);
        m.facts.daemon = up(None);
        assert_eq!(m.status("parameter stores"), Status::Ok);
    }

    #[test]
    fn logging_out_is_a_danger_to_people_only() {
        let mut m = Machine::new();
        m.write("/run/systemd/system/x", "");
        assert_eq!(m.status("RemoveIPC"), Status::Ok, "root");
        m.facts.uid = 998;
        assert_eq!(m.status("RemoveIPC"), Status::Ok, "a system user");
        m.facts.uid = 1000;
        assert_eq!(m.status("RemoveIPC"), Status::Warn, "the default is on");
        m.write("/etc/systemd/logind.conf", "[Login]\n#RemoveIPC=yes\nRemoveIPC=no\n");
        assert_eq!(m.status("RemoveIPC"), Status::Ok);
        m.write("/etc/systemd/logind.conf.d/x.conf", "[Login]\nRemoveIPC=yes\n");
        assert_eq!(m.status("RemoveIPC"), Status::Warn);
    }
}
