//! The folders below which the daemon reads and writes.
//!
//! A path is followed through every link as the kernel would, as far as it exists; what is left must be plain names. The
//! result has to lie below one of the roots, which are followed in the same way. So neither `..` nor a link leads out.
//!
//! What holds at the time of the check need not hold when a worker opens the file: whoever may write below a root could
//! put a link there in between. So workers are confined by the kernel as well (`sandbox`), where it has Landlock; where it
//! has not, roots protect against mistakes and against everybody who cannot write below them, and no more. docs/operations.md
//! says so to operators.

use super::config::PathsConfig;
use super::sandbox::Sandbox;
use ramtorch_job::JobSpec;
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

/// Files that a pattern may match.
const MATCHES_MAX: usize = 100_000;

/// What is done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reading.
    Read,
    /// Writing.
    Write,
}

/// A path that must not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It lies, or leads, elsewhere.
    #[error("{what} {}{} is not below {}", .path.display(), detour(.path, .leads_to), allowed(.roots))]
    Outside {
        /// Its role, as a key of the job file.
        what: String,
        /// As given.
        path: PathBuf,
        /// Where that is.
        leads_to: PathBuf,
        /// Where it would have to be.
        roots: Vec<PathBuf>,
    },
    /// It cannot be followed.
    #[error("{what} {}: {why}", .path.display())]
    Unusable {
        /// Its role.
        what: String,
        /// As given.
        path: PathBuf,
        /// Why not.
        why: String,
        /// It may be in order again by itself.
        passing: bool,
    },
}

impl PathError {
    /// What is in order again by itself where a file server comes back, or a file system is mounted late.
    pub fn is_passing(&self) -> bool {
        matches!(self, PathError::Unusable { passing: true, .. })
    }
}

/// Why a path leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Lost {
    /// In words.
    pub why: String,
    /// See [`PathError::is_passing`].
    pub passing: bool,
}

impl Lost {
    /// In the terms of an output, or of what a job reads.
    pub(super) fn of(self, what: &str, path: &Path) -> PathError {
        PathError::Unusable { what: what.into(), path: path.into(), why: self.why, passing: self.passing }
    }
}

impl From<String> for Lost {
    fn from(why: String) -> Lost {
        Lost { why, passing: false }
    }
}

/// Whether it is a disk, a file server, the way to it, or a lack of memory or descriptors: not the path that was asked for.
pub(super) fn is_passing(e: &std::io::Error) -> bool {
    const PASSING: [i32; 22] = [
        nix::libc::EIO,
        nix::libc::ESTALE,
        nix::libc::ENOTCONN,
        nix::libc::ESHUTDOWN,
        nix::libc::ETIMEDOUT,
        nix::libc::ECONNABORTED,
        nix::libc::ECONNREFUSED,
        nix::libc::ECONNRESET,
        nix::libc::EHOSTDOWN,
        nix::libc::EHOSTUNREACH,
        nix::libc::ENETDOWN,
        nix::libc::ENETUNREACH,
        nix::libc::EREMOTEIO,
        nix::libc::ENODEV,
        nix::libc::ENXIO,
        nix::libc::ENOMEDIUM,
        nix::libc::EAGAIN,
        nix::libc::EINTR,
        nix::libc::EBUSY,
        nix::libc::ENOMEM,
        nix::libc::EMFILE,
        nix::libc::ENFILE,
    ];
    e.raw_os_error().is_some_and(|code| PASSING.contains(&code))
}

fn detour(path: &Path, target: &Path) -> String {
    if path == target { String::new() } else { format!(" (which is {})", target.display()) }
}

fn allowed(roots: &[PathBuf]) -> String {
    match roots {
        [] => "any folder: this daemon has no [paths] write".into(),
        [one] => format!("{}, the only folder that this daemon's [paths] allow for it", one.display()),
        many => {
            let names: Vec<String> = many.iter().map(|p| p.display().to_string()).collect();
            format!("any of the folders that this daemon's [paths] allow for it: {}", names.join(", "))
        }
    }
}

/// Where the worker of a job writes.
#[derive(Debug, Clone)]
pub struct JobWrites {
    /// The job's own, in the state folder.
    pub folder: PathBuf,
    /// Outputs, links followed at its submission.
    pub outputs: Vec<PathBuf>,
    /// The folder of token caches that it names.
    pub cache: Option<PathBuf>,
}

/// The rules of `[paths]`.
#[derive(Debug, Clone, Default)]
pub struct Roots {
    config: PathsConfig,
    /// Folders of the daemon itself: workers use them, nobody may name them.
    own: Vec<PathBuf>,
}

