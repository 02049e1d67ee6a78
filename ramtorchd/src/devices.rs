//! Which devices this daemon drives.
//!
//! GPUs are counted from what the kernel driver shows in /proc and /dev. The daemon never loads CUDA: it could then
//! hold GPU memory, or hang in the driver together with a worker.

use crate::node;
use ramtorch_worker::{DeviceKind, DeviceSpec, GpuSeen};
use std::path::Path;

/// What the user asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeviceRequest {
    /// `--devices`: `cpu`, `cpu:N`, or a list of `cuda:K`.
    pub devices: Option<String>,
    /// `--gpus`: the first so many GPUs.
    pub gpus: Option<u32>,
    /// `--device-memory`: bytes of each device that a plan may use.
    pub memory_bytes: Option<u64>,
    /// `--threads`: CPU threads of all devices together.
    pub threads: Option<usize>,
    /// A GPU may be named several times, and then is so many devices that share its memory: for tests of gangs on a machine with
    /// one GPU. Never faster.
    pub share_gpus: bool,
}

/// In the environment, with the value 1: [`DeviceRequest::share_gpus`].
pub const SHARE_GPUS: &str = "RAMTORCH_SHARE_GPUS";

/// A device, and what it is called.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// As workers and plans see it.
    pub spec: DeviceSpec,
    /// Name of the model, for people.
    pub model: String,
}

/// The devices of this daemon, and what a user should know about the choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Inventory {
    /// At least one.
    pub devices: Vec<Device>,
    /// One line for the log.
    pub note: String,
}

/// What is wrong with a request for devices.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// Not in the grammar.
    #[error("`{0}` is no list of devices: write `cpu`, `cpu:N` (N ranks that share the cores) or `cuda:0,cuda:1`")]
    Syntax(String),
    /// CPU and GPU together.
    #[error("`{0}` mixes CPU devices and GPUs; a gang runs on one kind")]
    Mixed(String),
    /// The same GPU twice.
    #[error("`{list}` names cuda:{index} twice; a rank needs a GPU of its own (tests may share one: {SHARE_GPUS}=1)")]
    Twice {
        /// As written.
        list: String,
        /// The GPU.
        index: u32,
    },
    /// A number that is out of range.
    #[error("{what} must be between 1 and {max}, not {value}")]
    Range {
        /// The flag.
        what: &'static str,
        /// Largest value.
        max: u64,
        /// What was given.
        value: u64,
    },
    /// `--gpus` beside `--devices`.
    #[error("give either --gpus or --devices, not both")]
    Both,
    /// Fewer GPUs than asked for.
    #[error(
        "cuda:{index} was asked for, but there are {found} GPU(s): those with a device node (/dev/nvidia0, /dev/nvidia1, and so on) that the driver knows (/proc/driver/nvidia/gpus). `ramtorch doctor` checks both; a container must be given its devices"
    )]
    NoSuchGpu {
        /// The first that is missing.
        index: u32,
        /// How many there are.
        found: u32,
    },
    /// The process that asks CUDA failed, or does not know this GPU.
    #[error("cannot use cuda:{index}: {reason}\n(to use the CPU instead, give --devices cpu)")]
    GpuUnusable {
        /// The GPU.
        index: u32,
        /// What it said.
        reason: String,
    },
}

impl DeviceError {
    /// Whether the machine lacks something, rather than the request making no sense.
    pub fn is_shortage(&self) -> bool {
        matches!(self, DeviceError::NoSuchGpu { .. } | DeviceError::GpuUnusable { .. })
    }
}

/// Most CPU devices: beyond this a typing error is likelier than a wish.
const CPU_DEVICES_MAX: u64 = 256;

/// What the machine offers; a parameter of [`choose`] so that it can be tested.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// Models of the GPUs, in the order of the PCI bus.
    pub gpus: Vec<String>,
    /// CPU threads.
    pub cores: usize,
    /// Bytes available now.
    pub memory_available: u64,
}

