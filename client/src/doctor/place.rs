//! The daemon, its folder and its socket, and what the kernel can confine.

use super::{Daemon, Facts, Finding};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

pub fn all(facts: &Facts) -> Vec<Finding> {
    vec![state_dir(facts), socket(facts), landlock(facts)]
}

pub fn daemon(facts: &Facts) -> Finding {
    match &facts.daemon {
        Daemon::Up { pid, .. } => Finding::ok("daemon", format!("answers, pid {pid}")),
        Daemon::Down(why) => {
            let advice = "systemctl start ramtorchd, or ramtorchd start; the checks below are those of this user and shell";
            Finding::warn("daemon", why.replace('\n', " "), advice)
        }
    }
}

/// The folder of the daemon, or the one that it would take.
fn state_dir(facts: &Facts) -> Finding {
    const CHECK: &str = "state folder";
    let path: PathBuf = match &facts.daemon {
        Daemon::Up { state_dir, .. } => state_dir.clone(),
        Daemon::Down(_) if facts.uid == 0 => "/var/lib/ramtorch".into(),
        Daemon::Down(_) => match facts.variable("HOME") {
            Some(home) => Path::new(home).join(".local/state/ramtorch"),
            None => return Finding::warn(CHECK, "HOME is not set", "give ramtorchd a --state-dir"),
        },
    };
    let shown = path.display().to_string();
    match std::fs::metadata(facts.path(&shown)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Finding::ok(CHECK, format!("{shown} is made at the first start")),
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Finding::ok(CHECK, format!("{shown}, closed to this user")),
        Err(e) => Finding::fail(CHECK, format!("{shown}: {e}"), "give ramtorchd another --state-dir"),
        Ok(m) if !m.is_dir() => {
            Finding::fail(CHECK, format!("{shown} is no folder"), "move it away, or give ramtorchd another --state-dir")
        }
        Ok(m) if m.permissions().mode() & 0o002 != 0 => Finding::fail(
            CHECK,
            format!("{shown} can be written by everybody"),
            format!("chmod o-w {shown}: who writes there can have the daemon do anything"),
        ),
        Ok(m) if facts.root == Path::new("/") && m.uid() != facts.uid => Finding::warn(
            CHECK,
            format!("{shown} belongs to user {}, the daemon's is {}", m.uid(), facts.uid),
            format!("chown -R the folder to the daemon's user, or start ramtorchd as the user of {shown}"),
        ),
        Ok(m) => Finding::ok(CHECK, format!("{shown}, mode {:o}", m.permissions().mode() & 0o777)),
    }
}

fn socket(facts: &Facts) -> Finding {
    const CHECK: &str = "socket";
    let Daemon::Up { socket, .. } = &facts.daemon else { return Finding::ok(CHECK, "no daemon") };
    let Some(path) = socket else { return Finding::ok(CHECK, "not used: the daemon was reached over TCP") };
    let shown = path.display().to_string();
    match std::fs::symlink_metadata(facts.path(&shown)) {
        Ok(m) if m.file_type().is_socket() && m.permissions().mode() & 0o006 == 0 => {
            Finding::ok(CHECK, format!("{shown}, mode {:o}, group {}", m.permissions().mode() & 0o777, m.gid()))
        }
        Ok(m) if m.file_type().is_socket() => Finding::warn(
            CHECK,
            format!("{shown} has mode {:o}", m.permissions().mode() & 0o777),
            format!("chmod 0660 {shown}; somebody has opened it to everybody"),
        ),
        Ok(_) => Finding::fail(CHECK, format!("{shown} is no socket"), "remove it and start the daemon again"),
        Err(e) => Finding::fail(CHECK, format!("{shown}: {e}"), "start the daemon again: its socket was removed under it"),
    }
}

/// Workers are confined to `[paths]` by Landlock.
fn landlock(facts: &Facts) -> Finding {
    const CHECK: &str = "Landlock";
    let release = facts.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let modules = facts.read("/sys/kernel/security/lsm");
    let advice = "without it [paths] are checked when a job is submitted, and not again when files are opened: boot with lsm=…,landlock, on Linux 6.2 or later";
    let release = release.trim();
    match modules {
        Some(m) if !m.split([',', '\n']).any(|m| m == "landlock") => Finding::warn(CHECK, format!("off, Linux {release}"), advice),
        _ if version < (5, 13) => Finding::warn(CHECK, format!("Linux {release} does not have it"), advice),
        _ if version < (6, 2) => Finding::warn(CHECK, format!("Linux {release} has it in part"), advice),
        Some(_) => Finding::ok(CHECK, format!("on, Linux {release}")),
        None => Finding::ok(CHECK, format!("Linux {release} can have it; whether it is on cannot be read")),
    }
}

#[cfg(test)]
mod tests {
    use crate::doctor::tests::Machine;
    use crate::doctor::{Daemon, Status};
    use std::os::unix::fs::PermissionsExt;

    fn up(m: &mut Machine) {
        let socket = Some("/run/ramtorch/d.sock".into());
        m.facts.daemon = Daemon::Up { pid: 1, state_dir: "/var/lib/ramtorch".into(), socket, segments: None, started_unix_ms: 0 };
    }

    #[test]
    fn a_folder_that_everybody_can_write_to_is_a_failure() {
        let mut m = Machine::new();
        assert!(m.finding("state folder").found.contains("made at the first start"));
        up(&mut m);
        m.write("/var/lib/ramtorch/lock", "1");
        let set = |mode| std::fs::set_permissions(m.facts.path("/var/lib/ramtorch"), std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o750);
        assert_eq!(m.status("state folder"), Status::Ok);
        set(0o777);
        assert!(m.finding("state folder").advice.contains("chmod o-w"));
    }

    #[test]
    fn a_socket_is_there_and_closed_to_strangers() {
        let mut m = Machine::new();
        up(&mut m);
        assert_eq!(m.status("socket"), Status::Fail);
        m.write("/run/ramtorch/x", "");
        let path = m.facts.path("/run/ramtorch/d.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o660)).unwrap();
        assert_eq!(m.status("socket"), Status::Ok);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(m.status("socket"), Status::Warn);
    }

    #[test]
    fn kernels_that_cannot_confine_are_told() {
        let m = Machine::new();
        assert_eq!(m.status("Landlock"), Status::Ok);
        m.write("/proc/sys/kernel/osrelease", "5.15.0-91-generic\n");
        assert_eq!(m.status("Landlock"), Status::Warn);
        m.write("/proc/sys/kernel/osrelease", "6.8.0\n");
        m.write("/sys/kernel/security/lsm", "capability,yama\n");
        assert_eq!(m.status("Landlock"), Status::Warn);
    }
}
