//! Finding the CUDA libraries at run time.
//!
//! The binary links none of them. They are opened by bare name (`libcublasLt.so`, then `libcublasLt.so.13`), so their folders
//! must be on `LD_LIBRARY_PATH` when the process starts, and the one that is wanted must be the first that is found:
//!
//! ```text
//!   process starts ──each the one that is wanted────────► goes on
//!        │ the loader gives none, or another one (`choice.rs`)
//!        └─► exec of itself: a folder of links in front of LD_LIBRARY_PATH, RAMTORCH_CUDA_LIBRARIES_SET=1 ──► goes on (never twice)
//! ```
//!
//! Wanted is the first in the order of the search that is new enough, and not made for a newer CUDA than the driver's. Folders,
//! in order: `RAMTORCH_CUDA_LIBRARIES` (a list like PATH), what `LD_LIBRARY_PATH` has, the system's own, `CUDA_HOME` and
//! `CUDA_PATH`, the active Python environment, the container runtime's driver folder, `/usr/local/cuda*`, and the Python
//! environments of the system (`search.rs`). NCCL is opened by its path in one of them, and only where several GPUs work on one
//! job (`peers/nccl.rs`). Wheels (`nvidia-cublas`, `nvidia-cuda-nvrtc`, `nvidia-cudnn-cu13`) are as good as a toolkit.

mod choice;
mod search;

pub(crate) use choice::place_of;
pub(crate) use search::{search_folders, searched};