impl Host {
    /// This machine.
    pub fn probe() -> Host {
        Host {
            gpus: gpus(Path::new("/proc/driver/nvidia/gpus"), Path::new("/dev")),
            cores: node::cores(),
            memory_available: node::memory().available,
        }
    }
}

/// Models of the GPUs that the driver shows, ordered by PCI bus, which is the order of CUDA_DEVICE_ORDER=PCI_BUS_ID.
fn gpus(proc: &Path, dev: &Path) -> Vec<String> {
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    };
    let by_bus = names(proc);
    // In a container /proc may show every GPU of the host, /dev only those that were handed in.
    let nodes = names(dev).iter().filter(|n| n.strip_prefix("nvidia").is_some_and(|d| d.parse::<u32>().is_ok())).count();
    if by_bus.is_empty() {
        return vec!["NVIDIA GPU".into(); nodes];
    }
    let visible = if nodes == 0 { 0 } else { by_bus.len().min(nodes) };
    let model = |bus: &String| {
        let text = std::fs::read_to_string(proc.join(bus).join("information")).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("Model:")).map_or_else(|| "NVIDIA GPU".into(), |m| m.trim().to_string())
    };
    by_bus.iter().take(visible).map(model).collect()
}

/// Works out the devices from what was asked for and what there is.
///
/// CPU devices share the cores evenly (at least one thread each). Without `memory_bytes`, CPU devices share half of
/// the memory available now; the other half is for parameter stores. Of a GPU's memory, as `ask_gpus` tells it (it is
/// asked only where GPUs are wanted), a small part is left to the driver.
///
/// # Errors
/// A request that is malformed or that this machine cannot meet.
pub fn choose(
    request: &DeviceRequest,
    host: &Host,
    ask_gpus: impl FnOnce() -> Result<Vec<GpuSeen>, String>,
) -> Result<Inventory, DeviceError> {
    if request.devices.is_some() && request.gpus.is_some_and(|n| n > 0) {
        return Err(DeviceError::Both);
    }
    if request.threads == Some(0) {
        return Err(DeviceError::Range { what: "--threads", max: 4096, value: 0 });
    }
    let threads = request.threads.unwrap_or(host.cores).clamp(1, 4096);
    let found = u32::try_from(host.gpus.len()).unwrap_or(u32::MAX);
    let (wanted, why) = match (&request.devices, request.gpus) {
        (Some(list), _) => (parse(list, request.share_gpus)?, String::new()),
        (None, Some(0)) => (Wanted::Cpu(1), String::new()),
        (None, Some(n)) => (Wanted::Cuda((0..n).collect()), String::new()),
        (None, None) if found > 0 => (Wanted::Cuda((0..found).collect()), String::new()),
        (None, None) => (Wanted::Cpu(1), "no GPU found: ".into()),
    };
    match wanted {
        Wanted::Cpu(count) => {
            let each = (threads / count as usize).max(1);
            let memory = request.memory_bytes.unwrap_or(host.memory_available / 2 / u64::from(count));
            let device = |index| Device {
                spec: DeviceSpec { kind: DeviceKind::Cpu, index, threads: each, memory_bytes: memory, bus_id: None },
                model: format!("CPU, {each} thread(s)"),
            };
            let note = format!("{why}{count} CPU device(s), {each} thread(s) and {} each", node::human_bytes(memory));
            Ok(Inventory { devices: (0..count).map(device).collect(), note })
        }
        Wanted::Cuda(list) => {
            if let Some(&index) = list.iter().find(|i| **i >= found) {
                return Err(DeviceError::NoSuchGpu { index, found });
            }
            let each = (threads / list.len().max(1)).max(1);
            let seen = ask_gpus();
            let device = |&index: &u32| -> Result<Device, DeviceError> {
                let unusable = |reason: &str| DeviceError::GpuUnusable { index, reason: reason.to_string() };
                let gpu = seen.as_ref().map_err(|e| unusable(e))?.iter().find(|g| g.index == index);
                let gpu = gpu.ok_or_else(|| unusable("CUDA does not show it, or it is too old"))?;
                let sharers = list.iter().filter(|i| **i == index).count() as u64;
                let most = usable(gpu.memory_bytes) / sharers;
                let memory_bytes = request.memory_bytes.map_or(most, |wanted| wanted.min(most));
                let spec = DeviceSpec { kind: DeviceKind::Cuda, index, threads: each, memory_bytes, bus_id: Some(gpu.bus_id.clone()) };
                Ok(Device { spec, model: host.gpus[index as usize].clone() })
            };
            let devices = list.iter().map(device).collect::<Result<Vec<_>, _>>()?;
            let least = devices.iter().map(|d| d.spec.memory_bytes).min().unwrap_or(0);
            let shared = if are_shared(&devices) { "; several are one GPU, for tests" } else { "" };
            let note = format!("{} GPU(s) with {} each for plans, {each} CPU thread(s) each{shared}", list.len(), node::human_bytes(least));
            Ok(Inventory { devices, note })
        }
    }
}

