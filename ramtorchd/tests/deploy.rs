//! The files in `deploy/`: what the daemon reads of them it understands, and systemd takes the units.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

use ramtorchd::config::ConfigFile;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `systemd-analyze security` of the service; docs/operations.md states it.
const EXPOSURE_MAX: f64 = 2.6;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

fn systemd_analyze(arguments: &[&str]) -> Option<(bool, String)> {
    match Command::new("systemd-analyze").args(arguments).output() {
        Ok(o) => Some((o.status.success(), String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr))),
        Err(e) => {
            eprintln!("SKIPPED: systemd-analyze cannot be run: {e}");
            None
        }
    }
}

#[test]
fn configurations_are_understood() {
    let service = ConfigFile::read(&deploy("ramtorchd.toml")).unwrap();
    assert_eq!((service.access.groups, service.access.admin_groups), (vec!["ramtorch".to_string()], vec!["ramtorch-admin".to_string()]));
    assert!(!service.paths.read.is_empty() && service.tcp.is_none() && service.metrics.listen.unwrap().ip().is_loopback());
    assert!(!ConfigFile::read(&deploy("container.toml")).unwrap().paths.write.is_empty());
    // What is commented out is an example that works, too.
    let text = std::fs::read_to_string(deploy("ramtorchd.toml")).unwrap();
    let uncommented: String = text
        .lines()
        .skip(1)
        .map(|l| l.strip_prefix("# ").unwrap_or(l))
        .filter(|l| !l.starts_with("Folders") && !l.starts_with("systemctl"))
        .map(|l| format!("{l}\n"))
        .collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), uncommented).unwrap();
    let all = ConfigFile::read(file.path()).unwrap();
    assert!(
        all.tcp.unwrap().clients.contains_key("alice.example.org")
            && all.jobs.keep_segments_on_stop == ramtorchd::config::KeepSegments::Always
    );
}

#[test]
fn systemd_takes_the_units() {
    let dir = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for name in ["ramtorchd.service", "ramtorch-shm-huge.service"] {
        // The program need not be installed for the unit to be right.
        let text = std::fs::read_to_string(deploy(name)).unwrap().replace("/usr/bin/ramtorchd", "/bin/true");
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        units.push(path);
    }
    let mut arguments = vec!["verify", "--man=no"];
    arguments.extend(units.iter().map(|p| p.to_str().unwrap()));
    let Some((ok, said)) = systemd_analyze(&arguments) else { return };
    assert!(ok && !said.contains("ramtorch"), "{said}");
}

#[test]
fn the_service_is_as_confined_as_is_said() {
    let unit = deploy("ramtorchd.service");
    let Some((_, said)) = systemd_analyze(&["security", "--offline=true", unit.to_str().unwrap()]) else { return };
    let Some(score) = said.lines().find_map(|l| l.split("service: ").nth(1)?.split_whitespace().next()?.parse::<f64>().ok()) else {
        eprintln!("SKIPPED: this systemd-analyze does not rate units offline: {said}");
        return;
    };
    assert!(score <= EXPOSURE_MAX, "{score}\n{said}");
}
