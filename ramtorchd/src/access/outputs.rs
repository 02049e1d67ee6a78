//! Whose the files are that a job would write over.
//!
//! All jobs run as the daemon's user, to whom whatever a job has made is writable. So before a job or an export is taken in,
//! the daemon asks of what is there already what the kernel would have asked its submitter:
//!
//! ```text
//!  owned by the caller, or its mode lets one of his groups or everybody write ──► his to write
//!  owned by the daemon, and a job of his made it (the ledger) ──────────────────► his to write
//!  anything else ───────────────────────────────────────────────────────────────► refused
//! ```
//! Something new may be made anywhere below the roots, except in what a job of another user made. Outputs of jobs that have
//! not ended are looked after by the state task (`supervisor::calls`), there or not.
//!
//! The ledger is a file of the state folder: a line for each output that a user's job was allowed to make. What is lost of it
//! is nobody's, and so no user's to write over.

use super::paths::{Lost, PathError, follow, is_passing};
use nix::unistd::{Gid, Uid, User};
use ramtorch_job::JobSpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::{CString, OsString};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Outputs that are remembered; the oldest are forgotten beyond.
const CLAIMS_MAX: usize = 100_000;
/// Lines of the ledger beyond those that say something new; it is written anew then, when a daemon starts.
const STALE_LINES_MAX: usize = 1000;
/// What the export of a model folder makes, and removes, beside it.
const BESIDE: [&str; 2] = [".partial", ".replaced"];

/// Somebody who would write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Writer {
    /// User id.
    pub uid: u32,
    /// All his groups.
    pub groups: Vec<u32>,
}

impl Writer {
    /// A user, with the groups of the user database and that of the process which calls. Touches the user database.
    pub fn look_up(uid: u32, process_gid: Option<u32>) -> Writer {
        let mut groups: Vec<u32> = process_gid.into_iter().collect();
        if let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) {
            let listed = CString::new(user.name).ok().and_then(|name| nix::unistd::getgrouplist(&name, user.gid).ok());
            groups.extend(listed.unwrap_or_else(|| vec![user.gid]).into_iter().map(Gid::as_raw));
        }
        Writer { uid, groups }
    }
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Permissions.
    pub mode: u32,
    /// Whether it is a folder.
    pub folder: bool,
}

impl Found {
    fn look(path: &Path) -> std::io::Result<Option<Found>> {
        match std::fs::symlink_metadata(path) {
            Ok(m) => Ok(Some(Found { uid: m.uid(), gid: m.gid(), mode: m.mode() & 0o7777, folder: m.is_dir() })),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Whether what is there is the writer's to write over. `own_uid` is the daemon's user, `maker` the user whose job made it.
pub fn may_write(found: &Found, who: &Writer, own_uid: u32, maker: Option<u32>) -> bool {
    // In a folder with the sticky bit, what others made stays theirs.
    let shared = !(found.folder && found.mode & 0o1000 != 0);
    let by_mode = found.mode & 0o002 != 0 || found.mode & 0o020 != 0 && who.groups.contains(&found.gid);
    found.uid == who.uid || shared && by_mode || found.uid == own_uid && maker == Some(who.uid)
}

/// An output that is not the caller's to write.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutputError {
    /// It cannot be followed.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Somebody else's.
    #[error(
        "{what} {}: {} is there already, belongs to {owner}, and is not writable for user {uid}; choose another path, or ask its owner or an administrator ([access] admins)",
        .path.display(), .at.display()
    )]
    NotYours {
        /// Its role, as a key of the job file.
        what: String,
        /// As given.
        path: PathBuf,
        /// What is there.
        at: PathBuf,
        /// In words.
        owner: String,
        /// Who wanted to write.
        uid: u32,
    },
}

/// Something that a job or a call writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its role, as a key of the job file.
    pub what: &'static str,
    /// As given.
    pub path: PathBuf,
    /// Whether it is a model folder, which is made beside its old version and takes its place.
    pub model: bool,
}

