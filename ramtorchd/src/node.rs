//! Facts about this machine, read from /proc, /sys and /dev/shm. Nothing here touches a GPU or its driver.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Memory at one moment, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// What the machine (or this process's cgroup, if that is less) has.
    pub total: u64,
    /// What can be taken without swapping, by the same measure.
    pub available: u64,
    /// Size of the file system behind POSIX shared memory.
    pub shm_total: u64,
    /// What is free on it.
    pub shm_free: u64,
}

/// Reads [`Memory`]. A file that cannot be read counts as nothing available, so that admission refuses.
pub fn memory() -> Memory {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo_bytes(&info, "MemTotal").unwrap_or(0);
    let available = meminfo_bytes(&info, "MemAvailable").unwrap_or(0);
    let (total, available) = cgroup_folders()
        .iter()
        .filter_map(|dir| cgroup_limit(dir))
        .fold((total, available), |(total, available), (limit, free)| (total.min(limit), available.min(free)));
    let (shm_total, shm_free) = match nix::sys::statvfs::statvfs("/dev/shm") {
        Ok(s) => (s.blocks().saturating_mul(s.fragment_size()), s.blocks_available().saturating_mul(s.fragment_size())),
        Err(_) => (0, 0),
    };
    Memory { total, available, shm_total, shm_free }
}

fn meminfo_bytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// This process's cgroup (version 2) and those above it, innermost first.
fn cgroup_folders() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = text.lines().find_map(|l| l.strip_prefix("0::/")) else { return Vec::new() };
    let root = Path::new("/sys/fs/cgroup");
    let mut folders: Vec<PathBuf> = root.join(own).ancestors().take_while(|p| p.starts_with(root)).map(Path::to_path_buf).collect();
    folders.dedup();
    folders
}

/// Limit and free bytes of one cgroup; `None` without a limit. Clean page cache counts as free: it is given back.
fn cgroup_limit(dir: &Path) -> Option<(u64, u64)> {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let stat = read("memory.stat").unwrap_or_default();
    let cache: u64 = stat.lines().find_map(|l| l.strip_prefix("inactive_file ")).and_then(|v| v.trim().parse().ok()).unwrap_or(0);
    Some((limit, limit.saturating_sub(used.saturating_sub(cache))))
}

/// CPU threads that this process may use (affinity and cgroup quota respected), at least 1.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Milliseconds since 1970.
pub fn unix_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

/// Identity of this boot; pids and shared memory mean nothing across boots.
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|s| s.trim().to_string()).unwrap_or_default()
}

/// Name of this machine.
pub fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map(|s| s.trim().to_string()).unwrap_or_default()
}

/// `N` random bytes from the kernel.
pub fn random<const N: usize>() -> std::io::Result<[u8; N]> {
    let mut bytes = [0u8; N];
    let mut filled = 0;
    while filled < N {
        match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
            Ok(n) => filled += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(bytes)
}

/// A byte count for people: `1.5 GiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kibibytes() {
        let text = "MemTotal:       24000 kB\nMemAvailable:     100 kB\nHugePages_Total:  0\n";
        assert_eq!(meminfo_bytes(text, "MemAvailable"), Some(102_400));
        assert_eq!(meminfo_bytes(text, "Mem"), None);
        assert_eq!(meminfo_bytes("MemTotal: x kB", "MemTotal"), None);
    }

    #[test]
    fn cgroup_cache_counts_as_free() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("memory.max", "1000\n");
        write("memory.current", "900\n");
        assert_eq!(cgroup_limit(dir.path()), Some((1000, 100)));
        write("memory.stat", "anon 1\ninactive_file 300\n");
        assert_eq!(cgroup_limit(dir.path()), Some((1000, 400)));
        write("memory.max", "max\n");
        assert_eq!(cgroup_limit(dir.path()), None);
    }

    #[test]
    fn this_machine_has_memory_and_random_bytes() {
        let m = memory();
        assert!(m.available > 0 && m.available <= m.total, "{m:?}");
        assert_ne!(random::<16>().unwrap(), random::<16>().unwrap());
    }

    #[test]
    fn byte_counts_read_well() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(1536), "1.5 KiB");
        assert_eq!(human_bytes(3 << 30), "3.0 GiB");
    }
}
