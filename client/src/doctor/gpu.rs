//! GPUs, their driver, and the CUDA libraries.
//!
//! Libraries are looked for where workers look for them (`worker/cuda/src/library.rs`): the system's folders, the variables,
//! Python environments, toolkits. They are not loaded; versions are those in the names of their files.

use super::{Facts, Finding};
use std::path::{Path, PathBuf};

/// File, least major version, whether it is needed, what it is, where it comes from.
const LIBRARIES: [(&str, &str, u64, bool, &str); 5] = [
    ("libcuda", "libcuda.so", 1, true, "the NVIDIA driver; in a container, start it with access to GPUs"),
    ("libnvrtc", "libnvrtc.so", 12, true, "the CUDA toolkit, or the Python package nvidia-cuda-nvrtc"),
    ("libcublasLt", "libcublasLt.so", 12, true, "the CUDA toolkit, or the Python package nvidia-cublas"),
    (
        "libcudnn",
        "libcudnn.so",
        9,
        false,
        "NVIDIA's cuDNN packages, or the Python package nvidia-cudnn-cu13; without it attention is slower",
    ),
    ("libnccl", "libnccl.so", 2, false, "NVIDIA's NCCL packages, or the Python package nvidia-nccl-cu13; needed by jobs on several GPUs"),
];

pub fn all(facts: &Facts) -> Vec<Finding> {
    let cards = facts.names("/sys/bus/pci/devices").into_iter().filter(|d| is_nvidia_gpu(facts, d)).count();
    let version = facts.read("/proc/driver/nvidia/version");
    let Some(version) = version else {
        return vec![match cards {
            0 => Finding::ok("driver", "no NVIDIA GPU: jobs run on CPU devices"),
            n => Finding::fail(
                "driver",
                format!("{n} NVIDIA GPU(s) and no driver loaded"),
                "install the NVIDIA driver (nvidia-driver), or load it: modprobe nvidia",
            ),
        }];
    };
    let number = version.split_whitespace().find(|w| w.contains('.') && w.chars().all(|c| c.is_ascii_digit() || c == '.')).unwrap_or("?");
    let shown = facts.names("/proc/driver/nvidia/gpus").len();
    let mut findings = vec![match number.split('.').next().and_then(|n| n.parse::<u32>().ok()) {
        // CUDA 12 needs 525.
        Some(major) if major < 525 => {
            Finding::fail("driver", format!("version {number}"), "CUDA 12 needs version 525 or later: install a newer driver")
        }
        _ => Finding::ok("driver", format!("version {number}, {shown} GPU(s)")),
    }];
    findings.push(nodes(facts));
    let folders = folders(facts);
    for (check, file, least, needed, from) in LIBRARIES {
        findings.push(library(facts, &folders, check, file, least, needed, from));
    }
    findings
}

fn is_nvidia_gpu(facts: &Facts, device: &str) -> bool {
    let field = |name: &str| facts.read(&format!("/sys/bus/pci/devices/{device}/{name}")).unwrap_or_default();
    field("vendor").trim() == "0x10de" && field("class").trim().starts_with("0x03")
}

fn nodes(facts: &Facts) -> Finding {
    let names = facts.names("/dev");
    let gpus = names.iter().filter(|n| n.strip_prefix("nvidia").is_some_and(|d| d.parse::<u32>().is_ok())).count();
    let missing: Vec<&str> = ["nvidiactl", "nvidia-uvm"].into_iter().filter(|n| !names.iter().any(|have| have == n)).collect();
    if gpus == 0 || !missing.is_empty() {
        let found = format!("{gpus} GPU node(s) in /dev{}", missing.iter().map(|m| format!(", no /dev/{m}")).collect::<String>());
        let advice =
            "start nvidia-persistenced, or run nvidia-modprobe -c 0 -u; in a container, hand the devices in (--device nvidia.com/gpu=all)";
        return Finding::fail("device nodes", found, advice);
    }
    Finding::ok("device nodes", format!("{gpus} GPU(s), nvidiactl, nvidia-uvm"))
}

fn library(facts: &Facts, folders: &[PathBuf], check: &'static str, file: &str, least: u64, needed: bool, from: &str) -> Finding {
    let system = facts.ldconfig.lines().filter_map(|l| l.split(" => ").nth(1)).map(|p| facts.path(p.trim()));
    let in_folders = folders.iter().flat_map(|f| super::names(f).into_iter().map(move |n| f.join(n)));
    let named = |p: &PathBuf| {
        p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n == file || n.strip_prefix(file).is_some_and(|r| r.starts_with('.')))
    };
    // What the loader finds by itself comes first.
    let Some(path) = system.chain(in_folders).find(|p| named(p) && p.exists()) else {
        let advice = format!("it comes with {from}; RAMTORCH_CUDA_LIBRARIES adds folders to the search");
        return if needed { Finding::fail(check, "not found", advice) } else { Finding::warn(check, "not found", advice) };
    };
    // A link such as libcudnn.so.9 tells less than the file it leads to.
    let real = std::fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    let version = version_of(&real, file).or_else(|| version_of(&path, file)).unwrap_or_default();
    let found =
        format!("{} {}", if version.is_empty() { "version unknown" } else { &version }, path.parent().unwrap_or(Path::new("/")).display());
    match version.split('.').next().and_then(|v| v.parse::<u64>().ok()) {
        Some(major) if major < least => Finding::fail(check, found, format!("version {least} or later is needed; it comes with {from}")),
        _ => Finding::ok(check, found),
    }
}

