//! Finding the CUDA libraries at run time.
//!
//! The binary links none of them. They are opened by bare name (`libcublasLt.so.13`), so their folders must be on
//! `LD_LIBRARY_PATH` when the process starts:
//!
//! ```text
//!   process starts ──all found──────────────────────────► goes on
//!        │ something missing, and a folder has it
//!        └─► exec of itself, LD_LIBRARY_PATH extended, RAMTORCH_CUDA_LIBRARIES_SET=1 ──► goes on (never twice)
//! ```
//!
//! Folders, in order: `RAMTORCH_CUDA_LIBRARIES` (a list like PATH), what `LD_LIBRARY_PATH` has, `CUDA_HOME` and
//! `CUDA_PATH`, the active Python environment, `/usr/local/cuda*`, the container runtime's driver folder, and the
//! Python environments of the system. NCCL is opened by its path in one of them, and only where several GPUs work on one job
//! (`peers/nccl.rs`). Wheels (`nvidia-cublas`, `nvidia-cuda-nvrtc`, `nvidia-cudnn-cu13`) are as good as a toolkit.

use ramtorch_device::{EngineError, ErrorKind};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

/// Set in the process that was started again; it is not started a third time.
const GUARD: &str = "RAMTORCH_CUDA_LIBRARIES_SET";
/// Folders of the user's choice.
const CHOICE: &str = "RAMTORCH_CUDA_LIBRARIES";

struct Library {
    /// Start of the file's name.
    file: &'static str,
    /// What it is for, and where it comes from.
    help: &'static str,
    required: bool,
    present: fn() -> bool,
    /// (found, least) as major · 1000 + minor · 10, when it can be asked without a GPU.
    version: fn() -> Option<(u64, u64)>,
    /// Major version of CUDA that it is made for. The driver's own is no limit to itself.
    made_for: fn() -> Option<u64>,
}

fn present_cuda() -> bool {
    // SAFETY: opens and closes a library by name.
    unsafe { cudarc::driver::sys::is_culib_present() }
}
fn present_nvrtc() -> bool {
    // SAFETY: as above.
    unsafe { cudarc::nvrtc::sys::is_culib_present() }
}
fn present_cublaslt() -> bool {
    // SAFETY: as above.
    unsafe { cudarc::cublaslt::sys::is_culib_present() }
}
/// Whether cuDNN can be opened. Without it attention runs on this crate's own kernels.
pub(crate) fn present_cudnn() -> bool {
    // SAFETY: as above.
    unsafe { cudarc::cudnn::sys::is_culib_present() }
}

fn driver_version() -> Option<(u64, u64)> {
    let mut v = 0i32;
    // SAFETY: the library is present (asked first); writes one integer.
    let ok = unsafe { cudarc::driver::sys::cuDriverGetVersion(&mut v) } == cudarc::driver::sys::CUresult::CUDA_SUCCESS;
    ok.then_some((v.max(0) as u64, 12000))
}
/// NVRTC's version, major · 1000 + minor · 10.
pub(crate) fn nvrtc_version() -> Option<(u64, u64)> {
    let (mut major, mut minor) = (0i32, 0i32);
    // SAFETY: the library is present (asked first); writes two integers.
    let ok = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) } == cudarc::nvrtc::sys::nvrtcResult::NVRTC_SUCCESS;
    ok.then_some((major as u64 * 1000 + minor as u64 * 10, 12000))
}
fn cublaslt_version() -> Option<(u64, u64)> {
    // SAFETY: the library is present (asked first). Answers major · 10000 + minor · 100 + patch.
    let v = unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() } as u64;
    Some((v / 10000 * 1000 + v / 100 % 100 * 10, 12000))
}
fn cudnn_version() -> Option<(u64, u64)> {
    // SAFETY: the library is present (asked first). Answers major · 10000 + minor · 100 + patch (from version 9 on).
    let v = unsafe { cudarc::cudnn::sys::cudnnGetVersion() } as u64;
    Some((v / 10000 * 1000 + v / 100 % 100 * 10, 9000))
}
fn nvrtc_made_for() -> Option<u64> {
    nvrtc_version().map(|v| v.0 / 1000)
}
fn cublaslt_made_for() -> Option<u64> {
    cublaslt_version().map(|v| v.0 / 1000)
}
fn cudnn_made_for() -> Option<u64> {
    // SAFETY: the library is present (asked first). Answers major · 1000 + minor · 10 of the CUDA run time inside of it.
    let v = unsafe { cudarc::cudnn::sys::cudnnGetCudartVersion() } as u64;
    (v >= 1000).then_some(v / 1000)
}