/// Whether one of them is a part of a GPU only.
pub fn are_shared(devices: &[Device]) -> bool {
    let gpus = || devices.iter().map(|d| &d.spec).filter(|s| s.kind == DeviceKind::Cuda);
    gpus().any(|a| gpus().filter(|b| b.index == a.index).count() > 1)
}

/// What plans may use of a GPU's memory. They count the driver's context and the libraries; what the driver keeps for the
/// whole GPU, and a display, is left out.
fn usable(total: u64) -> u64 {
    total.saturating_sub((total / 128).clamp(256 << 20, 1 << 30))
}

#[derive(Debug, PartialEq)]
enum Wanted {
    Cpu(u32),
    Cuda(Vec<u32>),
}

fn parse(list: &str, share_gpus: bool) -> Result<Wanted, DeviceError> {
    let syntax = || DeviceError::Syntax(list.to_string());
    let parts: Vec<&str> = list.split(',').map(str::trim).collect();
    let is_cpu = |p: &&str| *p == "cpu" || p.starts_with("cpu:");
    if parts.iter().any(is_cpu) {
        let [one] = parts[..] else {
            return Err(if parts.iter().all(is_cpu) { syntax() } else { DeviceError::Mixed(list.to_string()) });
        };
        let Some(count) = one.strip_prefix("cpu:") else { return Ok(Wanted::Cpu(1)) };
        let value: u64 = count.parse().map_err(|_| syntax())?;
        return match u32::try_from(value) {
            Ok(n) if (1..=CPU_DEVICES_MAX).contains(&value) => Ok(Wanted::Cpu(n)),
            _ => Err(DeviceError::Range { what: "the number of CPU devices", max: CPU_DEVICES_MAX, value }),
        };
    }
    let mut indices = Vec::new();
    for part in parts {
        let index: u32 = part.strip_prefix("cuda:").ok_or_else(syntax)?.parse().map_err(|_| syntax())?;
        if indices.contains(&index) && !share_gpus {
            return Err(DeviceError::Twice { list: list.to_string(), index });
        }
        indices.push(index);
    }
    Ok(Wanted::Cuda(indices))
}

