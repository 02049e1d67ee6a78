//! How much memory there is: the mount that holds segments, RAM, and the limits of this process's control groups.

use crate::error::StoreError;
use crate::name::SegmentName;
use nix::sys::statvfs::statvfs;
use std::path::{Path, PathBuf};

const SHM: &str = "/dev/shm";

/// Bytes that /dev/shm can still hold.
///
/// # Errors
/// [`StoreError::System`] when there is no /dev/shm.
pub fn shm_free_bytes() -> Result<u64, StoreError> {
    shm_bytes().map(|(free, _)| free)
}

/// Bytes that /dev/shm can hold in all; `u64::MAX` for a mount without a limit.
///
/// # Errors
/// [`StoreError::System`] when there is no /dev/shm.
pub fn shm_total_bytes() -> Result<u64, StoreError> {
    shm_bytes().map(|(_, total)| total)
}

fn shm_bytes() -> Result<(u64, u64), StoreError> {
    let status = statvfs(SHM).map_err(|e| StoreError::system(format!("ask how much {SHM} can hold"), e))?;
    if status.blocks() == 0 {
        return Ok((u64::MAX, u64::MAX)); // tmpfs mounted with size=0
    }
    let unit = status.fragment_size();
    Ok((status.blocks_available().saturating_mul(unit), status.blocks().saturating_mul(unit)))
}

/// Bytes of RAM that can be taken without swapping: the least of MemAvailable and what the memory limits of this
/// process's control groups leave.
///
/// # Errors
/// [`StoreError::System`] when /proc/meminfo cannot be read.
pub fn ram_available_bytes() -> Result<u64, StoreError> {
    let path = "/proc/meminfo";
    let text = std::fs::read_to_string(path).map_err(|e| StoreError::system(format!("read {path}"), e))?;
    let free = mem_available(&text)
        .ok_or_else(|| StoreError::system(format!("find MemAvailable in {path}"), std::io::Error::from(std::io::ErrorKind::InvalidData)))?;
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    Ok(free.min(control_group_free(&groups, Path::new("/sys/fs/cgroup")).unwrap_or(u64::MAX)))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// What the tightest memory limit on the way from this process's group to the root leaves, page cache that can be
/// dropped counted as free. `None` where nothing is limited, or no group can be read.
fn control_group_free(groups: &str, root: &Path) -> Option<u64> {
    groups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            let (mount, files) = if controllers.is_empty() {
                (root.to_path_buf(), ["memory.max", "memory.current", "inactive_file", "active_file"])
            } else if controllers.split(',').any(|c| c == "memory") {
                (root.join("memory"), ["memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"])
            } else {
                return None;
            };
            let group = mount.join(path.trim_start_matches('/'));
            group.ancestors().take_while(|folder| folder.starts_with(&mount)).filter_map(|folder| group_free(folder, files)).min()
        })
        .min()
}

fn group_free(folder: &Path, [limit, usage, inactive, active]: [&str; 4]) -> Option<u64> {
    let number = |path: PathBuf| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    // "max" is no number, and so no limit.
    let limit = number(folder.join(limit))?;
    let usage = number(folder.join(usage))?;
    let statistics = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cache: u64 = statistics
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(key, _)| *key == inactive || *key == active)
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum();
    Some(limit.saturating_sub(usage.saturating_sub(cache)))
}

/// What a new segment may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    pub shm_free: u64,
    pub ram_available: u64,
}

impl Room {
    pub fn now() -> Result<Room, StoreError> {
        Ok(Room { shm_free: shm_free_bytes()?, ram_available: ram_available_bytes()? })
    }

    /// Refuses a segment that does not fit.
    pub fn check(&self, name: &SegmentName, wanted: u64) -> Result<(), StoreError> {
        let name = name.to_string();
        if wanted > self.shm_free {
            return Err(StoreError::ShmFull { name, wanted, free: self.shm_free });
        }
        if wanted > self.ram_available {
            return Err(StoreError::RamFull { name, wanted, free: self.ram_available });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_memory() {
        let (free, total) = (shm_free_bytes().unwrap(), shm_total_bytes().unwrap());
        assert!(free > 0 && free <= total);
        assert!(ram_available_bytes().unwrap() > 1 << 20);
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        assert_eq!(mem_available("MemTotal:  10 kB\nMemAvailable:     1234 kB\n"), Some(1234 * 1024));
        for bad in ["", "MemAvailable: kB", "MemAvailable: 12", "MemAvailable: 99999999999999999999 kB"] {
            assert_eq!(mem_available(bad), None);
        }
    }

    #[test]
    fn the_tightest_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/memory.current", "700\n");
        write("a/memory.stat", "anon 500\ninactive_file 150\nactive_file 50\n");
        write("a/b/memory.max", "max\n");
        write("a/b/memory.current", "600\n");
        assert_eq!(control_group_free("0::/a/b\n", root.path()), Some(500));
        write("memory/m/memory.limit_in_bytes", "400\n");
        write("memory/m/memory.usage_in_bytes", "100\n");
        assert_eq!(control_group_free("3:cpu:/x\n4:memory:/m\n0::/a/b\n", root.path()), Some(300));
        assert_eq!(control_group_free("0::/elsewhere\ngarbage\n", root.path()), None);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let name = SegmentName::new("x").unwrap();
        let room = Room { shm_free: 100, ram_available: 50 };
        assert!(room.check(&name, 50).is_ok());
        let text = room.check(&name, 51).unwrap_err().to_string();
        assert!(text.contains("51 bytes") && text.contains("50 bytes of RAM"), "{text}");
        let text = room.check(&name, 101).unwrap_err().to_string();
        assert!(text.contains("101 bytes") && text.contains("/dev/shm has 100"), "{text}");
    }
}
