//! GPUs, their driver, and the CUDA libraries.
//!
//! Libraries are looked for where workers look for them (`worker/cuda/src/library/`): the variables, the system's folders,
//! Python environments, toolkits. They are not loaded; versions are those in the names of their files.

use super::{Facts, Finding};
use std::path::{Path, PathBuf};

struct Library {
    /// Name of the check, and of the file before `.so`.
    check: &'static str,
    file: &'static str,
    /// Major and minor.
    least: (u64, u64),
    /// Its major version is that of CUDA, of which the driver's is the newest that can be used.
    of_cuda: bool,
    needed: bool,
    /// Where it comes from.
    from: &'static str,
}

const LIBRARIES: [Library; 5] = [
    Library {
        check: "libcuda",
        file: "libcuda.so",
        least: (1, 0),
        of_cuda: false,
        needed: true,
        from: "the NVIDIA driver; in a container, start it with access to GPUs",
    },
    Library {
        check: "libnvrtc",
        file: "libnvrtc.so",
        least: (12, 0),
        of_cuda: true,
        needed: true,
        from: "the CUDA toolkit, or the Python package nvidia-cuda-nvrtc",
    },
    Library {
        check: "libcublasLt",
        file: "libcublasLt.so",
        least: (12, 0),
        of_cuda: true,
        needed: true,
        from: "the CUDA toolkit, or the Python package nvidia-cublas",
    },
    Library {
        check: "libcudnn",
        file: "libcudnn.so",
        least: (9, 0),
        of_cuda: false,
        needed: false,
        from: "NVIDIA's cuDNN packages, or the Python package nvidia-cudnn-cu13 (-cu12 for CUDA 12); without it attention is slower",
    },
    // As in worker/cuda/src/peers/nccl.rs.
    Library {
        check: "libnccl",
        file: "libnccl.so",
        least: (2, 18),
        of_cuda: false,
        needed: false,
        from: "NVIDIA's NCCL packages, or the Python package nvidia-nccl-cu13 (-cu12 for CUDA 12); needed by jobs on several GPUs",
    },
];

/// CUDA's major version that a driver of this branch supports, and with it all before; `None` for what is too old.
fn cuda_of(branch: u32) -> Option<u64> {
    match branch {
        ..525 => None,
        525..580 => Some(12),
        580.. => Some(13),
    }
}

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
    let branch = number.split('.').next().and_then(|n| n.parse::<u32>().ok());
    let cuda = branch.and_then(cuda_of);
    let mut findings = vec![match branch {
        Some(_) if cuda.is_none() => {
            Finding::fail("driver", format!("version {number}"), "CUDA 12 needs version 525 or later: install a newer driver")
        }
        _ => Finding::ok("driver", format!("version {number}, {shown} GPU(s)")),
    }];
    findings.push(nodes(facts));
    let files = files(facts);
    findings.extend(LIBRARIES.iter().map(|l| l.look(&files, cuda)));
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

/// All files in the order in which workers search: the folders of the variables, what the loader finds by itself, all others.
fn files(facts: &Facts) -> Vec<PathBuf> {
    let below = |folders: Vec<PathBuf>| folders.into_iter().flat_map(|f| super::names(&f).into_iter().map(move |n| f.join(n)));
    let system = facts.ldconfig.lines().filter_map(|l| l.split(" => ").nth(1)).map(|p| facts.path(p.trim()));
    let (named, others) = folders(facts);
    below(named).chain(system).chain(below(others)).filter(|p| p.exists()).collect()
}

impl Library {
    /// What is wrong with a version, where it is known.
    fn problem(&self, version: &str, cuda: Option<u64>) -> Option<String> {
        let mut numbers = version.split('.').map_while(|n| n.parse::<u64>().ok());
        let (major, minor) = (numbers.next()?, numbers.next());
        if (major, minor.unwrap_or(u64::MAX)) < self.least {
            let (least, after) = self.least;
            let after = if after == 0 { String::new() } else { format!(".{after}") };
            return Some(format!("version {least}{after} or later is needed; it comes with {}", self.from));
        }
        let cuda = cuda.filter(|cuda| self.of_cuda && major > *cuda)?;
        Some(format!(
            "the driver supports CUDA {cuda}, and workers refuse what is made for a newer one: install version {cuda}, whose folder RAMTORCH_CUDA_LIBRARIES can name, or a newer driver"
        ))
    }

