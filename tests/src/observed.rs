//! What a process takes, as the kernel counts it.

use nix::unistd::Pid;
use std::path::PathBuf;

/// A process at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Observed {
    /// Memory of its own that is resident (anonymous pages), in bytes: neither files nor shared memory.
    pub memory: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Processor time since its start, in seconds.
    pub cpu_seconds: f64,
}

fn of(pid: Pid, what: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{what}"))
}

fn read(pid: Pid, what: &str) -> String {
    std::fs::read_to_string(of(pid, what)).unwrap_or_else(|e| panic!("{}: {e}", of(pid, what).display()))
}

fn count(pid: Pid, what: &str) -> usize {
    std::fs::read_dir(of(pid, what)).map_or(0, Iterator::count)
}

/// Looks at a process.
///
/// # Panics
/// There is none, or it is another user's.
pub fn observe(pid: Pid) -> Observed {
    let status = read(pid, "status");
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).expect("a line on anonymous memory");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("KiB");
    Observed { memory: kib << 10, descriptors: count(pid, "fd"), threads: count(pid, "task"), cpu_seconds: cpu_seconds(pid) }
}

/// Processor time of a process since its start, in seconds.
///
/// # Panics
/// As [`observe`].
pub fn cpu_seconds(pid: Pid) -> f64 {
    let stat = read(pid, "stat");
    // The second field, a name in parentheses, may hold spaces. utime and stime are the 14th and the 15th.
    let ticks =
        |i: usize| -> f64 { stat.rsplit(')').next().and_then(|s| s.split_whitespace().nth(i)).expect("a field").parse().expect("ticks") };
    let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().expect("ticks a second");
    (ticks(11) + ticks(12)) / hertz as f64
}

/// Threads of a process that run now.
pub fn threads(pid: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(of(pid, "task")).into_iter().flatten().flatten();
    tasks.filter_map(|t| t.file_name().to_str()?.parse().ok().map(Pid::from_raw)).collect()
}

/// Files below a folder.
pub fn files(folder: &std::path::Path) -> usize {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| if e.file_type().is_ok_and(|t| t.is_dir()) { files(&e.path()) } else { 1 }).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let me = nix::unistd::getpid();
        let before = observe(me);
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        let held = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = observe(me);
        drop(file);
        assert!(after.memory >= before.memory + (held.len() as u64) / 2, "{before:?} {after:?}");
        assert!(after.descriptors > 3 && after.threads > 0 && after.cpu_seconds >= before.cpu_seconds);
        assert!(threads(me).contains(&nix::unistd::gettid()));
    }
}
