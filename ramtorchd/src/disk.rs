//! The thread that writes jobs to disk, so that a slow disk never holds up the state task.
//!
//! What waits to be written is merged: of a record only its newest state. So the memory that waiting takes is bounded,
//! however slow the disk. Records of many jobs are made durable together: the file
//! system's journal is then committed for all of them at once, which is most of what durability costs. They are gathered
//! for a moment, unless somebody waits for one of them.

use crate::supervisor::record::Record;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use ramtorch_failpoint::{Point, check, hit};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// After something was written, what comes is gathered for so long.
const GATHER: Duration = Duration::from_millis(20);
/// Records that could not be written are tried again after so long: a disk that was full may have room.
const AGAIN: Duration = Duration::from_secs(2);
/// Records that are written together: as many files are open at once.
const TOGETHER: usize = 64;

#[derive(Default)]
struct Pending {
    records: BTreeMap<String, Vec<u8>>,
    deletions: Vec<String>,
    tidies: HashMap<String, u64>,
    files: Vec<PathBuf>,
    /// Other files that are replaced.
    wholes: BTreeMap<PathBuf, Vec<u8>>,
    /// Jobs whose records are being written.
    writing: HashSet<String>,
    /// Newest records that could not be written, and why: they are tried again.
    failed: HashMap<String, (Vec<u8>, String)>,
    /// Threads that wait for a record or for everything.
    waiting: usize,
    busy: bool,
    closed: bool,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.records.is_empty() && self.deletions.is_empty() && self.tidies.is_empty() && self.files.is_empty() && self.wholes.is_empty()
    }

    /// Puts those records back that could not be written, unless there are newer ones.
    fn again(&mut self) {
        for (id, (bytes, _)) in &self.failed {
            self.records.entry(id.clone()).or_insert_with(|| bytes.clone());
        }
    }
}

struct Shared {
    pending: Mutex<Pending>,
    changed: Condvar,
    jobs: PathBuf,
}

/// Handle of the thread. Dropping it writes what waits, and ends it.
pub struct Disk {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Disk {
    /// Starts the thread; `jobs` is the folder of all jobs.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn start(jobs: PathBuf) -> std::io::Result<Disk> {
        let shared = Arc::new(Shared { pending: Mutex::default(), changed: Condvar::new(), jobs });
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("disk".into()).spawn(move || work(&of_thread))?;
        Ok(Disk { shared, thread: Some(thread) })
    }

    /// Writes a record, soon.
    pub fn save(&self, record: &Record) {
        match serde_json::to_vec(record) {
            Ok(bytes) => self.change(|p| {
                p.records.insert(record.id.clone(), bytes);
            }),
            Err(e) => tracing::error!(job = record.id, "the job's record cannot be encoded: {e}"),
        }
    }

    /// Removes a job's folder, soon.
    pub fn delete(&self, id: &str) {
        self.change(|p| {
            p.records.remove(id);
            p.failed.remove(id);
            p.deletions.push(id.to_string());
        });
    }

    /// Removes the logs of generations before `oldest`, soon.
    pub fn tidy(&self, id: &str, oldest: u64) {
        self.change(|p| {
            p.tidies.insert(id.to_string(), oldest);
        });
    }

    /// Removes a file, soon.
    pub fn remove_file(&self, path: PathBuf) {
        self.change(|p| p.files.push(path));
    }

    /// Replaces a file, soon.
    pub fn replace_file(&self, path: PathBuf, bytes: Vec<u8>) {
        self.change(|p| {
            p.wholes.insert(path, bytes);
        });
    }

    /// Waits until everything is written, at most `limit`.
    pub fn flush(&self, limit: Duration) -> bool {
        self.shared.settled(limit, |p| p.busy || !p.is_empty())
    }

    /// For a thread that has to wait until a job's record is on the disk.
    pub fn witness(&self) -> Witness {
        Witness(self.shared.clone())
    }