/// What a job writes for its user. The token cache is not among it: its files are named by their content.
pub fn of_job(spec: &JobSpec) -> Vec<Output> {
    let all = [
        ("`checkpoint.path`", &spec.checkpoint.path, false),
        ("`output.path`", &spec.output.path, true),
        ("`output.metrics`", &spec.output.metrics, false),
    ];
    all.into_iter().filter_map(|(what, path, model)| path.clone().map(|path| Output { what, path, model })).collect()
}

/// The model folder of an export.
pub fn of_export(path: PathBuf) -> Vec<Output> {
    vec![Output { what: "the model folder", path, model: true }]
}

impl Output {
    /// Where it is, links followed. Touches the file system. None: a pipe or a device, which has no content to lose.
    fn place(&self) -> Result<Option<PathBuf>, PathError> {
        let at = follow(&self.path).map_err(|lost| lost.of(self.what, &self.path))?;
        if at.to_str().is_none() {
            return Err(Lost::from(format!("leads to {}, which is not UTF-8", at.display())).of(self.what, &self.path));
        }
        let special = |kind: std::fs::FileType| kind.is_char_device() || kind.is_block_device() || kind.is_fifo() || kind.is_socket();
        Ok(Some(at).filter(|at| !std::fs::symlink_metadata(at).is_ok_and(|m| special(m.file_type()))))
    }
}

/// Outputs at their places, links followed. One that cannot be followed is at the path as given, which the job itself will stumble over;
/// devices and pipes are left out. Touches the file system.
pub fn placed(outputs: &[Output]) -> Vec<Output> {
    let place = |o: &Output| o.place().unwrap_or_else(|_| Some(o.path.clone()));
    outputs.iter().filter_map(|o| Some(Output { path: place(o)?, ..o.clone() })).collect()
}

/// Where outputs are: what no other job may write to meanwhile. Touches the file system.
pub fn places(outputs: &[Output]) -> Vec<PathBuf> {
    placed(outputs).into_iter().map(|o| o.path).collect()
}

/// Why a job must not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Moved {
    /// It leads elsewhere than when the job was submitted.
    #[error(
        "{what} {}: it leads to {} now, and not to where it did when the job was submitted ({}). Nothing was written there. Somebody has put a link \
         or another file in its way: remove that, or submit the job again",
        .path.display(), .now.display(), list(.then)
    )]
    Elsewhere {
        /// Its role, as a key of the job file.
        what: &'static str,
        /// As given.
        path: PathBuf,
        /// Where it leads.
        now: PathBuf,
        /// Where the job's outputs were.
        then: Vec<PathBuf>,
    },
    /// It cannot be followed any more.
    #[error("{0}; it could be followed when the job was submitted, and nothing is written there")]
    Lost(#[from] PathError),
}

impl Moved {
    /// Whether it may be where it was in a while, by itself: a file server does not answer, or a file system that a link leads to, or that
    /// holds one, is not mounted yet. Where somebody has put a link in the way, it leads into a folder. Touches the file system.
    pub fn is_passing(&self) -> bool {
        match self {
            Moved::Lost(e) => e.is_passing(),
            Moved::Elsewhere { now, .. } => {
                let missing = |folder: &Path| std::fs::metadata(folder).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound);
                now.is_absolute() && now.parent().is_some_and(missing)
            }
        }
    }
}