/// Reads a byte count: digits, with `K`, `M`, `G` or `T` (powers of 1024; `KiB` and so on too) after them.
///
/// # Errors
/// Text for the user.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let bad = || format!("`{text}` is no byte count; write for example 8589934592, 8GiB or 8G");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic()).trim_end();
    let shift = match text[digits.len()..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(bad()),
    };
    let value: u64 = digits.parse().map_err(|_| bad())?;
    value.checked_mul(1 << shift).filter(|v| *v > 0).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn choose(request: &DeviceRequest, host: &Host) -> Result<Inventory, DeviceError> {
        super::choose(request, host, || Ok((0..host.gpus.len() as u32).map(gpu).collect()))
    }

    /// Addresses that are not in the order of ordinals.
    fn gpu(index: u32) -> GpuSeen {
        GpuSeen { index, memory_bytes: 80 << 30, bus_id: format!("0000:{:02x}:00.0", 0x90 - index) }
    }

    fn host(gpus: usize) -> Host {
        Host { gpus: vec!["H100".into(); gpus], cores: 8, memory_available: 64 << 30 }
    }

    fn ask(devices: &str) -> DeviceRequest {
        DeviceRequest { devices: Some(devices.into()), memory_bytes: Some(1 << 30), ..Default::default() }
    }

    #[test]
    fn without_gpus_and_flags_there_is_one_cpu_device_and_it_says_so() {
        let i = choose(&DeviceRequest::default(), &host(0)).unwrap();
        assert_eq!(i.devices.len(), 1);
        assert_eq!(i.devices[0].spec, DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 8, memory_bytes: 32 << 30, bus_id: None });
        assert!(i.note.starts_with("no GPU found"), "{}", i.note);
    }

    #[test]
    fn gpus_share_the_cores() {
        let i = choose(&DeviceRequest { gpus: Some(4), ..Default::default() }, &Host { cores: 64, ..host(4) }).unwrap();
        assert_eq!(i.devices.iter().map(|d| (d.spec.index, d.spec.threads)).collect::<Vec<_>>(), [(0, 16), (1, 16), (2, 16), (3, 16)]);
    }

    #[test]
    fn cpu_devices_share_cores_and_memory() {
        let request = DeviceRequest { devices: Some("cpu:3".into()), ..Default::default() };
        let i = choose(&request, &host(2)).unwrap();
        let threads: Vec<_> = i.devices.iter().map(|d| d.spec.threads).collect();
        assert_eq!(threads, [2, 2, 2]);
        assert!(i.devices.iter().map(|d| d.spec.memory_bytes).sum::<u64>() <= 32 << 30);
        let many = choose(&ask("cpu:100"), &host(0)).unwrap();
        assert_eq!(many.devices[99].spec.threads, 1);
    }

    #[test]
    fn gpus_are_chosen_by_number_or_by_name() {
        let names = |r: &DeviceRequest| choose(r, &host(4)).map(|i| i.devices.iter().map(|d| d.spec.to_string()).collect::<Vec<_>>());
        let by_number = DeviceRequest { gpus: Some(2), memory_bytes: Some(1), ..Default::default() };
        assert_eq!(names(&by_number).unwrap(), ["cuda:0", "cuda:1"]);
        assert_eq!(names(&ask("cuda:3, cuda:1")).unwrap(), ["cuda:3", "cuda:1"]);
        let memory = |r: &DeviceRequest| choose(r, &host(1)).unwrap().devices[0].spec.memory_bytes;
        assert_eq!(memory(&DeviceRequest { memory_bytes: None, ..ask("cuda:0") }), (80 << 30) - (640 << 20));
        assert_eq!(memory(&ask("cuda:0")), 1 << 30);
        assert_eq!(names(&ask("cuda:4")).unwrap_err(), DeviceError::NoSuchGpu { index: 4, found: 4 });
        assert!(matches!(names(&ask("cuda:1,cuda:1")), Err(DeviceError::Twice { index: 1, .. })));
        let shared = |devices: &str| DeviceRequest { memory_bytes: None, share_gpus: true, ..ask(devices) };
        assert_eq!(names(&shared("cuda:0,cuda:1,cuda:0")).unwrap(), ["cuda:0", "cuda:1", "cuda:0"]);
        assert_eq!(memory(&shared("cuda:0,cuda:0")), ((80 << 30) - (640 << 20)) / 2, "half of what it has alone");
        assert!(choose(&shared("cuda:0,cuda:0"), &host(1)).unwrap().note.contains("several are one GPU"));
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in ["", "gpu", "cpu:x", "cpu,cpu", "cuda", "cuda:", "cuda:-1", "cpu:1,"] {
            assert!(choose(&ask(bad), &host(8)).is_err(), "{bad:?}");
        }
        assert!(matches!(choose(&ask("cpu,cuda:0"), &host(8)), Err(DeviceError::Mixed(_))));
        assert!(matches!(choose(&ask("cpu:0"), &host(8)), Err(DeviceError::Range { .. })));
        assert_eq!(choose(&DeviceRequest { gpus: Some(1), ..ask("cpu") }, &host(8)), Err(DeviceError::Both));
        let e = super::choose(&ask("cuda:0"), &host(1), || Err("libcuda.so.1 cannot be opened".into())).unwrap_err();
        assert!(e.is_shortage() && e.to_string().contains("libcuda.so.1"), "{e}");
        let e = super::choose(&ask("cuda:1"), &host(2), || Ok(vec![gpu(0)])).unwrap_err();
        assert!(e.to_string().contains("cuda:1: CUDA does not show it"), "{e}");
        // One that CUDA shows and this program cannot use does not shift the others.
        let i = super::choose(&ask("cuda:1"), &host(2), || Ok(vec![gpu(1)])).unwrap();
        assert_eq!(i.devices[0].spec.bus_id.as_deref(), Some("0000:8f:00.0"));
        // Nobody loads CUDA for the CPU.
        super::choose(&ask("cpu:2"), &host(2), || unreachable!()).unwrap();
    }

    #[test]
    fn gpus_are_counted_from_proc_and_dev() {
        let dir = tempfile::tempdir().unwrap();
        let (proc, dev) = (dir.path().join("gpus"), dir.path().join("dev"));
        std::fs::create_dir_all(&dev).unwrap();
        assert_eq!(gpus(&proc, &dev), Vec::<String>::new());
        for (bus, model) in [("0000:b0:00.0", "B"), ("0000:10:00.0", "A")] {
            std::fs::create_dir_all(proc.join(bus)).unwrap();
            std::fs::write(proc.join(bus).join("information"), format!("Model: \t {model}\nIRQ: 1\n")).unwrap();
        }
        assert!(gpus(&proc, &dev).is_empty(), "no device node, no GPU");
        for node in ["nvidia0", "nvidiactl", "nvidia-uvm"] {
            std::fs::write(dev.join(node), "").unwrap();
        }
        assert_eq!(gpus(&proc, &dev), ["A"]);
        std::fs::write(dev.join("nvidia1"), "").unwrap();
        assert_eq!(gpus(&proc, &dev), ["A", "B"]);
    }

    #[test]
    fn byte_counts_take_suffixes() {
        assert_eq!(parse_bytes("123"), Ok(123));
        assert_eq!(parse_bytes("8GiB"), Ok(8 << 30));
        assert_eq!(parse_bytes("2 k"), Ok(2048));
        for bad in ["", "0", "-1", "1.5G", "8GB2", "99999999T", "G"] {
            assert!(parse_bytes(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_request_panics_and_every_choice_keeps_its_promises(text in "[cpuda:0-9, ]{0,12}", gpus in 0usize..9, cores in 1usize..300) {
            let host = Host { gpus: vec!["G".into(); gpus], cores, memory_available: 1 << 36 };
            if let Ok(i) = choose(&ask(&text), &host) {
                prop_assert!(!i.devices.is_empty());
                prop_assert!(i.devices.iter().all(|d| d.spec.threads >= 1));
                let names: std::collections::HashSet<_> = i.devices.iter().map(|d| d.spec.to_string()).collect();
                prop_assert_eq!(names.len(), i.devices.len());
            }
            let _ = parse_bytes(&text);
        }
    }
}
