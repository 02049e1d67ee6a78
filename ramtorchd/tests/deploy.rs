//! The files in `deploy/`: what the daemon reads of them it understands, systemd takes the units, Prometheus fires the alerts, and the
//! package that is built of them holds what it should.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used)]

use ramtorchd::config::ConfigFile;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `systemd-analyze security` of the service; docs/operations.md states it.
const EXPOSURE_MAX: f64 = 2.6;

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// Tells that a test is skipped, past the harness, which keeps to itself what successful tests print. In CI, where `.ci/run` installs
/// what tests need, none may be.
fn skipped(why: &str) {
    assert!(!std::env::var("CI").is_ok_and(|v| v == "true"), "skipped in CI: {why}");
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// What a program says. `None`: it is not there, and the test is skipped.
fn said(program: &str, arguments: &[&str]) -> Option<(bool, String)> {
    match Command::new(program).args(arguments).output() {
        Ok(o) => Some((o.status.success(), String::from_utf8_lossy(&o.stdout).into_owned() + &String::from_utf8_lossy(&o.stderr))),
        Err(e) => {
            skipped(&format!("{program} cannot be run: {e}"));
            None
        }
    }
}

fn systemd_analyze(arguments: &[&str]) -> Option<(bool, String)> {
    said("systemd-analyze", arguments)
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
        skipped(&format!("this systemd-analyze does not rate units offline: {said}"));
        return;
    };
    assert!(score <= EXPOSURE_MAX, "{score}\n{said}");
}

/// Each alert fires where it should and is quiet where it should, as Prometheus itself sees it: `alerts.yml` beside this file. That its
/// series are those of the daemon is tested where the page of metrics is made (`telemetry`).
#[test]
fn prometheus_fires_each_alert_and_only_where_it_should() {
    let (rules, cases) = (deploy("prometheus-rules.yml"), deploy("../ramtorchd/tests/alerts.yml"));
    let (rules_text, cases_text) = (std::fs::read_to_string(&rules).unwrap(), std::fs::read_to_string(&cases).unwrap());
    // By the lines, a case is on one line where it is quiet, and has a line of its own for the name where it fires.
    for alert in rules_text.lines().filter_map(|l| l.trim().strip_prefix("- alert: ")) {
        let quiet = cases_text.lines().any(|l| l.ends_with(&format!("alertname: {alert}, exp_alerts: [] }}")));
        let fires = cases_text.lines().any(|l| l.trim() == format!("alertname: {alert}"));
        assert!(quiet && fires, "alerts.yml lacks a case in which {alert} {}", if fires { "is quiet" } else { "fires" });
    }
    for arguments in [["check", "rules", rules.to_str().unwrap()], ["test", "rules", cases.to_str().unwrap()]] {
        let Some((ok, said)) = said("promtool", &arguments) else { return };
        assert!(ok, "{said}");
    }
}

