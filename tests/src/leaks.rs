//! What a run may leave behind: nothing but the files it was asked for.
//!
//! Tests run side by side, so "ours" has to be told from a neighbour's. A process is ours when the sandbox's mark is in
//! its environment. A segment cannot be marked; one that no process has open or mapped, and that was made after the
//! sandbox, has been left by somebody: then the check of whoever looks first fails, which is right, since a leak is a
//! defect whoever finds it.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// Variable by which processes of a sandbox are known; its value is the sandbox's folder.
pub const MARK: &str = "RAMTORCH_TEST_SANDBOX";

const SEGMENTS: &str = "/dev/shm";
/// Time for killed processes to be reaped by whoever inherited them.
const GRACE: Duration = Duration::from_secs(5);

/// Processes started in the sandbox at `root`, directly or not, that still run: pid and command line.
pub fn processes(root: &Path) -> Vec<(i32, String)> {
    let mark = format!("{MARK}={}", root.display());
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let marked = |entry: fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let environment = fs::read(entry.path().join("environ")).ok()?;
        environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()).then(|| {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            (pid, String::from_utf8_lossy(&line).replace('\0', " "))
        })
    };
    // A zombie has no environment: it is not counted.
    entries.flatten().filter_map(marked).collect()
}

/// Sockets below `folder`.
pub fn sockets(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(t) if t.is_dir() => found.extend(sockets(&entry.path())),
            Ok(t) if t.is_socket() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Segments of ramtorch made after `since` that no process uses.
pub fn orphan_segments(since: SystemTime) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(SEGMENTS) else { return Vec::new() };
    let recent = |entry: fs::DirEntry| {
        let meta = entry.metadata().ok()?;
        let made = meta.created().or_else(|_| meta.modified()).ok()?;
        let named = entry.file_name().to_string_lossy().starts_with("ramtorch");
        (named && made >= since).then(|| (entry.path(), meta.ino()))
    };
    let candidates: Vec<_> = entries.flatten().filter_map(recent).collect();
    if candidates.is_empty() {
        return Vec::new();
    }
    let used = used_inodes();
    candidates.into_iter().filter(|(_, inode)| !used.contains(inode)).map(|(path, _)| path).collect()
}

/// Inodes below /dev/shm that any process has mapped or open.
fn used_inodes() -> Vec<u64> {
    let mut used = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        for line in fs::read_to_string(process.path().join("maps")).unwrap_or_default().lines() {
            // address perms offset device inode path
            let mut fields = line.split_whitespace().skip(4);
            if let (Some(inode), Some(path)) = (fields.next(), fields.next())
                && path.starts_with(SEGMENTS)
            {
                used.extend(inode.parse::<u64>().ok());
            }
        }
        for fd in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            if fs::read_link(fd.path()).is_ok_and(|target| target.starts_with(SEGMENTS)) {
                used.extend(fs::metadata(fd.path()).ok().map(|m| m.ino()));
            }
        }
    }
    used
}

/// Waits until `find` finds nothing; returns what it still finds when the grace is over.
pub fn settle<T>(mut find: impl FnMut() -> Vec<T>) -> Vec<T> {
    let end = Instant::now() + GRACE;
    loop {
        let found = find();
        if found.is_empty() || Instant::now() > end {
            return found;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_running_process_is_found_by_its_mark() {
        let root = tempfile::tempdir().unwrap();
        let mut child = Command::new("sleep").arg("60").env(MARK, root.path()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Between fork and exec it still has this process's environment.
        let end = Instant::now() + GRACE;
        while processes(root.path()).is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(processes(root.path()).iter().map(|p| p.0).collect::<Vec<_>>(), [pid]);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(processes(root.path()).is_empty());
    }

    #[test]
    fn a_socket_is_found_in_any_depth() {
        let root = tempfile::tempdir().unwrap();
        let deep = root.path().join("a/b");
        fs::create_dir_all(&deep).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(deep.join("s")).unwrap();
        assert_eq!(sockets(root.path()), [deep.join("s")]);
    }

    #[test]
    fn a_segment_counts_as_left_only_while_nobody_has_it_open() {
        let since = SystemTime::now() - Duration::from_secs(1);
        let path = Path::new(SEGMENTS).join(format!("ramtorch-leak-check-{}", std::process::id()));
        let file = fs::File::create(&path).unwrap();
        assert!(!orphan_segments(since).contains(&path));
        drop(file);
        let found = orphan_segments(since).contains(&path);
        fs::remove_file(&path).unwrap();
        assert!(found);
    }
}