fn list(places: &[PathBuf]) -> String {
    places.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Makes the outputs of a job that is about to start those that it was submitted with: where they were found then (`places`; none for
/// jobs of a version that did not note them) they have to be now. From here on the job writes there, whatever links come later. To be
/// asked in the job's worker: a file system that hangs must not stop the daemon. Touches the file system.
///
/// # Errors
/// One leads elsewhere by now.
pub fn settle(spec: &mut JobSpec, places: Option<&[PathBuf]>) -> Result<(), Moved> {
    let mut now = Vec::new();
    for output in of_job(spec) {
        let place = match output.place() {
            Ok(place) => place,
            // The job itself will stumble over it.
            Err(_) if places.is_none() => Some(output.path.clone()),
            Err(e) => return Err(e.into()),
        };
        now.push((output, place));
    }
    if let Some(then) = places {
        // Devices are not among them: a file that has become one makes lists that differ, too.
        if !now.iter().filter_map(|(_, place)| place.as_ref()).eq(then) {
            let moved = now.iter().find(|(_, place)| place.as_ref().is_some_and(|p| !then.contains(p)));
            let moved = moved.or_else(|| now.iter().find(|(_, place)| place.is_none())).or(now.first());
            let (what, path, now) = match moved {
                Some((output, place)) => (output.what, output.path.clone(), place.clone().unwrap_or_else(|| "a device or a pipe".into())),
                None => ("its outputs", PathBuf::new(), PathBuf::new()),
            };
            return Err(Moved::Elsewhere { what, path, now, then: then.to_vec() });
        }
    }
    let (c, o) = (&mut spec.checkpoint, &mut spec.output);
    for (output, place) in now {
        for path in [&mut c.path, &mut o.path, &mut o.metrics] {
            if path.as_ref() == Some(&output.path) {
                *path = Some(place.clone().unwrap_or_else(|| output.path.clone()));
            }
        }
    }
    Ok(())
}

/// A line of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    path: PathBuf,
    uid: u32,
    unix_ms: i64,
}

/// Which user's job made what.
#[derive(Debug)]
pub struct Ledger {
    file: PathBuf,
    own_uid: u32,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    claims: BTreeMap<PathBuf, (u32, i64)>,
    /// The last line may not be whole.
    torn: bool,
}

impl Inner {
    fn note(&mut self, claim: Claim) {
        let newer = self.claims.get(&claim.path).is_none_or(|(_, at)| *at <= claim.unix_ms);
        if newer {
            self.claims.insert(claim.path, (claim.uid, claim.unix_ms));
        }
    }

    /// Whose job made this, or the folder above it that was asked for; of a folder that was made on the way to outputs, whose
    /// these are, if they are one user's.
    fn maker(&self, at: &Path) -> Option<u32> {
        if let Some((uid, _)) = at.ancestors().find_map(|p| self.claims.get(p)) {
            return Some(*uid);
        }
        let mut below = self.claims.range(at.to_path_buf()..).take_while(|(p, _)| p.starts_with(at)).map(|(_, (uid, _))| *uid);
        let first = below.next()?;
        below.all(|uid| uid == first).then_some(first)
    }

    fn bound(&mut self, most: usize) {
        let excess = self.claims.len().saturating_sub(most);
        if excess > 0 {
            let mut by_age: Vec<(i64, PathBuf)> = self.claims.iter().map(|(p, (_, at))| (*at, p.clone())).collect();
            by_age.sort();
            for (_, path) in by_age.into_iter().take(excess) {
                self.claims.remove(&path);
            }
        }
    }
}

impl Ledger {
    /// Reads the ledger, and what the kept jobs say: outputs, user and time of each. Lines that make no sense are left out.
    pub fn open<'a>(file: PathBuf, jobs: impl Iterator<Item = (&'a [PathBuf], u32, i64)>) -> Ledger {
        let mut inner = Inner::default();
        let text = match std::fs::read(&file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => {
                tracing::error!("{}: {e}; what jobs of forgotten records made is nobody's until it can be read", file.display());
                String::new()
            }
        };
        inner.torn = !text.is_empty() && !text.ends_with('\n');
        let mut lines = 0;
        for claim in text.lines().filter(|l| !l.is_empty()).inspect(|_| lines += 1).flat_map(serde_json::from_str::<Claim>) {
            inner.note(claim);
        }
        let own_uid = nix::unistd::geteuid().as_raw();
        for (outputs, uid, unix_ms) in jobs {
            let anybody = uid != 0 && uid != own_uid;
            for path in outputs.iter().filter(|p| anybody || inner.maker(p).is_some()).cloned().collect::<Vec<_>>() {
                inner.note(Claim { path, uid, unix_ms });
            }
        }
        inner.bound(CLAIMS_MAX);
        let ledger = Ledger { file, own_uid, inner: Mutex::new(inner) };
        if lines > ledger.lock().claims.len() + STALE_LINES_MAX {
            ledger.rewrite();
        }
        ledger
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rewrite(&self) {
        let mut inner = self.lock();
        let mut text = Vec::new();
        for (path, (uid, unix_ms)) in &inner.claims {
            let claim = Claim { path: path.clone(), uid: *uid, unix_ms: *unix_ms };
            text.extend(serde_json::to_vec(&claim).unwrap_or_default());
            text.push(b'\n');
        }
        match crate::disk::replace(&self.file, &text) {
            Ok(()) => inner.torn = false,
            Err(e) => tracing::warn!("{} was not written anew: {e}", self.file.display()),
        }
    }

    /// Whether all of these are the writer's to write. Touches the file system.
    ///
    /// # Errors
    /// The first that is not, or cannot be followed.
    pub fn check(&self, outputs: &[Output], who: &Writer) -> Result<(), OutputError> {
        outputs.iter().try_for_each(|output| self.check_one(output, who))
    }

    fn check_one(&self, output: &Output, who: &Writer) -> Result<(), OutputError> {
        let cannot = |at: &Path, e: std::io::Error| PathError::Unusable {
            what: output.what.into(),
            path: output.path.clone(),
            why: format!("{} cannot be looked at: {e}", at.display()),
            passing: is_passing(&e),
        };
        // A device or a pipe is judged by its own mode.
        let at = match output.place()? {
            Some(at) => at,
            None => follow(&output.path).map_err(|lost| lost.of(output.what, &output.path))?,
        };
        let refuse = |at: &Path, found: &Found, maker: Option<u32>| {
            let owner = match maker {
                _ if found.uid != self.own_uid => format!("user {}", found.uid),
                Some(uid) => format!("user {uid}, whose job made it"),
                None => "the daemon's user, who knows of no job of yours that made it".into(),
            };
            let (what, path) = (output.what.into(), output.path.clone());
            Err(OutputError::NotYours { what, path, at: at.into(), owner, uid: who.uid })
        };
        let beside = BESIDE.iter().filter(|_| output.model).filter_map(|suffix| {
            let mut name: OsString = at.file_name()?.into();
            name.push(suffix);
            Some(at.with_file_name(name))
        });
        for place in std::iter::once(at.clone()).chain(beside) {
            let Some(found) = Found::look(&place).map_err(|e| cannot(&place, e))? else { continue };
            let maker = {
                let inner = self.lock();
                // What an export that died left beside its folder is whose that folder is.
                if inner.claims.contains_key(&place) { inner.maker(&place) } else { inner.maker(&at) }
            };
            if !may_write(&found, who, self.own_uid, maker) {
                return refuse(&place, &found, maker);
            }
        }
        // Something new in what a job of another user made is a change of that.
        let there = |p: &&Path| std::fs::symlink_metadata(p).is_ok();
        let Some(above) = at.ancestors().find(there).filter(|above| *above != at) else { return Ok(()) };
        let maker = above.ancestors().find_map(|p| self.lock().claims.get(p).map(|(uid, _)| *uid));
        match Found::look(above).map_err(|e| cannot(above, e))? {
            Some(found) if maker.is_some_and(|uid| uid != who.uid) && !may_write(&found, who, self.own_uid, maker) => {
                refuse(above, &found, maker)
            }
            _ => Ok(()),
        }
    }

    /// Notes that these are made by a job of user `uid`. Of an administrator only what was another user's is noted: what
    /// nobody is noted for is no other user's in any case. Touches the disk; a line that cannot be written is told in the log.
    pub fn claim(&self, places: &[PathBuf], uid: u32, admin: bool, unix_ms: i64) {
        let mut inner = self.lock();
        let mut text = String::new();
        for path in places {
            let maker = inner.maker(path);
            if (admin && maker.is_none()) || inner.claims.get(path).is_some_and(|(of, _)| *of == uid) {
                continue;
            }
            let claim = Claim { path: path.clone(), uid, unix_ms };
            text.extend(serde_json::to_string(&claim).map(|line| line + "\n"));
            inner.note(claim);
        }
        inner.bound(CLAIMS_MAX);
        if text.is_empty() {
            return;
        }
        if inner.torn {
            text.insert(0, '\n');
        }
        let open = OpenOptions::new().create(true).append(true).mode(0o640).open(&self.file);
        let written = open.and_then(|mut file| file.write_all(text.as_bytes()));
        inner.torn = written.is_err();
        if let Err(e) = written {
            tracing::warn!("cannot note in {} whose outputs these are: {e}", self.file.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const DAEMON: u32 = 900;
    const ALICE: u32 = 1001;
    const BOB: u32 = 1002;

    fn who(uid: u32, groups: &[u32]) -> Writer {
        Writer { uid, groups: groups.to_vec() }
    }

    #[test]
    fn what_is_there_is_judged_as_the_kernel_would_for_the_caller() {
        let file = |uid, gid, mode| Found { uid, gid, mode, folder: false };
        let may = |found: Found, maker| may_write(&found, &who(BOB, &[20, 30]), DAEMON, maker);
        assert!(may(file(BOB, 1, 0o600), None), "his own");
        assert!(may(file(BOB, 1, 0o600), Some(ALICE)), "his own, whoever's job wrote it");
        assert!(!may(file(ALICE, 1, 0o644), None) && !may(file(0, 0, 0o644), None));
        assert!(may(file(ALICE, 1, 0o646), None), "everybody's");
        assert!(may(file(ALICE, 30, 0o664), None) && !may(file(ALICE, 40, 0o664), None) && !may(file(ALICE, 30, 0o644), None));
        assert!(may(file(DAEMON, 1, 0o640), Some(BOB)), "a job of his made it");
        assert!(!may(file(DAEMON, 1, 0o640), Some(ALICE)) && !may(file(DAEMON, 1, 0o640), None));
        assert!(!may(file(ALICE, 1, 0o640), Some(BOB)), "it is somebody else's by now");
        // What others made in such a folder is not his, although he may add to it.
        assert!(!may(Found { folder: true, ..file(0, 0, 0o1777) }, None) && may(file(0, 0, 0o1777), None));
        assert!(may(Found { folder: true, ..file(BOB, 1, 0o1755) }, None) && may(Found { folder: true, ..file(ALICE, 20, 0o2775) }, None));
    }

    fn ledger(dir: &Path) -> Ledger {
        Ledger::open(dir.join("outputs.jsonl"), std::iter::empty())
    }

    fn file(path: &str) -> Output {
        Output { what: "`output.metrics`", path: path.into(), model: false }
    }

    #[test]
    fn a_maker_is_known_by_the_path_by_what_is_above_and_by_what_is_below() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = ledger(dir.path());
        let claim = |path: &str, uid| ledger.claim(&[path.into()], uid, false, 5);
        claim("/r/a/run/checkpoints", ALICE);
        claim("/r/a/run/metrics", ALICE);
        claim("/r/a/run/checkpoints/odd", BOB);
        claim("/r/both/x", ALICE);
        claim("/r/both/y", BOB);
        let maker = |path: &str| ledger.lock().maker(Path::new(path));
        assert_eq!(maker("/r/a/run/checkpoints/step-1/shard"), Some(ALICE));
        assert_eq!(maker("/r/a/run/checkpoints/odd/x"), Some(BOB));
        assert_eq!((maker("/r/a/run/metrics"), maker("/r/a/run/metrics2")), (Some(ALICE), None));
        assert_eq!((maker("/r/both"), maker("/r"), maker("/q")), (None, None, None));
        claim("/s/a/run/metrics", ALICE);
        assert_eq!((maker("/s/a/run"), maker("/s")), (Some(ALICE), Some(ALICE)), "made on the way there");
    }

    #[test]
    fn the_ledger_outlives_the_daemon_and_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outputs.jsonl");
        let maker = |l: &Ledger, path: &str| l.lock().maker(Path::new(path));
        let one = ledger(dir.path());
        one.claim(&["/a".into(), "/b".into()], ALICE, false, 5);
        one.claim(&["/a".into()], ALICE, false, 6);
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2, "nothing new, nothing written");
        std::fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"path\":\"/c\",\"ui").unwrap();
        let two = ledger(dir.path());
        two.claim(&["/b".into()], BOB, false, 7);
        // An administrator's job takes from others what it writes, and is not noted otherwise.
        two.claim(&["/a".into(), "/d".into()], 0, true, 8);
        let three = ledger(dir.path());
        assert_eq!(["/a", "/b", "/c", "/d"].map(|p| maker(&three, p)), [Some(0), Some(BOB), None, None]);
        // What jobs' records say counts where it is newer.
        let (b, d) = ([PathBuf::from("/b")], [PathBuf::from("/d")]);
        let jobs = [(&b[..], ALICE, 6), (&d[..], ALICE, 3), (&d[..], 0, 4)];
        let four = Ledger::open(path, jobs.into_iter());
        assert_eq!(["/b", "/d"].map(|p| maker(&four, p)), [Some(BOB), Some(0)]);
    }

    #[test]
    fn the_ledger_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("outputs.jsonl");
        let line = |i: i64| serde_json::to_string(&Claim { path: "/a".into(), uid: i as u32, unix_ms: i }).unwrap() + "\n";
        std::fs::write(&path, (0..STALE_LINES_MAX as i64 + 9).map(line).collect::<String>()).unwrap();
        assert_eq!(ledger(dir.path()).lock().maker(Path::new("/a")), Some(STALE_LINES_MAX as u32 + 8));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
        let mut inner = Inner::default();
        (0..9).for_each(|i| inner.note(Claim { path: format!("/{i}").into(), uid: 1, unix_ms: -i }));
        inner.bound(3);
        assert_eq!(inner.claims.keys().map(|p| p.to_str().unwrap()).collect::<Vec<_>>(), ["/0", "/1", "/2"]);
    }

    #[test]
    fn what_another_users_job_made_is_refused_with_what_is_in_it_and_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |p: &str| dir.path().join(p);
        for d in ["ck/step-1", "model", "model.partial", "free"] {
            std::fs::create_dir_all(at(d)).unwrap();
        }
        std::fs::write(at("metrics"), "").unwrap();
        for p in ["ck", "model", "model.partial", "free", "metrics"] {
            std::fs::set_permissions(at(p), std::fs::Permissions::from_mode(0o750)).unwrap();
        }
        let ledger = ledger(dir.path());
        let claims: Vec<PathBuf> = ["ck", "model", "metrics"].map(at).into();
        ledger.claim(&claims, ALICE, false, 5);
        let check = |p: &str, model, uid| {
            let output = Output { what: "`output.path`", path: at(p), model };
            ledger.check(&[output], &who(uid, &[])).map_err(|e| e.to_string())
        };
        for p in ["ck", "ck/step-1", "ck/step-2", "ck/new/x", "model", "metrics"] {
            assert_eq!(check(p, false, ALICE), Ok(()), "{p}");
            let text = check(p, false, BOB).unwrap_err();
            assert!(text.contains("`output.path`") && text.contains(&format!("user {ALICE}, whose job made it")), "{p}: {text}");
        }
        assert_eq!(check("new", false, BOB), Ok(()));
        assert_eq!(check("model", true, ALICE), Ok(()), "what her own export left beside it is hers");
        assert!(check("free", false, BOB).unwrap_err().contains("no job of yours"));
        // What an export would remove beside its folder.
        std::fs::create_dir(at("other.partial")).unwrap();
        assert!(check("other", true, BOB).unwrap_err().contains("other.partial"));
        assert_eq!(check("other", false, BOB), Ok(()));
        std::os::unix::fs::symlink(at("metrics"), at("link")).unwrap();
        assert!(check("link", false, BOB).is_err());
        std::os::unix::fs::symlink(at("nowhere"), at("dangling")).unwrap();
        assert!(check("dangling", false, BOB).unwrap_err().contains("leads nowhere"));
        assert_eq!(ledger.check(&[file("/dev/null")], &who(BOB, &[])), Ok(()));
    }

    #[test]
    fn a_link_that_came_after_submission_stops_the_job() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let at = |p: &str| root.join(p);
        for d in ["mine", "theirs/ck"] {
            std::fs::create_dir_all(at(d)).unwrap();
        }
        std::fs::write(at("theirs/m.jsonl"), "theirs").unwrap();
        std::os::unix::fs::symlink(at("mine"), at("way")).unwrap();
        let text = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"text\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n\
                    [checkpoint]\npath = \"way/ck\"\n[output]\npath = \"mine/model\"\nmetrics = \"mine/new/m.jsonl\"\n";
        let spec = JobSpec::parse(text, &root, "j").unwrap();
        let then = places(&of_job(&spec));
        assert_eq!(then, [at("mine/ck"), at("mine/model"), at("mine/new/m.jsonl")]);
        let settled = || {
            let mut spec = spec.clone();
            settle(&mut spec, Some(&then)).map(|()| spec)
        };
        let made = settled().unwrap();
        assert_eq!(places(&of_job(&made)), then);
        assert_eq!(made.checkpoint.path, Some(at("mine/ck")), "no link is followed again");
        // What the job itself makes changes nothing.
        std::fs::create_dir_all(at("mine/ck/step-1")).unwrap();
        std::fs::create_dir(at("mine/new")).unwrap();
        std::fs::write(at("mine/new/m.jsonl"), "").unwrap();
        assert_eq!(settled(), Ok(made.clone()));
        // The leaf, its folder, a folder of a link that was there, and a device.
        let swap = |path: &str, target: PathBuf| {
            std::fs::rename(at(path), at("aside")).unwrap();
            std::os::unix::fs::symlink(target, at(path)).unwrap();
            let e = settled().unwrap_err();
            std::fs::remove_file(at(path)).unwrap();
            std::fs::rename(at("aside"), at(path)).unwrap();
            assert!(settled().is_ok());
            e.to_string()
        };
        let e = swap("mine/new/m.jsonl", at("theirs/m.jsonl"));
        assert!(e.contains("`output.metrics`") && e.contains("theirs/m.jsonl") && e.contains("submit"), "{e}");
        assert!(swap("mine/new", at("theirs")).contains("theirs/m.jsonl"));
        assert!(swap("mine", at("theirs")).contains("`checkpoint.path`"));
        assert!(swap("mine/ck", at("theirs/ck")).contains("theirs/ck"));
        assert!(swap("mine/new/m.jsonl", "/dev/null".into()).contains("`output.metrics`"));
        assert!(swap("mine/ck", at("nowhere")).contains("leads nowhere"));
        // What may be there again by itself: a link whose file system is not mounted, and what a link on such a one led to.
        std::fs::rename(at("mine"), at("unmounted")).unwrap();
        let e = settled().unwrap_err();
        assert!(e.is_passing() && matches!(e, Moved::Lost(_)), "{e}");
        std::fs::rename(at("unmounted"), at("mine")).unwrap();
        let moved = |now: PathBuf| Moved::Elsewhere { what: "x", path: at("way"), now, then: vec![at("mine")] };
        assert!(
            moved(at("nowhere/ck")).is_passing()
                && !moved(at("theirs/new")).is_passing()
                && !moved("a device or a pipe".into()).is_passing()
        );
        // Of a version that noted none.
        let mut old = spec.clone();
        assert_eq!((settle(&mut old, None), old), (Ok(()), made));
    }

    #[test]
    fn devices_are_nobodys_output() {
        assert_eq!(places(&[file("/dev/null"), file("/nowhere/x")]), [PathBuf::from("/nowhere/x")]);
    }
}
