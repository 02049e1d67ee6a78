//! Looks a node over: what ramtorch needs of it, what is wrong, and what to do.
//!
//! Everything is read from files below a root and from a few [`Facts`], so that each check is tested with a machine made of
//! files. Nothing is changed, no library is loaded, and nothing here needs a daemon; with one, its own limits and jobs are
//! looked at, too.

mod gpu;
mod limits;
mod memory;
mod place;

use std::path::{Path, PathBuf};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// As it should be.
    Ok,
    /// It works, or some jobs will; something could be better.
    Warn,
    /// It does not work.
    Fail,
}

impl Status {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Fail => "fail",
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Name of the check.
    pub check: &'static str,
    /// How it ended.
    pub status: Status,
    /// What is there.
    pub found: String,
    /// What to do; empty where all is well.
    pub advice: String,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, status: Status::Ok, found: found.into(), advice: String::new() }
    }
    fn warn(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { check, status: Status::Warn, found: found.into(), advice: advice.into() }
    }
    fn fail(check: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
        Finding { check, status: Status::Fail, found: found.into(), advice: advice.into() }
    }
}

/// What is known of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Daemon {
    /// It answers.
    Up {
        /// Its process.
        pid: i32,
        /// Its state folder.
        state_dir: PathBuf,
        /// Its socket, if it was reached through one.
        socket: Option<PathBuf>,
        /// Parameter stores of its jobs, without the slash; `None` where it does not tell about those of others.
        segments: Option<Vec<String>>,
        /// When it started, milliseconds since 1970.
        started_unix_ms: i64,
    },
    /// It does not, and this is why.
    Down(String),
}

/// The machine, as far as it is not read from files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Root of all files that are read: `/`, or a test's folder.
    pub root: PathBuf,
    /// Environment variables that tell where libraries are.
    pub environment: Vec<(String, String)>,
    /// Bytes of /dev/shm: all, and free.
    pub shm: Option<(u64, u64)>,
    /// User whose daemon it is, or would be.
    pub uid: u32,
    /// Seconds since 1970.
    pub now: i64,
    /// The daemon.
    pub daemon: Daemon,
    /// What `ldconfig -p` says.
    pub ldconfig: String,
}

impl Facts {
    /// This machine.
    pub fn gather(daemon: Daemon) -> Facts {
        let shm = nix::sys::statvfs::statvfs("/dev/shm").ok();
        let bytes = |s: &nix::sys::statvfs::Statvfs| {
            (s.blocks().saturating_mul(s.fragment_size()), s.blocks_available().saturating_mul(s.fragment_size()))
        };
        let names = ["RAMTORCH_CUDA_LIBRARIES", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "HOME"];
        let ldconfig = ["/sbin/ldconfig", "/usr/sbin/ldconfig"].iter().find_map(|p| std::process::Command::new(p).arg("-p").output().ok());
        let own = nix::unistd::geteuid().as_raw();
        let uid = match &daemon {
            Daemon::Up { pid, .. } => std::fs::metadata(format!("/proc/{pid}")).map_or(own, |m| std::os::unix::fs::MetadataExt::uid(&m)),
            Daemon::Down(_) => own,
        };
        Facts {
            root: "/".into(),
            environment: names.iter().filter_map(|n| Some((n.to_string(), std::env::var(n).ok()?))).collect(),
            shm: shm.as_ref().map(bytes),
            uid,
            now: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX)),
            daemon,
            ldconfig: ldconfig.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default(),
        }
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.root.join(absolute.trim_start_matches('/'))
    }

    fn read(&self, absolute: &str) -> Option<String> {
        std::fs::read_to_string(self.path(absolute)).ok()
    }

    fn names(&self, absolute: &str) -> Vec<String> {
        names(&self.path(absolute))
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.environment.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The process whose limits count: the daemon's, else this one's.
    fn process(&self) -> (String, &'static str) {
        match &self.daemon {
            Daemon::Up { pid, .. } if self.path(&format!("/proc/{pid}")).exists() => (format!("/proc/{pid}"), "the daemon"),
            _ => ("/proc/self".into(), "this shell"),
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Every check, in the order in which they are shown.
pub fn examine(facts: &Facts) -> Vec<Finding> {
    let mut all = vec![place::daemon(facts)];
    all.extend(gpu::all(facts));
    all.extend(limits::all(facts));
    all.extend(memory::all(facts));
    all.extend(place::all(facts));
    all
}

/// The gravest of them.
pub fn worst(findings: &[Finding]) -> Status {
    findings.iter().map(|f| f.status).max().unwrap_or(Status::Ok)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine made of files, in good health, without a GPU.
    pub struct Machine {
        pub dir: tempfile::TempDir,
        pub facts: Facts,
    }

    impl Machine {
        pub fn new() -> Machine {
            let dir = tempfile::tempdir().unwrap();
            let facts = Facts {
                root: dir.path().into(),
                environment: vec![],
                shm: Some((60 << 30, 50 << 30)),
                uid: 0,
                now: 1_800_000_000,
                daemon: Daemon::Down("no such socket".into()),
                ldconfig: String::new(),
            };
            let machine = Machine { dir, facts };
            machine.write("/proc/meminfo", "MemTotal:       67108864 kB\nMemAvailable:   60000000 kB\n");
            machine.write("/proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax open files            65536                524288               files\nMax locked memory         unlimited            unlimited            bytes\n");
            machine.write("/proc/mounts", "tmpfs /dev/shm tmpfs rw,nosuid,nodev,size=60g,huge=advise 0 0\n");
            machine.write("/proc/sys/kernel/osrelease", "6.8.0-test\n");
            machine.write("/sys/kernel/security/lsm", "lockdown,capability,landlock,yama\n");
            machine
        }
        pub fn write(&self, path: &str, text: &str) {
            let path = self.facts.path(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        pub fn finding(&self, check: &str) -> Finding {
            examine(&self.facts).into_iter().find(|f| f.check == check).unwrap_or_else(|| panic!("no check {check}"))
        }
        pub fn status(&self, check: &str) -> Status {
            self.finding(check).status
        }
    }

    #[test]
    fn a_healthy_machine_has_nothing_that_fails_and_every_complaint_has_advice() {
        let m = Machine::new();
        let all = examine(&m.facts);
        assert!(all.len() >= 12, "{all:?}");
        let bad: Vec<&Finding> = all.iter().filter(|f| f.status != Status::Ok && f.check != "daemon").collect();
        assert!(bad.is_empty(), "{bad:?}");
        for f in all {
            assert_eq!(f.status == Status::Ok, f.advice.is_empty(), "{f:?}");
        }
    }

    #[test]
    fn a_machine_of_which_nothing_can_be_read_panics_nowhere() {
        let mut m = Machine::new();
        let empty = tempfile::tempdir().unwrap();
        m.facts.root = empty.path().into();
        m.facts.shm = None;
        assert_eq!(worst(&examine(&m.facts)), Status::Fail);
    }

    #[test]
    fn this_machine_can_be_examined() {
        let facts = Facts::gather(Daemon::Down("not asked".into()));
        assert!(examine(&facts).len() >= 12);
    }
}