use ramtorch_device::{EngineError, ErrorKind};
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

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
fn present_cudnn() -> bool {
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
/// cuBLASLt's major · 10000 + minor · 100 + patch, as major · 1000 + minor · 10.
fn cublaslt_number(v: u64) -> u64 {
    v / 10000 * 1000 + v / 100 % 100 * 10
}
fn cublaslt_version() -> Option<(u64, u64)> {
    // SAFETY: the library is present (asked first).
    Some((cublaslt_number(unsafe { cudarc::cublaslt::sys::cublasLtGetVersion() } as u64), 12000))
}
/// cuDNN's number, as major · 1000 + minor · 10: 90201 is 9.2.1, and 8907 is 8.9.7, since versions before 9 count in thousands.
fn cudnn_number(v: u64) -> u64 {
    if v < 10000 { v / 1000 * 1000 + v / 100 % 10 * 10 } else { v / 10000 * 1000 + v / 100 % 100 * 10 }
}
/// Major version of the CUDA run time inside of cuDNN, which says major · 1000 + minor · 10.
fn cudnn_runtime(v: u64) -> Option<u64> {
    (v >= 1000).then_some(v / 1000)
}
fn cudnn_version() -> Option<(u64, u64)> {
    // SAFETY: the library is present (asked first).
    Some((cudnn_number(unsafe { cudarc::cudnn::sys::cudnnGetVersion() } as u64), 9000))
}
fn nvrtc_made_for() -> Option<u64> {
    nvrtc_version().map(|v| v.0 / 1000)
}
fn cublaslt_made_for() -> Option<u64> {
    cublaslt_version().map(|v| v.0 / 1000)
}
fn cudnn_made_for() -> Option<u64> {
    // SAFETY: the library is present (asked first).
    cudnn_runtime(unsafe { cudarc::cudnn::sys::cudnnGetCudartVersion() } as u64)
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

/// The value of `LD_LIBRARY_PATH` with which the wanted files are found: links first, then the user's choice, then what there is,
/// then everything else.
fn library_path(outcome: &choice::Outcome) -> Result<OsString, std::env::JoinPathsError> {
    let list = |name: &str| std::env::var_os(name).map(|v| std::env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
    let mut all = outcome.first.clone();
    let rest = list(CHOICE).into_iter().chain(list("LD_LIBRARY_PATH")).chain(search_folders()).chain(outcome.also.iter().cloned());
    for folder in rest.filter(|p| !p.as_os_str().is_empty()) {
        if !all.contains(&folder) {
            all.push(folder);
        }
    }
    std::env::join_paths(all)
}

/// Starts this process again with another `LD_LIBRARY_PATH`, if the loader finds a library nowhere, or another file than the one
/// that is wanted. Returns where nothing is to be done: each is the wanted one, no driver on this machine, or started again
/// already. Call it first thing in `main`, before threads exist.
///
/// # Errors
/// When the program cannot be started again.
pub fn ensure_libraries() -> Result<(), EngineError> {
    if std::env::var_os(GUARD).is_some() {
        return Ok(());
    }
    let Some(outcome) = choice::decide().filter(|o| !o.is_nothing()) else { return Ok(()) };
    let again = |e: &dyn std::fmt::Display| {
        EngineError::internal(format!("cannot start this program again with the folders of the CUDA libraries: {e}"))
    };
    let path = library_path(&outcome).map_err(|e| again(&e))?;
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| OsString::from("ramtorch"));
    let failure =
        std::process::Command::new("/proc/self/exe").arg0(name).args(arguments).env("LD_LIBRARY_PATH", path).env(GUARD, "1").exec();
    Err(again(&failure))
}

/// What a library says of itself, and where it was opened from.
struct Found<'a> {
    place: Option<&'a Path>,
    /// (found, least) as major · 1000 + minor · 10.
    version: Option<(u64, u64)>,
    made_for: Option<u64>,
}

/// Why a library cannot be used, if so. A driver runs what was made for its own version of CUDA and for all versions before it;
/// what is newer fails only later, in its first kernel, with an error that does not say why.
fn unsuitable(file: &str, help: &str, found: &Found, driver: Option<u64>) -> Option<String> {
    let place = found.place.map_or_else(String::new, |p| format!(" ({})", p.display()));
    if let Some((version, least)) = found.version.filter(|(version, least)| version < least) {
        let show = |v: u64| format!("{}.{}", v / 1000, v % 1000 / 10);
        return Some(format!("{file}{place} has version {}, {} or later is needed: {help}", show(version), show(least)));
    }
    let (made_for, driver) = (found.made_for?, driver?);
    (made_for > driver).then(|| {
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

impl Library {
    /// What is wrong with it, if anything.
    fn problem(&self, driver: Option<u64>) -> Option<String> {
        if !(self.present)() {
            return Some(format!("{} cannot be opened: {}", self.file, self.help));
        }
        // Asking for the version opens it for good; so the map is read afterwards.
        let (version, made_for) = ((self.version)(), (self.made_for)());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        unsuitable(self.file, self.help, &Found { place: opened_from(&maps, self.file).as_deref(), version, made_for }, driver)
    }
}

/// The driver's major version of CUDA.
fn driver_cuda() -> Option<u64> {
    if present_cuda() { driver_version().map(|v| v.0 / 1000) } else { None }
}

/// Checks that the libraries that are needed can be opened, are new enough, and not too new for the driver.
///
/// # Errors
/// One message that names each library that is missing, too old or too new, and every place that was searched.
pub(crate) fn check() -> Result<(), EngineError> {
    let driver = driver_cuda();
    let problems: Vec<String> = LIBRARIES.iter().filter(|l| l.required).filter_map(|l| l.problem(driver)).collect();
    if problems.is_empty() {
        return Ok(());
    }
    Err(EngineError::new(ErrorKind::Resources, format!("CUDA cannot be used: {}. {}", problems.join("; "), searched())))
}

/// Whether cuDNN can be used, and if not, why. Without it, or with one that does not suit, attention runs on this crate's own
/// kernels.
pub(crate) fn cudnn() -> Result<(), &'static str> {
    static PROBLEM: OnceLock<Option<String>> = OnceLock::new();
    let problem = || LIBRARIES.iter().find(|l| !l.required).and_then(|l| l.problem(driver_cuda()));
    PROBLEM.get_or_init(problem).as_deref().map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_may_be_as_new_as_the_driver() {
        let found = |made_for| Found { place: None, version: Some((made_for * 1000, 12000)), made_for: Some(made_for) };
        for (made_for, driver, good) in [(12, 12, true), (12, 13, true), (13, 13, true), (13, 12, false), (14, 12, false)] {
            let problem = unsuitable("libnvrtc.so", "help", &found(made_for), Some(driver));
            assert_eq!(problem.is_none(), good, "CUDA {made_for} under {driver}");
        }
        let place = Path::new("/opt/v/nvidia/cu13/lib/libcublasLt.so.13");
        let text = unsuitable("libcublasLt.so", "help", &Found { place: Some(place), ..found(13) }, Some(12)).unwrap();
        for part in ["libcublasLt.so (/opt/v/nvidia/cu13/lib/libcublasLt.so.13)", "made for CUDA 13", "install the one for CUDA 12", CHOICE]
        {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn libraries_that_are_too_old_are_named_with_their_place_and_version() {
        assert_eq!([8907, 8100, 90201, 91900].map(cudnn_number), [8090, 8010, 9020, 9190]);
        assert_eq!([120201, 130100].map(cublaslt_number), [12020, 13010]);
        let place = Path::new("/usr/lib/libcudnn.so.8");
        let found = Found { place: Some(place), version: Some((cudnn_number(8907), 9000)), made_for: Some(12) };
        let text = unsuitable("libcudnn.so", "from a package", &found, Some(12)).unwrap();
        assert_eq!(text, "libcudnn.so (/usr/lib/libcudnn.so.8) has version 8.9, 9.0 or later is needed: from a package");
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
