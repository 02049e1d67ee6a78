//! Confines a worker process to the folders of `[paths]`, by Landlock: what the check at submission cannot rule out (a link
//! that is put in place afterwards) the kernel then refuses when the file is opened.
//!
//! Applied by a worker to itself, before it has threads or has read anything of a user. Programs, libraries, devices,
//! /proc and /sys stay in reach; so do folders for temporary files, the cache folder, and shared memory. The worker of a job writes
//! into that job's folder of the state folder and where its outputs are, and nowhere else below the roots.

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Environment variable that tells a worker its folders, as JSON of [`Rules`].
pub const VARIABLE: &str = "RAMTORCH_WORKER_ROOTS";

/// What is known of the kernel's file operations; newer kernels know these, too.
const KNOWN: ABI = ABI::V3;

/// Folders of the system that programs, CUDA and its libraries are read from.
const SYSTEM_READ: [&str; 10] = ["/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/run", "/nix", "/snap"];
/// Folders that programs and drivers write to.
const SYSTEM_WRITE: [&str; 6] = ["/dev", "/proc", "/sys", "/tmp", "/var/tmp", "/var/run"];

/// What a worker is told of files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// What confines it; nothing, where the daemon has no `[paths]`.
    pub sandbox: Option<Sandbox>,
    /// Where the outputs of its job were at its submission, if that was noted.
    pub outputs: Option<Vec<PathBuf>>,
}

impl Rules {
    /// Those of this worker; none of one that no daemon of this version started.
    ///
    /// # Errors
    /// Text: they make no sense.
    pub fn from_environment() -> Result<Rules, String> {
        let Ok(text) = std::env::var(VARIABLE) else { return Ok(Rules::default()) };
        serde_json::from_str(&text).map_err(|e| format!("{VARIABLE} makes no sense: {e}"))
    }
}

/// Folders of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Read below these.
    pub read: Vec<PathBuf>,
    /// Read and written below these.
    pub write: Vec<PathBuf>,
    /// Written below these; where one is not there yet, below the last folder on the way to it, so that it can be made.
    pub make: Vec<PathBuf>,
    /// Token caches: as `make`, and links lead where they lead.
    pub caches: Vec<PathBuf>,
    /// What of `make` and `caches` does not lie below one of these is left out.
    pub roots: Vec<PathBuf>,
}

/// How far a process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confined {
    /// As asked.
    Fully,
    /// The kernel knows less than was asked for.
    Partly,
    /// The kernel has no Landlock, or it is turned off.
    Not,
}

impl Sandbox {
    /// The folders that `make` and `caches` come to now. Outputs have no link in them: one that came later opens nothing.
    fn to_make(&self) -> Vec<PathBuf> {
        let roots: Vec<PathBuf> = self.roots.iter().filter_map(|r| r.canonicalize().ok()).collect();
        let there = |path: &PathBuf| path.ancestors().find_map(|p| Some((p.to_path_buf(), p.canonicalize().ok()?)));
        let made = self.make.iter().filter_map(there).filter(|(path, real)| path == real);
        let all = made.chain(self.caches.iter().filter_map(there)).map(|(_, real)| real);
        all.filter(|p| roots.iter().any(|r| p.starts_with(r))).collect()
    }

    /// Confines the calling thread, and all threads and processes that it makes from now on. It cannot be undone.
    ///
    /// # Errors
    /// Text: the kernel has Landlock and refused.
    pub fn enter(&self) -> Result<Confined, String> {
        let libraries: Vec<PathBuf> = std::env::var_os("LD_LIBRARY_PATH").map(|v| std::env::split_paths(&v).collect()).unwrap_or_default();
        let program = std::env::current_exe().ok().and_then(|p| p.parent().map(PathBuf::from));
        let system = SYSTEM_READ.iter().map(PathBuf::from).chain(libraries).chain(program);
        let read: Vec<PathBuf> = system.filter(|p| p.is_absolute()).chain(self.read.iter().cloned()).collect();
        let write = SYSTEM_WRITE.iter().map(PathBuf::from).chain(self.write.iter().cloned());
        let write: Vec<PathBuf> = write.chain(self.to_make()).collect();
        let apply = || -> Result<RulesetStatus, landlock::RulesetError> {
            let created =
                Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(AccessFs::from_all(KNOWN))?.create()?;
            let created = created.add_rules(path_beneath_rules(&read, AccessFs::from_read(KNOWN)))?;
            let created = created.add_rules(path_beneath_rules(&write, AccessFs::from_all(KNOWN)))?;
            Ok(created.restrict_self()?.ruleset)
        };
        match apply() {
            Ok(RulesetStatus::FullyEnforced) => Ok(Confined::Fully),
            Ok(RulesetStatus::PartiallyEnforced) => Ok(Confined::Partly),
            Ok(RulesetStatus::NotEnforced) => Ok(Confined::Not),
            Err(e) => Err(format!("cannot confine this worker to [paths] (Landlock): {e}")),
        }
    }
}

