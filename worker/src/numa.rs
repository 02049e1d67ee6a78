//! Which processors and which memory are near a GPU, on machines whose memory has several nodes.
//!
//! ```text
//!   /sys/bus/pci/devices/<address>/numa_node     the node that a GPU hangs on, by its address on the bus (CUDA tells it)
//!   /sys/devices/system/node/node<n>/cpulist     processors of a node
//! ```
//! Everything here is a wish: where a file is missing or says nothing, nobody is pinned and memory comes from wherever the
//! kernel takes it. On machines with one node nothing is done at all.

use crate::api::DeviceSpec;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::path::Path;

/// The machine's own files.
const ROOT: &str = "/";
/// A rank is not pinned to a node that has fewer of its processors than this part of its threads.
const LEAST_PART: usize = 2;

/// Numbers of a list as the kernel writes it: `0-3,8,10-11`.
fn list(text: &str) -> Option<Vec<usize>> {
    let mut all = Vec::new();
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        // A processor's number is small; anything else is not such a list.
        if last < first || last > 1 << 16 {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// Nodes with memory; fewer than two mean that nothing is to be done.
fn nodes(root: &Path) -> Vec<usize> {
    let folder = root.join("sys/devices/system/node");
    let text = read(&folder.join("has_memory")).or_else(|| read(&folder.join("online")));
    text.and_then(|t| list(&t)).unwrap_or_default()
}

/// The node of what has this address on the bus.
fn node_of(root: &Path, bus_id: &str) -> Option<usize> {
    // CUDA writes the domain with four digits or eight, sysfs with four; digits as it likes, sysfs in lower case.
    let address = bus_id.to_ascii_lowercase();
    let (domain, rest) = address.split_once(':')?;
    let domain = domain.get(domain.len().checked_sub(4)?..)?;
    let known = |c: char| c.is_ascii_hexdigit() || c == ':' || c == '.';
    if !domain.chars().chain(rest.chars()).all(known) {
        return None;
    }
    // -1: the firmware does not say.
    read(&root.join(format!("sys/bus/pci/devices/{domain}:{rest}/numa_node")))?.trim().parse().ok()
}

fn nodes_in(root: &Path, bus_ids: &[Option<String>]) -> Option<Vec<u32>> {
    let all = nodes(root);
    if all.len() < 2 {
        return None;
    }
    let near = |id: &Option<String>| node_of(root, id.as_deref()?).filter(|n| all.contains(n));
    bus_ids.iter().map(|id| near(id).and_then(|n| u32::try_from(n).ok())).collect()
}

/// The nodes of devices with these addresses on the bus, where the machine has several and all of them are known.
pub(crate) fn nodes_of(bus_ids: &[Option<String>]) -> Option<Vec<u32>> {
    nodes_in(Path::new(ROOT), bus_ids)
}

/// Processors for a rank on `device`, out of those it may use; nothing where it had better not be pinned.
fn processors(root: &Path, device: &DeviceSpec, allowed: &[usize]) -> Option<Vec<usize>> {
    let node = *nodes_in(root, std::slice::from_ref(&device.bus_id))?.first()?;
    let near = list(&read(&root.join(format!("sys/devices/system/node/node{node}/cpulist")))?)?;
    let both: Vec<usize> = near.into_iter().filter(|p| allowed.contains(p)).collect();
    (!both.is_empty() && both.len() * LEAST_PART >= device.threads && both.len() < allowed.len()).then_some(both)
}

/// Keeps this thread, and every thread that it starts from now on, to the processors near `device`.
pub(crate) fn pin(device: &DeviceSpec) {
    let this = Pid::from_raw(0);
    let Ok(set) = sched_getaffinity(this) else { return };
    let allowed: Vec<usize> = (0..CpuSet::count()).filter(|p| set.is_set(*p).unwrap_or(false)).collect();
    let Some(near) = processors(Path::new(ROOT), device, &allowed) else { return };
    let mut wanted = CpuSet::new();
    if near.iter().any(|p| wanted.set(*p).is_err()) {
        return;
    }
    match sched_setaffinity(this, &wanted) {
        Ok(()) => tracing::info!("{device}: kept to the {} processors near it", near.len()),
        Err(e) => tracing::debug!("{device}: its threads are not kept near it: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::DeviceKind;

    /// A machine with two nodes of four processors, and GPUs on nodes 0, 1 and nowhere.
    fn machine() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("sys/devices/system/node/online", "0-1\n");
        write("sys/devices/system/node/node0/cpulist", "0-1,4-5\n");
        write("sys/devices/system/node/node1/cpulist", "2-3,6-7\n");
        for (address, node) in [("0000:1b:00.0", "0"), ("0000:9a:00.0", "1"), ("0000:bb:00.0", "-1")] {
            write(&format!("sys/bus/pci/devices/{address}/numa_node"), &format!("{node}\n"));
        }
        root
    }

    fn gpu(bus_id: &str, threads: usize) -> DeviceSpec {
        DeviceSpec { kind: DeviceKind::Cuda, index: 0, threads, memory_bytes: 1, bus_id: Some(bus_id.into()) }
    }

    #[test]
    fn ranks_are_near_their_gpus() {
        let root = machine();
        let root = root.path();
        let all: Vec<usize> = (0..8).collect();
        let cuda = |list: &[&str]| list.iter().map(|id| Some((*id).to_string())).collect::<Vec<_>>();
        // Whatever the ordinals are: a container's first GPU may be the machine's last.
        assert_eq!(nodes_in(root, &cuda(&["0000:9a:00.0", "0000:1b:00.0"])), Some(vec![1, 0]));
        assert_eq!(nodes_in(root, &cuda(&["00000000:9A:00.0", "0000:1B:00.0"])), Some(vec![1, 0]), "as other drivers write it");
        assert_eq!(nodes_in(root, &cuda(&["0000:1b:00.0", "0000:bb:00.0"])), None, "one GPU is nowhere");
        assert_eq!(nodes_in(root, &cuda(&["0000:cc:00.0"])), None, "there is no such GPU");
        for odd in ["", "1b", "0:1b:00.0", "0000:../../node", "é000:1b:00.0"] {
            assert_eq!(nodes_in(root, &cuda(&[odd])), None, "{odd:?}");
        }
        assert_eq!(nodes_in(root, &[None]), None, "a CPU device");
        assert_eq!(processors(root, &gpu("0000:1b:00.0", 4), &all), Some(vec![0, 1, 4, 5]));
        assert_eq!(processors(root, &gpu("0000:9a:00.0", 4), &[0, 1, 2, 3]), Some(vec![2, 3]), "what the process may use");
        assert_eq!(processors(root, &gpu("0000:9a:00.0", 4), &[0, 1, 4, 5]), None, "nothing near is allowed");
        assert_eq!(processors(root, &gpu("0000:9a:00.0", 4), &[2, 3, 6, 7]), None, "it is near already");
        assert_eq!(processors(root, &gpu("0000:1b:00.0", 9), &all), None, "too few for its threads");
    }

    #[test]
    fn one_node_and_odd_files_change_nothing() {
        let root = machine();
        for online in ["0\n", "", "x-y\n", "3-1\n", "0-99999999999\n"] {
            std::fs::write(root.path().join("sys/devices/system/node/online"), online).unwrap();
            assert_eq!(nodes_in(root.path(), &[Some("0000:1b:00.0".into())]), None, "{online:?}");
        }
        assert_eq!(list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(nodes_in(&root.path().join("none"), &[Some("0000:1b:00.0".into())]), None);
        // This machine, whatever it is: nothing fails.
        pin(&gpu("0000:1b:00.0", 1));
    }
}