const LIBRARIES: [Library; 4] = [
    Library {
        file: "libcuda.so",
        help: "the NVIDIA driver; install it, or start the container with GPU access",
        required: true,
        present: present_cuda,
        version: driver_version,
        made_for: || None,
    },
    Library {
        file: "libnvrtc.so",
        help: "the CUDA run-time compiler; from the CUDA toolkit or the Python package nvidia-cuda-nvrtc",
        required: true,
        present: present_nvrtc,
        version: nvrtc_version,
        made_for: nvrtc_made_for,
    },
    Library {
        file: "libcublasLt.so",
        help: "matrix products; from the CUDA toolkit or the Python package nvidia-cublas",
        required: true,
        present: present_cublaslt,
        version: cublaslt_version,
        made_for: cublaslt_made_for,
    },
    Library {
        file: "libcudnn.so",
        help: "fast attention; from the cuDNN package or the Python package nvidia-cudnn-cu13",
        required: false,
        present: present_cudnn,
        version: cudnn_version,
        made_for: cudnn_made_for,
    },
];

/// Existing folders that match `pattern`, whose components may hold one `*` each; names that sort higher come first, so
/// that of several versions the newest wins.
fn folders(pattern: &str) -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("/")];
    for part in pattern.split('/').filter(|p| !p.is_empty()) {
        found = match part.split_once('*') {
            None => found.into_iter().map(|p| p.join(part)).filter(|p| p.exists()).collect(),
            Some((before, after)) => found
                .into_iter()
                .flat_map(|p| {
                    let mut names: Vec<String> = std::fs::read_dir(&p)
                        .map(|d| d.flatten().filter_map(|e| e.file_name().into_string().ok()).collect())
                        .unwrap_or_default();
                    names.retain(|n| n.len() >= before.len() + after.len() && n.starts_with(before) && n.ends_with(after));
                    names.sort_by(|a, b| b.cmp(a));
                    names.into_iter().map(move |n| p.join(n))
                })
                .collect(),
        };
    }
    found
}

fn holds_library(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|d| {
        d.flatten().any(|e| {
            let name = e.file_name();
            let name = name.to_string_lossy();
            LIBRARIES.iter().map(|l| l.file).chain(["libnccl.so"]).any(|f| name.starts_with(f))
        })
    })
}