/// Confines this worker as its daemon wants it. Nothing is done where the daemon has no `[paths]`.
///
/// # Errors
/// Text: the daemon's wish makes no sense, or the kernel refused.
pub fn enter_from_environment() -> Result<(), String> {
    let Some(sandbox) = Rules::from_environment()?.sandbox else { return Ok(()) };
    match sandbox.enter()? {
        Confined::Fully => {}
        Confined::Partly => tracing::warn!("this kernel confines workers to [paths] only in part (Linux 6.2 or later does it wholly)"),
        Confined::Not => {
            tracing::warn!("this kernel cannot confine workers to [paths] (no Landlock); paths were checked at submission only")
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_confined_thread_reaches_its_folders_and_nothing_else() {
        // Not below /tmp, which stays open, even where the checkout is; and a thread of its own, since nothing undoes this.
        let bases = std::env::current_dir().into_iter().chain(std::env::home_dir()).chain([PathBuf::from("/var/lib")]);
        let closed = |p: &PathBuf| p.canonicalize().is_ok_and(|p| !SYSTEM_WRITE.iter().any(|open| p.starts_with(open)));
        let made = bases.filter(closed).find_map(|base| tempfile::Builder::new().prefix("sandbox").tempdir_in(base).ok());
        let Some(dir) = made else {
            eprintln!("SKIPPED: no folder to write to outside of those that stay open");
            return;
        };
        let real = dir.path().canonicalize().unwrap();
        let at = |p: &str| real.join(p);
        for d in ["in", "out", "secret", "root", "root/mine", "root/other"] {
            std::fs::create_dir(at(d)).unwrap();
            std::fs::write(at(d).join("f"), "").unwrap();
        }
        let make = vec![at("root/mine/new/folder"), at("secret/new"), at("root/link/new"), at("root/inside/new")];
        std::os::unix::fs::symlink(at("root/other"), at("root/inside")).unwrap();
        let caches = vec![at("root/link")];
        std::os::unix::fs::symlink(at("secret"), at("root/link")).unwrap();
        let sandbox =
            Sandbox { read: vec![at("in"), at("root"), at("not-there")], write: vec![at("out")], make, caches, roots: vec![at("root")] };
        assert_eq!(sandbox.to_make(), [at("root/mine")], "nothing outside of the roots, whatever links say");
        let root = real.clone();
        let confined = std::thread::spawn(move || {
            let confined = sandbox.enter().unwrap();
            if confined == Confined::Not {
                return confined;
            }
            // A link that was put there after any check.
            std::os::unix::fs::symlink(root.join("secret/f"), root.join("out/link")).unwrap();
            assert!(std::fs::read(root.join("in/f")).is_ok() && std::fs::write(root.join("out/new"), "x").is_ok());
            assert!(std::fs::read(root.join("secret/f")).is_err() && std::fs::read(root.join("out/link")).is_err());
            assert!(std::fs::write(root.join("in/new"), "x").is_err() && std::fs::write(root.join("out/link"), "x").is_err());
            // What is to be made is, and another's beside it is not touched.
            std::fs::create_dir_all(root.join("root/mine/new/folder")).unwrap();
            assert!(std::fs::write(root.join("root/mine/new/folder/f"), "x").is_ok());
            assert!(std::fs::write(root.join("root/other/f"), "x").is_err() && std::fs::read(root.join("root/other/f")).is_ok());
            assert!(std::fs::write(root.join("root/new"), "x").is_err());
            assert!(std::fs::read("/proc/self/status").is_ok() && std::fs::read_dir("/usr").is_ok());
            confined
        })
        .join()
        .unwrap();
        if confined == Confined::Not {
            eprintln!("SKIPPED: this kernel has no Landlock; nothing was confined");
        }
    }
}