impl Roots {
    /// Rules; `own` are folders of the daemon itself, which its workers use and nobody may name.
    pub fn new(config: PathsConfig, own: Vec<PathBuf>) -> Roots {
        Roots { config, own }
    }

    /// Whether everything that the daemon's user can reach is allowed.
    pub fn is_open(&self) -> bool {
        self.config.read.is_empty() && self.config.write.is_empty()
    }

    /// What confines a worker: that of a job to what the job writes, any other to the roots.
    pub fn sandbox(&self, job: Option<JobWrites>) -> Option<Sandbox> {
        if self.is_open() {
            return None;
        }
        let (read, write) = (self.config.read.iter(), self.config.write.iter());
        Some(match job {
            Some(JobWrites { folder, outputs, cache }) => Sandbox {
                read: read.chain(write.clone()).cloned().collect(),
                write: self.own.iter().cloned().chain([folder]).collect(),
                // They are written beside their old versions.
                make: outputs.iter().filter_map(|p| p.parent().map(Path::to_path_buf)).collect(),
                caches: cache.into_iter().collect(),
                roots: write.cloned().collect(),
            },
            None => Sandbox {
                read: read.cloned().collect(),
                write: write.chain(&self.own).cloned().collect(),
                make: Vec::new(),
                caches: Vec::new(),
                roots: Vec::new(),
            },
        })
    }

    /// Checks one path. Touches the file system.
    ///
    /// # Errors
    /// It is not allowed, or cannot be followed.
    pub fn check(&self, what: &str, path: &Path, usage: Use) -> Result<(), PathError> {
        if self.is_open() {
            return Ok(());
        }
        let followed = follow(path).map_err(|lost| lost.of(what, path))?;
        let allowed: Vec<&PathBuf> = match usage {
            Use::Read => self.config.read.iter().chain(&self.config.write).collect(),
            Use::Write => self.config.write.iter().collect(),
        };
        let below = |root: &&PathBuf| match follow(root) {
            // What is written is written beside its old version first: that has to be below the root, too.
            Ok(root) => followed.starts_with(&root) && (usage == Use::Read || followed != root),
            Err(_) => false,
        };
        if allowed.iter().any(below) {
            return Ok(());
        }
        let roots = allowed.into_iter().cloned().collect();
        Err(PathError::Outside { what: what.into(), path: path.into(), leads_to: followed, roots })
    }

    /// Checks a file name or a pattern, and every file that it matches now.
    ///
    /// # Errors
    /// As [`Roots::check`].
    pub fn check_pattern(&self, what: &str, pattern: &str) -> Result<(), PathError> {
        if self.is_open() {
            return Ok(());
        }
        if !pattern.contains(['*', '?', '[']) {
            return self.check(what, Path::new(pattern), Use::Read);
        }
        // The part before the first pattern is fixed: without it a pattern could be used to look around.
        let fixed: PathBuf = Path::new(pattern).components().take_while(|c| !has_pattern(c.as_os_str())).collect();
        self.check(what, &fixed, Use::Read)?;
        let unusable = |why: String| Lost::from(why).of(what, Path::new(pattern));
        if Path::new(pattern).components().any(|c| c == Component::ParentDir) {
            return Err(unusable("a pattern with `..` in it is not allowed where this daemon has [paths]".into()));
        }
        let options = glob::MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };
        let files = glob::glob_with(pattern, options).map_err(|e| unusable(e.to_string()))?;
        for (i, file) in files.flatten().enumerate() {
            if i == MATCHES_MAX {
                return Err(unusable(format!("it matches more than {MATCHES_MAX} files")));
            }
            self.check(what, &file, Use::Read)?;
        }
        Ok(())
    }

    /// Checks every path of a job.
    ///
    /// # Errors
    /// As [`Roots::check`]; the key of the job file is named.
    pub fn check_job(&self, spec: &JobSpec) -> Result<(), PathError> {
        let m = &spec.model;
        let read = [
            ("`model.path`", &m.path),
            ("`model.config`", &m.config),
            ("`model.weights`", &m.weights),
            ("`model.tokenizer`", &m.tokenizer),
        ];
        let write = [
            ("`data.cache`", &spec.data.cache),
            ("`checkpoint.path`", &spec.checkpoint.path),
            ("`output.path`", &spec.output.path),
            ("`output.metrics`", &spec.output.metrics),
        ];
        for (what, path) in read {
            path.as_ref().map_or(Ok(()), |p| self.check(what, p, Use::Read))?;
        }
        for (what, path) in write {
            path.as_ref().map_or(Ok(()), |p| self.check(what, p, Use::Write))?;
        }
        for (what, files) in [("`data.train`", Some(&spec.data.train)), ("`data.validation`", spec.data.validation.as_ref())] {
            for pattern in files.into_iter().flat_map(|f| f.iter()) {
                self.check_pattern(what, pattern)?;
            }
        }
        Ok(())
    }
}