/// Folders that hold one of the libraries, in the order in which they are to be searched.
pub(crate) fn search_folders() -> Vec<PathBuf> {
    let list = |name: &str| std::env::var_os(name).map(|v| std::env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
    let mut all: Vec<PathBuf> = list(CHOICE);
    all.extend(list("LD_LIBRARY_PATH"));
    for home in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|v| std::env::var(v).ok()) {
        all.extend(["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|s| Path::new(&home).join(s)));
    }
    for home in ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(|v| std::env::var(v).ok()) {
        all.extend(folders(&format!("{home}/lib/python3*/site-packages/nvidia/*/lib")));
        all.push(Path::new(&home).join("lib"));
    }
    for pattern in ["/usr/local/nvidia/lib64", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*-linux/lib"] {
        all.extend(folders(pattern));
    }
    let home = std::env::var("HOME").unwrap_or_default();
    for site in [
        "/opt/*/.venv/lib/python3*/site-packages",
        "/opt/*/lib/python3*/site-packages",
        "/usr/local/lib/python3*/dist-packages",
        "/usr/local/lib/python3*/site-packages",
        "/usr/lib/python3/dist-packages",
    ]
    .into_iter()
    .map(String::from)
    .chain((!home.is_empty()).then(|| format!("{home}/.local/lib/python3*/site-packages")))
    {
        all.extend(folders(&format!("{site}/nvidia/*/lib")));
    }
    let mut seen = Vec::new();
    all.retain(|p| {
        let key = std::fs::canonicalize(p).unwrap_or_else(|_| p.clone());
        let fresh = !seen.contains(&key) && holds_library(p);
        seen.push(key);
        fresh
    });
    all
}

/// The value of `LD_LIBRARY_PATH` with which all CUDA libraries of this machine are found, or `None` where no folder
/// would be added to the present one.
pub fn library_path_environment() -> Option<OsString> {
    let present = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let before: Vec<PathBuf> = std::env::split_paths(&present).filter(|p| !p.as_os_str().is_empty()).collect();
    let mut all = before.clone();
    // The user's choice goes first; everything else after what is there.
    let choice: Vec<PathBuf> = std::env::var_os(CHOICE).map(|v| std::env::split_paths(&v).collect()).unwrap_or_default();
    for (i, folder) in choice.iter().filter(|p| !before.contains(p) && !p.as_os_str().is_empty()).enumerate() {
        all.insert(i, folder.clone());
    }
    for folder in search_folders() {
        if !all.contains(&folder) {
            all.push(folder);
        }
    }
    if all == before {
        return None;
    }
    std::env::join_paths(all).ok()
}

/// Starts this process again with `LD_LIBRARY_PATH` extended, if a library cannot be opened and a folder has more of them.
/// Returns where nothing is to be done: all found, no driver on this machine, or started again already. Call it
/// first thing in `main`, before threads exist.
///
/// # Errors
/// When the program cannot be started again.
pub fn ensure_libraries() -> Result<(), EngineError> {
    if std::env::var_os(GUARD).is_some() || LIBRARIES.iter().all(|l| (l.present)()) {
        return Ok(());
    }
    let driver = present_cuda() || search_folders().iter().any(|f| f.join("libcuda.so.1").exists());
    let Some(path) = library_path_environment().filter(|_| driver) else {
        return Ok(());
    };
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("ramtorch"));
    let failure =
        std::process::Command::new("/proc/self/exe").arg0(name).args(arguments).env("LD_LIBRARY_PATH", path).env(GUARD, "1").exec();
    Err(EngineError::internal(format!("cannot start this program again with the folders of the CUDA libraries: {failure}")))
}

/// What is wrong with a library for one major version of CUDA under a driver for another. A driver runs what was made for it and
/// for all versions before it; what is newer fails only later, in its first kernel, with an error that does not say why.
fn too_new(file: &str, place: Option<&Path>, made_for: u64, driver: u64) -> Option<String> {
    (made_for > driver).then(|| {
        let place = place.map_or_else(String::new, |p| format!(" ({})", p.display()));
        format!(
            "{file}{place} is made for CUDA {made_for}, and the driver supports CUDA {driver}: install the one for CUDA {driver}, whose folder {CHOICE} can name, or a driver for CUDA {made_for}"
        )
    })
}

/// Where a library was opened from, out of a process's memory map.
fn opened_from(maps: &str, file: &str) -> Option<PathBuf> {
    let path = |line: &str| line.find('/').map(|at| PathBuf::from(line[at..].trim_end()));
    maps.lines().filter_map(path).find(|p| p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with(file)))
}