/// What the dashboard asks for are questions that Prometheus understands.
#[test]
fn prometheus_understands_the_dashboard() {
    fn questions(value: &serde_json::Value, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => {
                found.extend(fields.get("expr").and_then(|e| e.as_str()).map(String::from));
                fields.values().for_each(|v| questions(v, found));
            }
            serde_json::Value::Array(values) => values.iter().for_each(|v| questions(v, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    questions(&serde_json::from_slice(&std::fs::read(deploy("grafana-dashboard.json")).unwrap()).unwrap(), &mut found);
    assert!(found.len() > 20, "{found:?}");
    // A recording rule for each; JSON is YAML.
    let rules: Vec<_> =
        found.iter().enumerate().map(|(i, expr)| serde_json::json!({ "record": format!("panel:{i}"), "expr": expr })).collect();
    let file = tempfile::NamedTempFile::new().unwrap();
    let groups = serde_json::json!({ "groups": [{ "name": "dashboard", "rules": rules }] });
    std::fs::write(file.path(), groups.to_string()).unwrap();
    let Some((ok, said)) = said("promtool", &["check", "rules", file.path().to_str().unwrap()]) else { return };
    assert!(ok, "{said}");
}

/// A file of the package: mode as `ls` shows it, and owner.
type Listed = BTreeMap<String, (String, String)>;

/// `dpkg-deb -c`, a line a file: mode, owner/group, bytes, date, time, ./path.
fn listed(package: &Path) -> Listed {
    let (ok, text) = said("dpkg-deb", &["-c", package.to_str().unwrap()]).unwrap();
    assert!(ok, "{text}");
    let line = |l: &str| {
        let fields: Vec<&str> = l.split_whitespace().collect();
        (fields[5].trim_start_matches("./").to_owned(), (fields[0].to_owned(), fields[1].to_owned()))
    };
    text.lines().map(line).collect()
}

#[test]
fn the_debian_package_holds_what_it_should() {
    for program in ["dpkg-deb", "strip", "objdump"] {
        if said(program, &["--version"]).is_none() {
            return;
        }
    }
    // Programs of the system stand in for ours: what is packed does not depend on them. `echo` tells completions.
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p);
    std::fs::create_dir(at("bin")).unwrap();
    std::fs::copy("/bin/true", at("bin/ramtorchd")).unwrap();
    std::fs::copy("/bin/echo", at("bin/ramtorch")).unwrap();
    let mut build = Command::new(deploy("debian/build.sh"));
    let built = build.arg(at("bin")).arg(at("out")).env("MAINTAINER", "Somebody <somebody@example.org>").output().unwrap();
    assert!(built.status.success(), "{}{}", String::from_utf8_lossy(&built.stdout), String::from_utf8_lossy(&built.stderr));
    let packages: Vec<PathBuf> = std::fs::read_dir(at("out")).unwrap().map(|e| e.unwrap().path()).collect();
    let [package] = &packages[..] else { panic!("{packages:?}") };
    let name = package.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with(&format!("ramtorch_{}_", env!("CARGO_PKG_VERSION"))) && name.ends_with(".deb"), "{name}");

    let files = listed(package);
    let plain: Vec<&str> = files.iter().filter(|(_, (mode, _))| mode.starts_with('-')).map(|(path, _)| path.as_str()).collect();
    let mut wanted: Vec<String> = [
        "etc/ramtorch/ramtorchd.toml",
        "usr/bin/ramtorch",
        "usr/bin/ramtorchd",
        "usr/lib/systemd/system/ramtorch-shm-huge.service",
        "usr/lib/systemd/system/ramtorchd.service",
        "usr/lib/sysusers.d/ramtorch.conf",
        "usr/lib/tmpfiles.d/ramtorch.conf",
        "usr/share/bash-completion/completions/ramtorch",
        "usr/share/doc/ramtorch/CHANGELOG.md",
        "usr/share/doc/ramtorch/README.md",
        "usr/share/doc/ramtorch/changelog.gz",
        "usr/share/doc/ramtorch/copyright",
        "usr/share/ramtorch/grafana-dashboard.json",
        "usr/share/ramtorch/prometheus-rules.yml",
    ]
    .map(String::from)
    .into();
    let pages = std::fs::read_dir(deploy("../docs")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    wanted.extend(pages.filter(|p| p.ends_with(".md")).map(|p| format!("usr/share/doc/ramtorch/{p}")));
    wanted.sort();
    assert_eq!(plain, wanted);
    for (path, (mode, owner)) in &files {
        let program = path.starts_with("usr/bin/");
        let right = if mode.starts_with('d') || program && mode.starts_with('-') { "rwxr-xr-x" } else { "rw-r--r--" };
        assert_eq!((&mode[1..], owner.as_str()), (right, "root/root"), "{path}");
    }

    // What dpkg is told, and what it runs.
    let (ok, text) = said("dpkg-deb", &["-e", package.to_str().unwrap(), at("control").to_str().unwrap()]).unwrap();
    assert!(ok, "{text}");
    let control = std::fs::read_to_string(at("control/control")).unwrap();
    assert!(!control.lines().any(|l| l.contains('@') && !l.starts_with("Maintainer: ")), "a place that was not filled in:\n{control}");
    for field in ["Package: ramtorch", &format!("Version: {}", env!("CARGO_PKG_VERSION")), "Maintainer: Somebody <somebody@example.org>"] {
        assert!(control.lines().any(|l| l == field), "{field}:\n{control}");
    }
    assert!(control.lines().any(|l| l.starts_with("Depends: libc6 (>= 2.") && l.contains("adduser")), "{control}");
    assert_eq!(std::fs::read_to_string(at("control/conffiles")).unwrap(), "/etc/ramtorch/ramtorchd.toml\n");
    for script in ["postinst", "prerm", "postrm"] {
        use std::os::unix::fs::PermissionsExt;
        let path = at("control").join(script);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755, "{script}");
        let (ok, text) = said("sh", &["-n", path.to_str().unwrap()]).unwrap();
        assert!(ok, "{script}: {text}");
    }

    // Whole, and what it is made of.
    let (ok, text) = said("dpkg-deb", &["-x", package.to_str().unwrap(), at("root").to_str().unwrap()]).unwrap();
    assert!(ok, "{text}");
    let sums = Command::new("md5sum").args(["--check", "--quiet"]).arg(at("control/md5sums")).current_dir(at("root")).output().unwrap();
    assert!(sums.status.success(), "{}", String::from_utf8_lossy(&sums.stdout));
    let same = |packed: &str, ours: &str| {
        assert_eq!(std::fs::read(at("root").join(packed)).unwrap(), std::fs::read(deploy(ours)).unwrap(), "{packed}")
    };
    same("usr/lib/systemd/system/ramtorchd.service", "ramtorchd.service");
    same("etc/ramtorch/ramtorchd.toml", "ramtorchd.toml");
    let completions = std::fs::read_to_string(at("root/usr/share/bash-completion/completions/ramtorch")).unwrap();
    assert_eq!(completions, "completion bash\n", "what `ramtorch completion bash` prints");
}

/// No image is built here: that needs a container engine and a network. What the file names has to exist, and what was built here before
/// (gigabytes) must not be copied.
#[test]
fn the_container_file_names_what_is_there() {
    let text = std::fs::read_to_string(deploy("Containerfile")).unwrap();
    let root = deploy("..");
    let ignored = std::fs::read_to_string(root.join(".dockerignore")).unwrap();
    for built in [".git", "target", "fuzz/target"] {
        assert!(ignored.lines().any(|l| l == built), "{built}");
    }
    let mut copied = Vec::new();
    let instructions = text.replace("\\\n", " ");
    for line in instructions.lines().filter(|l| !l.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match &words[..] {
            ["COPY", "--from=build", from @ .., _] => copied.extend(from.iter().map(|f| f.rsplit('/').next().unwrap())),
            ["COPY", from @ .., _] => from.iter().for_each(|f| assert!(root.join(f).exists(), "{f}")),
            ["RUN", "cargo", rest @ ..] => {
                for package in rest.iter().zip(rest.iter().skip(1)).filter(|(flag, _)| **flag == "-p").map(|(_, p)| p) {
                    let folder = root.join(package.trim_start_matches("ramtorch-"));
                    assert!(folder.join("Cargo.toml").exists(), "{package}");
                }
            }
            _ => {}
        }
    }
    assert_eq!(copied, ["ramtorchd", "ramtorch"]);
    for needed in ["ENTRYPOINT [\"/usr/bin/ramtorchd\"]", "STOPSIGNAL SIGTERM", "USER ramtorch", "/etc/ramtorch/ramtorchd.toml"] {
        assert!(text.contains(needed), "{needed}");
    }
}