    fn change(&self, f: impl FnOnce(&mut Pending)) {
        f(&mut lock(&self.shared));
        self.shared.changed.notify_all();
    }
}

/// Sees when what was saved is on the disk.
#[derive(Clone)]
pub struct Witness(Arc<Shared>);

impl Witness {
    /// Waits until what was saved of a job before this call is durable, at most `limit`.
    ///
    /// # Errors
    /// It is not: why.
    pub fn durable(&self, id: &str, limit: Duration) -> Result<(), String> {
        let path = self.0.jobs.join(id).join("job.json");
        if !self.0.settled(limit, |p| p.records.contains_key(id) || p.writing.contains(id)) {
            return Err(format!("{} was not written within {:.0} s", path.display(), limit.as_secs_f64()));
        }
        match lock(&self.0).failed.get(id) {
            Some((_, why)) => Err(format!("{} cannot be written: {why}", path.display())),
            None => Ok(()),
        }
    }
}

impl Shared {
    /// Waits until `owes` says no, at most `limit`.
    fn settled(&self, limit: Duration, owes: impl Fn(&Pending) -> bool) -> bool {
        let until = Instant::now() + limit;
        let mut pending = lock(self);
        pending.waiting += 1;
        self.changed.notify_all();
        let settled = loop {
            if !owes(&pending) {
                break true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            pending = self.changed.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        pending.waiting -= 1;
        settled
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.change(|p| p.closed = true);
        // A disk that hangs must not hold up the end of the daemon: the thread is joined only when it is done.
        if self.flush(Duration::from_secs(5)) {
            if let Some(thread) = self.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

fn lock(shared: &Shared) -> MutexGuard<'_, Pending> {
    shared.pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(shared: &Shared) {
    let mut last: Option<Instant> = None;
    loop {
        let todo = {
            let mut pending = lock(shared);
            pending.busy = false;
            pending.writing.clear();
            shared.changed.notify_all();
            while pending.is_empty() {
                if pending.closed {
                    return;
                }
                if pending.failed.is_empty() {
                    pending = shared.changed.wait(pending).unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                let left = last.map_or(AGAIN, |last| (last + AGAIN).saturating_duration_since(Instant::now()));
                if left.is_zero() {
                    pending.again();
                    break;
                }
                pending = shared.changed.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            // One that comes alone is written at once.
            let until = last.map_or_else(Instant::now, |last| last + GATHER);
            while pending.waiting == 0 && !pending.closed && pending.records.len() < TOGETHER {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                pending = shared.changed.wait_timeout(pending, left).unwrap_or_else(PoisonError::into_inner).0;
            }
            let (closed, waiting) = (pending.closed, pending.waiting);
            let (writing, failed) = (pending.records.keys().cloned().collect(), std::mem::take(&mut pending.failed));
            std::mem::replace(&mut *pending, Pending { busy: true, closed, waiting, writing, failed, ..Default::default() })
        };
        write(todo, shared);
        last = Some(Instant::now());
    }
}

fn write(todo: Pending, shared: &Shared) {
    let jobs = &shared.jobs;
    let mut records = todo.records.into_iter();
    loop {
        let (ids, files): (Vec<_>, Vec<_>) =
            records.by_ref().take(TOGETHER).map(|(id, bytes)| (id.clone(), (jobs.join(id).join("job.json"), bytes))).unzip();
        if ids.is_empty() {
            break;
        }
        let written = replace_all(&files);
        // Those who wait for these records wait for no others.
        let mut pending = lock(shared);
        let mut news = Vec::new();
        for ((id, (path, bytes)), written) in ids.into_iter().zip(files).zip(written) {
            pending.writing.remove(&id);
            let before = pending.failed.remove(&id).map(|(_, why)| why);
            if let Err(why) = written.map_err(|e| e.to_string()) {
                if before.as_ref() != Some(&why) {
                    news.push((id.clone(), path, why.clone()));
                }
                // One that was forgotten meanwhile is not written again.
                if !pending.deletions.contains(&id) {
                    pending.failed.insert(id, (bytes, why));
                }
            }
        }
        drop(pending);
        shared.changed.notify_all();
        for (id, path, why) in news {
            tracing::error!(
                job = id,
                "cannot write the job's record {}: {why}; it is tried again, and until then a restarted daemon would not know its state",
                path.display()
            );
        }
    }
    for (id, oldest) in todo.tidies {
        tidy_logs(&jobs.join(&id).join("logs"), oldest);
    }
    for (path, bytes) in todo.wholes {
        if let Err(e) = replace(&path, &bytes) {
            tracing::error!("cannot write {}: {e}; the next daemon would not know what it should", path.display());
        }
    }
    for path in todo.files {
        let _ = std::fs::remove_file(path);
    }
    for id in todo.deletions {
        lock(shared).failed.remove(&id);
        if let Err(e) = std::fs::remove_dir_all(jobs.join(&id)) {
            tracing::warn!(job = id, "cannot remove the folder of a forgotten job: {e}");
        }
    }
}

/// Replaces a file so that a reader, or a machine that starts again, finds the old bytes or the new ones.
///
/// # Errors
/// Those of the file system; the old file is still there then.
pub fn replace(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    // One file, one result.
    replace_all(&[(path, bytes)]).into_iter().collect()
}

/// As [`replace`], for files in different folders: each of them as if it were alone, in less time.
fn replace_all<P: AsRef<Path>, B: AsRef<[u8]>>(files: &[(P, B)]) -> Vec<std::io::Result<()>> {
    let mut parents = BTreeSet::new();
    let begun: Vec<_> = files.iter().map(|(path, bytes)| begin_file(path.as_ref(), bytes.as_ref(), &mut parents)).collect();
    // The first of these waits for a commit of the journal that has the others in it, too.
    let renamed: Vec<_> =
        begun.into_iter().zip(files).map(|(file, (path, _))| file.and_then(|f| rename_whole(path.as_ref(), &f))).collect();
    // Folders that were made for these files: most often one above all of them.
    let unsynced = parents.iter().find_map(|dir| sync_folder(dir).err()).map(|e| (e.kind(), e.to_string()));
    let durable = renamed.into_iter().zip(files).map(|(dir, (path, _))| {
        let written = dir.and_then(|dir| {
            dir.sync_all()?;
            if let Some((kind, text)) = &unsynced {
                return Err(std::io::Error::new(*kind, text.clone()));
            }
            hit(Point::RecordDurable);
            Ok(())
        });
        if written.is_err() {
            let _ = std::fs::remove_file(unfinished(path.as_ref()));
        }
        written
    });
    durable.collect()
}

fn sync_folder(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Makes a folder and those above it; notes the folders whose new names are not durable yet.
fn make_folder(dir: &Path, parents: &mut BTreeSet<PathBuf>) -> std::io::Result<()> {
    let missing = dir.ancestors().take_while(|d| !d.as_os_str().is_empty() && !d.exists());
    parents.extend(missing.filter_map(Path::parent).map(|p| if p.as_os_str().is_empty() { ".".into() } else { p.to_path_buf() }));
    std::fs::create_dir_all(dir)
}

/// Name of a file until it is whole.
fn unfinished(path: &Path) -> PathBuf {
    path.with_extension("tmp")
}

fn begin_file(path: &Path, bytes: &[u8], parents: &mut BTreeSet<PathBuf>) -> std::io::Result<File> {
    make_folder(path.parent().unwrap_or(Path::new("/")), parents)?;
    check(Point::RecordBegun)?;
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o640).open(unfinished(path))?;
    file.write_all(bytes)?;
    // A hint: the kernel finds room for the bytes and begins to write them, so that one commit will do for many files.
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    Ok(file)
}

/// Gives a file its name, once its bytes are on the disk. Returns its folder, where the name is not durable yet.
fn rename_whole(path: &Path, file: &File) -> std::io::Result<File> {
    file.sync_all()?;
    check(Point::RecordWritten)?;
    std::fs::rename(unfinished(path), path)?;
    hit(Point::RecordRenamed);
    File::open(path.parent().unwrap_or(Path::new("/")))
}

fn tidy_logs(dir: &Path, oldest: u64) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_str().and_then(crate::logs::LogName::parse).is_some_and(|n| n.generation < oldest) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x/job.json");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_written_is_in_the_way_of_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("j3"), "a file where a folder should be").unwrap();
        let files: Vec<_> = (0..9).map(|i| (dir.path().join(format!("j{i}/job.json")), format!("record {i}"))).collect();
        for (i, written) in replace_all(&files).into_iter().enumerate() {
            assert_eq!(written.is_ok(), i != 3);
            assert_eq!(std::fs::read_to_string(&files[i].0).ok(), written.is_ok().then(|| files[i].1.clone()));
            assert!(!unfinished(&files[i].0).exists());
        }
    }

    #[test]
    fn every_folder_that_gets_a_new_name_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let mut parents = BTreeSet::new();
        make_folder(&dir.path().join("a/b"), &mut parents).unwrap();
        assert_eq!(parents, [dir.path().to_path_buf(), dir.path().join("a")].into());
        parents.clear();
        make_folder(&dir.path().join("a/b"), &mut parents).unwrap();
        assert!(parents.is_empty());
    }

    fn record(id: &str) -> Record {
        let toml = "name = \"x\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t\"\n[train]\nsteps = 1\nbatch_size = 1\n";
        Record::new(id.into(), &ramtorch_job::JobSpec::parse(toml, Path::new("/"), "x").unwrap(), 0, 0)
    }

    #[test]
    fn a_witness_sees_that_a_record_is_on_the_disk_or_that_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::start(dir.path().into()).unwrap();
        disk.save(&record("a"));
        assert_eq!(disk.witness().durable("a", Duration::from_secs(10)), Ok(()));
        assert!(dir.path().join("a/job.json").exists());
        // A file is in the way of the folder.
        std::fs::write(dir.path().join("b"), "").unwrap();
        disk.save(&record("b"));
        let why = disk.witness().durable("b", Duration::from_secs(10)).unwrap_err();
        assert!(why.contains("b/job.json cannot be written: "), "{why}");
        std::fs::remove_file(dir.path().join("b")).unwrap();
        disk.save(&record("b"));
        assert_eq!(disk.witness().durable("b", Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn a_record_that_could_not_be_written_is_tried_again_until_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::start(dir.path().into()).unwrap();
        std::fs::write(dir.path().join("a"), "").unwrap();
        disk.save(&record("a"));
        disk.witness().durable("a", Duration::from_secs(10)).unwrap_err();
        std::fs::remove_file(dir.path().join("a")).unwrap();
        let end = Instant::now() + 10 * AGAIN;
        while disk.witness().durable("a", Duration::from_secs(10)).is_err() {
            assert!(Instant::now() < end, "nobody tries again");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(dir.path().join("a/job.json").exists());
    }

    #[test]
    fn everything_is_written_before_the_handle_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/logs")).unwrap();
        std::fs::create_dir_all(dir.path().join("b")).unwrap();
        for name in ["rank-0.g1.log", "rank-0.g9.log", "notes.txt"] {
            std::fs::write(dir.path().join("a/logs").join(name), "").unwrap();
        }
        let disk = Disk::start(dir.path().into()).unwrap();
        let mut newest = record("a");
        for step in 0..1000 {
            newest.step = step;
            disk.save(&newest);
        }
        disk.tidy("a", 5);
        disk.delete("b");
        drop(disk);
        assert_eq!(Record::read(&dir.path().join("a")).unwrap().step, 999);
        assert!(!dir.path().join("b").exists());
        let mut left: Vec<_> = std::fs::read_dir(dir.path().join("a/logs")).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["notes.txt", "rank-0.g9.log"]);
    }
}