/// Checks that the libraries can be opened, are new enough, and not too new for the driver.
///
/// # Errors
/// One message that names each library that is missing, too old or too new, and the folders that were searched.
pub(crate) fn check() -> Result<(), EngineError> {
    let mut problems = Vec::new();
    let driver = if present_cuda() { driver_version().map(|v| v.0 / 1000) } else { None };
    for l in LIBRARIES.iter() {
        if !(l.present)() {
            if l.required {
                problems.push(format!("{} cannot be opened: {}", l.file, l.help));
            }
        } else if let Some((found, least)) = (l.version)().filter(|(found, least)| found < least) {
            let show = |v: u64| format!("{}.{}", v / 1000, v % 1000 / 10);
            problems.push(format!("{} has version {}, {} or later is needed: {}", l.file, show(found), show(least), l.help));
        } else if let (Some(made_for), Some(driver)) = ((l.made_for)(), driver) {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
            problems.extend(too_new(l.file, opened_from(&maps, l.file).as_deref(), made_for, driver));
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    let folders = search_folders();
    let searched = if folders.is_empty() {
        "no folder with CUDA libraries was found".to_owned()
    } else {
        format!("folders searched: {}", folders.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", "))
    };
    Err(EngineError::new(
        ErrorKind::Resources,
        format!(
            "CUDA cannot be used: {}. Searched: the system's library folders, LD_LIBRARY_PATH; {searched}. {CHOICE} adds folders",
            problems.join("; ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_folders_newest_first() {
        let root = std::env::temp_dir().join(format!("ramtorch-folders-{}", std::process::id()));
        for f in ["cuda-12.4/lib64", "cuda-13.0/lib64", "cudo/lib64", "cuda-12.9/other"] {
            std::fs::create_dir_all(root.join(f)).unwrap();
        }
        let found = folders(&format!("{}/cuda*/lib64", root.display()));
        assert_eq!(found, [root.join("cuda-13.0/lib64"), root.join("cuda-12.4/lib64")]);
        assert!(folders(&format!("{}/none*/lib64", root.display())).is_empty());
        std::fs::write(root.join("cuda-13.0/lib64/libnvrtc.so.13"), "").unwrap();
        assert!(holds_library(&root.join("cuda-13.0/lib64")));
        assert!(!holds_library(&root.join("cuda-12.4/lib64")));
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn libraries_may_be_as_new_as_the_driver() {
        for (made_for, driver, good) in [(12, 12, true), (12, 13, true), (13, 13, true), (13, 12, false), (14, 12, false)] {
            assert_eq!(too_new("libnvrtc.so", None, made_for, driver).is_none(), good, "CUDA {made_for} under {driver}");
        }
        let place = Path::new("/opt/v/nvidia/cu13/lib/libcublasLt.so.13");
        let text = too_new("libcublasLt.so", Some(place), 13, 12).unwrap();
        for part in ["libcublasLt.so (/opt/v/nvidia/cu13/lib/libcublasLt.so.13)", "made for CUDA 13", "install the one for CUDA 12", CHOICE]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn the_memory_map_tells_where_a_library_is() {
        let maps = "55d0-55d1 r-xp 00000000 08:01 11   /usr/bin/x\n\
                    7f00-7f01 rw-p 00000000 00:00 0 \n\
                    7f02-7f03 r--p 00000000 08:01 12                         /opt/my libs/libnvrtc-builtins.so.13.0\n\
                    7f04-7f05 r--p 00000000 08:01 13                         /opt/my libs/libnvrtc.so.13\n";
        assert_eq!(opened_from(maps, "libnvrtc.so"), Some(PathBuf::from("/opt/my libs/libnvrtc.so.13")));
        assert_eq!(opened_from(maps, "libcudnn.so"), None);
        assert_eq!(opened_from("", "libcudnn.so"), None);
    }

    #[test]
    fn message_names_what_is_missing() {
        if let Err(e) = check() {
            assert_eq!(e.kind, ErrorKind::Resources);
            assert!(e.message.contains("lib") && e.message.contains("earched"), "{e}");
        }
    }
}