    /// The first file that workers would take, else the first that is there, with what is wrong with it.
    fn look(&self, files: &[PathBuf], cuda: Option<u64>) -> Finding {
        let bad = |found: String, advice: String| match self.needed {
            true => Finding::fail(self.check, found, advice),
            false => Finding::warn(self.check, found, advice),
        };
        let mut first_problem = None;
        for path in files.iter().filter(|p| self.names(p)) {
            // A link such as libcudnn.so.9 tells less than the file it leads to.
            let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            let version = version_of(&real, self.file).or_else(|| version_of(path, self.file)).unwrap_or_default();
            let shown = if version.is_empty() { "version unknown" } else { &version };
            let found = format!("{shown} {}", path.parent().unwrap_or(Path::new("/")).display());
            match self.problem(&version, cuda) {
                None => return Finding::ok(self.check, found),
                Some(problem) => {
                    first_problem.get_or_insert((found, problem));
                }
            }
        }
        match first_problem {
            Some((found, problem)) => bad(found, problem),
            None => bad("not found".into(), format!("it comes with {}; RAMTORCH_CUDA_LIBRARIES adds folders to the search", self.from)),
        }
    }

    fn names(&self, path: &Path) -> bool {
        let rest = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_prefix(self.file));
        rest.is_some_and(|r| r.is_empty() || r.starts_with('.'))
    }
}

/// What follows `.so.` in the name of a file.
fn version_of(path: &Path, file: &str) -> Option<String> {
    let rest = path.file_name()?.to_str()?.strip_prefix(file)?.strip_prefix('.')?;
    Some(rest.to_string())
}

/// Folders in the order in which workers search them: those before the system's own, and those after.
fn folders(facts: &Facts) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let list = |name: &str| facts.variable(name).map(|v| std::env::split_paths(v).collect::<Vec<_>>()).unwrap_or_default();
    let absolute = |all: Vec<PathBuf>| all.into_iter().filter(|p| p.is_absolute()).collect::<Vec<_>>();
    let named = [list("RAMTORCH_CUDA_LIBRARIES"), list("LD_LIBRARY_PATH")].concat();
    let mut all: Vec<PathBuf> = Vec::new();
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
    (absolute(named), absolute(all).into_iter().chain(patterns.iter().flat_map(|p| matches(&facts.root, p))).collect())
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

    /// As workers do: what is made for a newer CUDA than the driver's is passed over, and refused where there is nothing else.
    #[test]
    fn libraries_are_compared_with_the_drivers_cuda() {
        let mut m = with_driver();
        m.write("/usr/local/cuda-13.0/lib64/libnvrtc.so.13", "");
        assert_eq!(m.status("libnvrtc"), Status::Ok);
        m.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.230.02  x\n");
        let finding = m.finding("libnvrtc");
        assert_eq!(finding.status, Status::Fail);
        assert!(finding.advice.contains("supports CUDA 12") && finding.found.contains("cuda-13.0/lib64"), "{}", finding.advice);
        m.write("/usr/local/cuda-12.2/lib64/libnvrtc.so.12.2.140", "");
        assert!(m.finding("libnvrtc").found.starts_with("12.2.140 "));
        assert_eq!([470, 525, 579, 580, 595].map(super::cuda_of), [None, Some(12), Some(12), Some(13), Some(13)]);
        // Variables come before what the loader finds by itself.
        m.write("/usr/lib/x86_64-linux-gnu/libnvrtc.so.12.9", "");
        m.facts.ldconfig = "\tlibnvrtc.so.12.9 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvrtc.so.12.9\n".into();
        assert!(m.finding("libnvrtc").found.starts_with("12.9 "));
        m.write("/chosen/libnvrtc.so.12.1", "");
        let chosen = m.dir.path().join("chosen");
        m.facts.environment.push(("RAMTORCH_CUDA_LIBRARIES".into(), chosen.to_str().unwrap().into()));
        assert!(m.finding("libnvrtc").found.starts_with("12.1 "));
    }

    #[test]
    fn what_is_optional_and_too_old_is_a_warning() {
        let m = with_driver();
        m.write("/usr/local/cuda-13.0/lib64/libnccl.so.2.17.1", "");
        m.write("/usr/local/cuda-13.0/lib64/libcudnn.so.8.9.7", "");
        assert_eq!((m.status("libnccl"), m.status("libcudnn")), (Status::Warn, Status::Warn));
        assert!(m.finding("libnccl").advice.contains("2.18 or later"));
        m.write("/opt/x/lib/python3.12/site-packages/nvidia/nccl/lib/libnccl.so.2", "");
        assert_eq!(m.status("libnccl"), Status::Ok);
    }
}