/// What follows `.so.` in the name of a file.
fn version_of(path: &Path, file: &str) -> Option<String> {
    let rest = path.file_name()?.to_str()?.strip_prefix(file)?.strip_prefix('.')?;
    Some(rest.to_string())
}

/// Folders in the order in which workers search them.
fn folders(facts: &Facts) -> Vec<PathBuf> {
    let list = |name: &str| facts.variable(name).map(|v| std::env::split_paths(v).collect::<Vec<_>>()).unwrap_or_default();
    let mut all: Vec<PathBuf> = list("RAMTORCH_CUDA_LIBRARIES");
    all.extend(list("LD_LIBRARY_PATH"));
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|v| facts.variable(v)) {
        all.extend(["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|s| Path::new(home).join(s)));
    }
    // Variables name folders of this machine, patterns those below the root.
    let mut patterns: Vec<String> = Vec::new();
    for home in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|v| facts.variable(v)) {
        patterns.push(format!("{home}/lib/python3*/site-packages/nvidia/*/lib"));
        all.push(Path::new(home).join("lib"));
    }
    patterns.extend(["/usr/local/nvidia/lib64", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*-linux/lib"].map(String::from));
    let home = facts.variable("HOME").map(|h| format!("{h}/.local/lib/python3*/site-packages"));
    let sites = [
        "/opt/*/.venv/lib/python3*/site-packages",
        "/opt/*/lib/python3*/site-packages",
        "/usr/local/lib/python3*/dist-packages",
        "/usr/local/lib/python3*/site-packages",
        "/usr/lib/python3/dist-packages",
    ];
    patterns.extend(sites.into_iter().map(String::from).chain(home).map(|site| format!("{site}/nvidia/*/lib")));
    all.into_iter().filter(|p| p.is_absolute()).chain(patterns.iter().flat_map(|p| matches(&facts.root, p))).collect()
}

/// Folders that match a pattern whose parts hold one `*` each, those that sort higher first.
fn matches(root: &Path, pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![root.to_path_buf()];
    for part in pattern.split('/').filter(|p| !p.is_empty()) {
        found = match part.split_once('*') {
            None => found.into_iter().map(|p| p.join(part)).filter(|p| p.exists()).collect(),
            Some((before, after)) => {
                let fits = |n: &String| n.len() >= before.len() + after.len() && n.starts_with(before) && n.ends_with(after);
                found
                    .into_iter()
                    .flat_map(|p| super::names(&p).into_iter().rev().filter(fits).map(move |n| p.join(n)).collect::<Vec<_>>())
                    .collect()
            }
        };
    }
    found
}

#[cfg(test)]
mod tests {
    use crate::doctor::Status;
    use crate::doctor::tests::Machine;

    fn with_gpu() -> Machine {
        let m = Machine::new();
        m.write("/sys/bus/pci/devices/0000:04:00.0/vendor", "0x10de\n");
        m.write("/sys/bus/pci/devices/0000:04:00.0/class", "0x030200\n");
        m
    }

    fn with_driver() -> Machine {
        let m = with_gpu();
        m.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n");
        m.write("/proc/driver/nvidia/gpus/0000:04:00.0/information", "");
        for node in ["nvidia0", "nvidiactl", "nvidia-uvm"] {
            m.write(&format!("/dev/{node}"), "");
        }
        m
    }

    #[test]
    fn a_gpu_without_a_driver_is_a_failure_and_no_gpu_is_none() {
        assert_eq!(Machine::new().status("driver"), Status::Ok);
        assert_eq!(with_gpu().status("driver"), Status::Fail);
        let m = with_driver();
        assert!(m.finding("driver").found.contains("580.95.05, 1 GPU"));
        m.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1  x\n");
        assert!(m.finding("driver").advice.contains("525"));
    }

    #[test]
    fn missing_device_nodes_are_named() {
        let m = with_driver();
        assert_eq!(m.status("device nodes"), Status::Ok);
        std::fs::remove_file(m.facts.path("/dev/nvidia-uvm")).unwrap();
        assert!(m.finding("device nodes").found.contains("no /dev/nvidia-uvm"));
    }

    #[test]
    fn libraries_are_found_where_workers_find_them_with_their_versions() {
        let mut m = with_driver();
        assert_eq!((m.status("libcublasLt"), m.status("libcudnn")), (Status::Fail, Status::Warn));
        assert!(m.finding("libcudnn").advice.contains("RAMTORCH_CUDA_LIBRARIES"));
        m.write("/usr/local/cuda-13.0/lib64/libcublasLt.so.13.1.0.3", "");
        m.write("/opt/x/.venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn.so.9", "");
        m.write("/opt/x/.venv/lib/python3.12/site-packages/nvidia/cudnn/lib/libcudnn_graph.so.9", "");
        assert!(m.finding("libcublasLt").found.starts_with("13.1.0.3 "));
        assert!(m.finding("libcudnn").found.starts_with("9 "));
        m.write("/usr/lib/x86_64-linux-gnu/libnvrtc.so.11.2", "");
        m.facts.ldconfig = "\tlibnvrtc.so.11.2 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvrtc.so.11.2\n".into();
        assert!(m.finding("libnvrtc").advice.contains("12 or later"));
        let chosen = m.dir.path().join("chosen");
        m.write("/chosen/libnvrtc.so.13", "");
        m.facts.ldconfig.clear();
        m.facts.environment.push(("RAMTORCH_CUDA_LIBRARIES".into(), chosen.to_str().unwrap().into()));
        assert_eq!(m.status("libnvrtc"), Status::Ok);
    }
}