fn has_pattern(part: &OsStr) -> bool {
    part.to_string_lossy().contains(['*', '?', '['])
}

/// Where an absolute path leads: links followed as far as it exists, the rest as it is.
///
/// # Errors
/// Not absolute, a link to nowhere (whose file system may be mounted yet), `..` after what does not exist, no permission to look.
pub(super) fn follow(path: &Path) -> Result<PathBuf, Lost> {
    let mut at = PathBuf::from("/");
    let mut parts = path.components();
    if parts.next() != Some(Component::RootDir) {
        return Err(String::from("is not absolute").into());
    }
    while let Some(part) = parts.next() {
        match part {
            Component::Normal(name) => {
                let next = at.join(name);
                match std::fs::canonicalize(&next) {
                    Ok(real) => at = real,
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                        if std::fs::symlink_metadata(&next).is_ok() {
                            return Err(Lost { why: format!("{} is a link that leads nowhere", next.display()), passing: true });
                        }
                        at = next;
                        for rest in parts {
                            match rest {
                                Component::Normal(name) => at.push(name),
                                Component::CurDir => {}
                                _ => return Err(format!("has `..` after {}, which does not exist", at.display()).into()),
                            }
                        }
                        return Ok(at);
                    }
                    Err(e) => return Err(Lost { why: format!("{} cannot be looked at: {e}", next.display()), passing: is_passing(&e) }),
                }
            }
            // `at` holds no link, so its parent is what the kernel takes for it.
            Component::ParentDir => drop(at.pop()),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Place {
        dir: tempfile::TempDir,
        roots: Roots,
    }

    impl Place {
        fn new() -> Place {
            let dir = tempfile::tempdir().unwrap();
            let at = |p: &str| dir.path().join(p);
            for d in ["in/sub", "out", "secret"] {
                std::fs::create_dir_all(at(d)).unwrap();
            }
            for f in ["in/a.txt", "in/sub/b.txt", "secret/s.txt"] {
                std::fs::write(at(f), "").unwrap();
            }
            let config = PathsConfig { read: vec![at("in")], write: vec![at("out")] };
            Place { roots: Roots::new(config, vec![]), dir }
        }
        fn at(&self, p: &str) -> PathBuf {
            self.dir.path().join(p)
        }
        fn read(&self, p: &str) -> bool {
            self.roots.check("x", &self.at(p), Use::Read).is_ok()
        }
        fn write(&self, p: &str) -> bool {
            self.roots.check("x", &self.at(p), Use::Write).is_ok()
        }
    }

    #[test]
    fn only_what_lies_below_a_root_is_read_or_written() {
        let p = Place::new();
        assert!(p.read("in/a.txt") && p.read("in") && p.read("in/sub/../a.txt") && p.read("in/not/there"));
        assert!(p.read("out/x") && p.write("out/x/y/z"), "what may be written may be read");
        assert!(!p.read("secret/s.txt") && !p.read("in/../secret/s.txt") && !p.read("inside") && !p.read("in/nothing/../../secret"));
        assert!(!p.write("in/a.txt") && !p.write("out") && !p.write("out/../in/x"));
        assert!(p.roots.check("x", Path::new("in/a.txt"), Use::Read).is_err(), "relative");
        let text = p.roots.check("`output.path`", &p.at("in/x"), Use::Write).unwrap_err().to_string();
        assert!(text.contains("`output.path`") && text.contains("in/x") && text.contains(p.at("out").to_str().unwrap()), "{text}");
    }

    #[test]
    fn links_are_followed_before_anything_is_decided() {
        let p = Place::new();
        symlink(p.at("secret"), p.at("in/link")).unwrap();
        symlink("../../secret/s.txt", p.at("in/sub/file")).unwrap();
        symlink(p.at("secret/new"), p.at("out/dangling")).unwrap();
        symlink(p.at("in/sub"), p.at("out/back")).unwrap();
        symlink(p.at("in"), p.at("also-in")).unwrap();
        assert!(!p.read("in/link/s.txt") && !p.read("in/sub/file") && !p.read("in/link"));
        assert!(!p.write("out/dangling") && !p.write("out/dangling/x") && !p.write("out/back/b.txt"));
        assert!(p.read("also-in/a.txt"), "a way in through a link is as good");
        // `..` is taken from where a link leads, not from its name.
        assert!(!p.read("in/link/../in/../secret/s.txt"));
        assert!(p.read("in/link/../in/a.txt"));
        let text = p.roots.check("x", &p.at("in/link"), Use::Read).unwrap_err().to_string();
        assert!(text.contains(p.at("secret").to_str().unwrap()), "{text}");
    }

    #[test]
    fn a_root_may_be_a_link_or_be_made_later() {
        let p = Place::new();
        symlink(p.at("secret"), p.at("root")).unwrap();
        let roots = Roots::new(PathsConfig { read: vec![p.at("root"), p.at("later")], write: vec![] }, vec![]);
        assert!(roots.check("x", &p.at("secret/s.txt"), Use::Read).is_ok());
        assert!(roots.check("x", &p.at("later/f"), Use::Read).is_ok());
        let text = roots.check("x", &p.at("later/f"), Use::Write).unwrap_err().to_string();
        assert!(text.contains("no [paths] write"), "{text}");
    }

    #[test]
    fn patterns_are_checked_with_all_that_they_match() {
        let p = Place::new();
        let pattern = |s: &str| p.roots.check_pattern("`data.train`", &format!("{}/{s}", p.dir.path().display()));
        assert!(pattern("in/*.txt").is_ok() && pattern("in/**/*.txt").is_ok() && pattern("in/none*").is_ok());
        assert!(pattern("secret/*.txt").is_err() && pattern("*/a.txt").is_err() && pattern("in/*/../../secret/*").is_err());
        symlink(p.at("secret/s.txt"), p.at("in/zz.txt")).unwrap();
        let text = pattern("in/*.txt").unwrap_err().to_string();
        assert!(text.contains("zz.txt") && text.contains("`data.train`"), "{text}");
    }

    #[test]
    fn without_roots_everything_is_allowed() {
        let roots = Roots::default();
        assert!(roots.is_open() && roots.check("x", Path::new("/etc/shadow"), Use::Write).is_ok());
    }

    #[test]
    fn a_jobs_paths_are_all_looked_at() {
        let p = Place::new();
        let job = |more: &str| {
            let text = format!(
                "name = \"a\"\n[model]\npath = \"in\"\n[data]\nformat = \"text\"\ntrain = \"in/a.txt\"\n{more}\n[train]\nsteps = 3\nbatch_size = 2\n"
            );
            let spec = JobSpec::parse(&text, p.dir.path(), "j").unwrap();
            p.roots.check_job(&spec).map_err(|e| e.to_string())
        };
        assert_eq!(job(""), Ok(()));
        assert!(job("validation = \"secret/s.txt\"").unwrap_err().contains("data.validation"));
        assert!(job("cache = \"in/cache\"").unwrap_err().contains("data.cache"));
        assert!(job("[checkpoint]\npath = \"secret/c\"").unwrap_err().contains("checkpoint.path"));
        assert!(job("[output]\npath = \"in/o\"").unwrap_err().contains("output.path"));
        assert!(job("[output]\nmetrics = \"/etc/m\"").unwrap_err().contains("output.metrics"));
        assert_eq!(job("[output]\npath = \"out/o\"\nmetrics = \"out/m.jsonl\"\n[checkpoint]\npath = \"out/c\""), Ok(()));
    }

    proptest::proptest! {
        /// Whatever is made of `..`, names and links: what is allowed is, for the kernel, below the root.
        #[test]
        fn no_way_leads_out(parts in proptest::collection::vec(proptest::sample::select(vec!["..", ".", "in", "sub", "link", "up", "secret", "a.txt", "s.txt"]), 0..10)) {
            let p = Place::new();
            symlink(p.at("secret"), p.at("in/link")).unwrap();
            symlink("..", p.at("in/sub/up")).unwrap();
            let path = p.at(&format!("in/{}", parts.join("/")));
            if p.roots.check("x", &path, Use::Read).is_ok() {
                if let Ok(real) = std::fs::canonicalize(&path) {
                    let root = std::fs::canonicalize(p.at("in")).unwrap();
                    let out = std::fs::canonicalize(p.at("out")).unwrap();
                    proptest::prop_assert!(real.starts_with(&root) || real.starts_with(&out), "{path:?} is {real:?}");
                }
            }
        }
    }
}
