//! Which processors and which memory are near a GPU, on machines whose memory has several nodes.
//!
//! ```text
//!   /proc/driver/nvidia/gpus/<address>           GPUs by address on the bus, the order in which they are numbered
//!   /sys/bus/pci/devices/<address>/numa_node     the node that a GPU hangs on
//!   /sys/devices/system/node/node<n>/cpulist     processors of a node
//! ```
//! Everything here is a wish: where a file is missing or says nothing, nobody is pinned and memory comes from wherever the
//! kernel takes it. On machines with one node nothing is done at all.

use crate::api::{DeviceKind, DeviceSpec};
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

/// The node that GPU `index` hangs on.
fn node_of_gpu(root: &Path, index: u32) -> Option<usize> {
    let entries = std::fs::read_dir(root.join("proc/driver/nvidia/gpus")).ok()?;
    let mut addresses: Vec<String> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    addresses.sort();
    let address = addresses.get(index as usize)?.to_ascii_lowercase();
    // -1: the firmware does not say.
    read(&root.join("sys/bus/pci/devices").join(address).join("numa_node"))?.trim().parse().ok()
}

fn nodes_in(root: &Path, devices: &[(DeviceKind, u32)]) -> Option<Vec<u32>> {
    let all = nodes(root);
    if all.len() < 2 {
        return None;
    }
    let near = |d: &(DeviceKind, u32)| if d.0 == DeviceKind::Cuda { node_of_gpu(root, d.1).filter(|n| all.contains(n)) } else { None };
    devices.iter().map(|d| near(d).and_then(|n| u32::try_from(n).ok())).collect()
}

/// The node of each of these devices, where the machine has several and all of them are known.
pub(crate) fn nodes_of(devices: &[(DeviceKind, u32)]) -> Option<Vec<u32>> {
    nodes_in(Path::new(ROOT), devices)
}

/// Processors for a rank on `device`, out of those it may use; nothing where it had better not be pinned.
fn processors(root: &Path, device: &DeviceSpec, allowed: &[usize]) -> Option<Vec<usize>> {
    let node = *nodes_in(root, &[(device.kind, device.index)])?.first()?;
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
        for (address, node) in [("0000:1B:00.0", "0"), ("0000:9a:00.0", "1"), ("0000:bb:00.0", "-1")] {
            write(&format!("proc/driver/nvidia/gpus/{address}/information"), "");
            write(&format!("sys/bus/pci/devices/{}/numa_node", address.to_ascii_lowercase()), &format!("{node}\n"));
        }
        root
    }

    fn gpu(index: u32, threads: usize) -> DeviceSpec {
        DeviceSpec { kind: DeviceKind::Cuda, index, threads, memory_bytes: 1 }
    }

    #[test]
    fn ranks_are_near_their_gpus() {
        let root = machine();
        let root = root.path();
        let all: Vec<usize> = (0..8).collect();
        let cuda = |list: &[u32]| list.iter().map(|i| (DeviceKind::Cuda, *i)).collect::<Vec<_>>();
        assert_eq!(nodes_in(root, &cuda(&[1, 0])), Some(vec![1, 0]));
        assert_eq!(nodes_in(root, &cuda(&[0, 2])), None, "the third GPU is nowhere");
        assert_eq!(nodes_in(root, &cuda(&[3])), None, "there is no fourth one");
        assert_eq!(nodes_in(root, &[(DeviceKind::Cpu, 0)]), None);
        assert_eq!(processors(root, &gpu(0, 4), &all), Some(vec![0, 1, 4, 5]));
        assert_eq!(processors(root, &gpu(1, 4), &[0, 1, 2, 3]), Some(vec![2, 3]), "what the process may use");
        assert_eq!(processors(root, &gpu(1, 4), &[0, 1, 4, 5]), None, "nothing near is allowed");
        assert_eq!(processors(root, &gpu(1, 4), &[2, 3, 6, 7]), None, "it is near already");
        assert_eq!(processors(root, &gpu(0, 9), &all), None, "too few for its threads");
    }

    #[test]
    fn one_node_and_odd_files_change_nothing() {
        let root = machine();
        for online in ["0\n", "", "x-y\n", "3-1\n", "0-99999999999\n"] {
            std::fs::write(root.path().join("sys/devices/system/node/online"), online).unwrap();
            assert_eq!(nodes_in(root.path(), &[(DeviceKind::Cuda, 0)]), None, "{online:?}");
        }
        assert_eq!(list("0-2,5\n"), Some(vec![0, 1, 2, 5]));
        assert_eq!(nodes_in(&root.path().join("none"), &[(DeviceKind::Cuda, 0)]), None);
        // This machine, whatever it is: nothing fails.
        pin(&gpu(0, 1));
    }
}
