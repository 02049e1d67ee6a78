//! NCCL's functions, found at run time, and one communicator over them.
//!
//! Types and constants are cudarc's (`cudarc::nccl::sys`). Its functions are not used: they look for `libnccl.so` and not for
//! `libnccl.so.2`, which is the only name that NVIDIA's packages and Python wheels install, and panic where it is missing.
//! Statuses cross as integers, so that one which a later version adds is an error and nothing worse.

use crate::library;
use cudarc::nccl::sys;
use ramtorch_device::{Dtype, EngineError, ErrorKind};
use std::ffi::{CStr, CString, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Oldest version that is used: communicators that do not block, and end when told to.
const LEAST: i32 = 21800;
/// That of the structure in [`config`].
const CONFIG_VERSION: u32 = 22809;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// Thread blocks of a collective, at most: they are taken from the arithmetic beside it. `NCCL_MAX_CTAS` overrides it.
const BLOCKS_MAX: c_int = 8;
const UNDEFINED: c_int = c_int::MIN;

pub(super) const SUCCESS: u32 = sys::ncclResult_t::ncclSuccess as u32;
pub(super) const IN_PROGRESS: u32 = sys::ncclResult_t::ncclInProgress as u32;
/// Bytes of a [`sys::ncclUniqueId`].
pub(super) const ID_BYTES: usize = 128;

type Comm = sys::ncclComm_t;
type Stream = sys::cudaStream_t;

/// The functions that are used.
pub(super) struct Api {
    pub(super) version: i32,
    get_unique_id: unsafe extern "C" fn(*mut sys::ncclUniqueId) -> u32,
    init_rank: unsafe extern "C" fn(*mut Comm, c_int, sys::ncclUniqueId, c_int, *mut sys::ncclConfig_t) -> u32,
    async_error: unsafe extern "C" fn(Comm, *mut u32) -> u32,
    all_gather: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, Comm, Stream) -> u32,
    reduce_scatter: unsafe extern "C" fn(*const c_void, *mut c_void, usize, u32, u32, Comm, Stream) -> u32,
    abort: unsafe extern "C" fn(Comm) -> u32,
    error_string: unsafe extern "C" fn(u32) -> *const std::ffi::c_char,
    last_error: unsafe extern "C" fn(Comm) -> *const std::ffi::c_char,
}

/// Files to try, in order: of the folders with CUDA libraries, then wherever the system looks.
fn candidates() -> Vec<PathBuf> {
    const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
    let folders = library::search_folders();
    let in_folders = folders.iter().flat_map(|f| NAMES.map(|n| f.join(n))).filter(|p| p.exists());
    in_folders.chain(NAMES.map(PathBuf::from)).collect()
}

fn open(path: &Path) -> Result<*mut c_void, String> {
    use std::os::unix::ffi::OsStrExt;
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: a terminated string; NCCL's initialisers have no preconditions.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        return Ok(handle);
    }
    // SAFETY: the message of the failure just now, on this thread.
    let text = unsafe { libc::dlerror() };
    // SAFETY: a terminated string where there is one.
    Err(if text.is_null() { "it cannot be opened".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() })
}

/// The address of `name` as a function of type `F`.
///
/// # Safety
/// `F` is a function pointer of the signature that the library's function of this name has.
unsafe fn symbol<F: Copy>(handle: *mut c_void, name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: an open library and a terminated string.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    if address.is_null() {
        return Err(format!("it has no {}", name.to_string_lossy()));
    }
    // SAFETY: as large as a pointer (checked), and of the right signature (caller).
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

/// Why a file cannot be used. The later ones tell more than those before: a version that is too old says what to do, where the
/// next name to try says only that there is no such file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Lack {
    /// The loader finds no file, or cannot open what it finds.
    File,
    /// A file of a folder that was searched cannot be opened.
    Opening,
    /// It is too old, or lacks a function.
    Content,
}

/// The first candidate that can be used, or of all reasons the one that tells most, the first of several.
fn first<T>(candidates: Vec<PathBuf>, take: impl Fn(&Path) -> Result<T, (Lack, String)>) -> Result<T, String> {
    let mut best: Option<(Lack, String)> = None;
    for path in candidates {
        match take(&path) {
            Ok(found) => return Ok(found),
            Err(e) if best.as_ref().is_none_or(|b| b.0 < e.0) => best = Some(e),
            Err(_) => {}
        }
    }
    Err(best.map_or_else(|| "no file of that name was found".to_owned(), |b| b.1))
}

/// Its functions.
fn functions(handle: *mut c_void) -> Result<Api, String> {
    // SAFETY: the signatures are those of nccl.h, statuses and enumerations as the integers they are.
    unsafe {
        let version: unsafe extern "C" fn(*mut c_int) -> u32 = symbol(handle, c"ncclGetVersion")?;
        let mut v = 0;
        if version(&mut v) != SUCCESS {
            return Err("it does not tell its version".into());
        }
        if v < LEAST {
            // Versions before 2.9 count in thousands.
            let show = |v: i32| match v {
                ..10000 => format!("{}.{}.{}", v / 1000, v / 100 % 10, v % 100),
                _ => format!("{}.{}.{}", v / 10000, v / 100 % 100, v % 100),
            };
            return Err(format!("it has version {}, {} or later is needed", show(v), show(LEAST)));
        }
        Ok(Api {
            version: v,
            get_unique_id: symbol(handle, c"ncclGetUniqueId")?,
            init_rank: symbol(handle, c"ncclCommInitRankConfig")?,
            async_error: symbol(handle, c"ncclCommGetAsyncError")?,
            all_gather: symbol(handle, c"ncclAllGather")?,
            reduce_scatter: symbol(handle, c"ncclReduceScatter")?,
            abort: symbol(handle, c"ncclCommAbort")?,
            error_string: symbol(handle, c"ncclGetErrorString")?,
            last_error: symbol(handle, c"ncclGetLastError")?,
        })
    }
}

fn load() -> Result<Api, String> {
    first(candidates(), |path| {
        let lack = if path.is_absolute() { Lack::Opening } else { Lack::File };
        let handle = open(path).map_err(|e| (lack, e))?;
        let place = library::place_of(handle).unwrap_or_else(|| path.to_path_buf());
        match functions(handle) {
            Ok(api) => {
                tracing::info!("NCCL {} from {}", api.version, place.display());
                Ok(api) // never closed: its threads may live as long as the process
            }
            Err(e) => {
                // Or the next candidate's bare name would give this one again.
                // SAFETY: opened just now; nothing of it is kept.
                unsafe { libc::dlclose(handle) };
                Err((Lack::Content, format!("{}: {e}", place.display())))
            }
        }
    })
}

/// NCCL, opened when first asked for.
///
/// # Errors
/// It is missing or too old; the message says how to get it.
pub(super) fn api() -> Result<&'static Api, EngineError> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    API.get_or_init(load).as_ref().map_err(|e| {
        EngineError::new(
            ErrorKind::Resources,
            format!(
                "several GPUs cannot work on one job: libnccl.so.2 cannot be used: {e}. It comes from the NCCL package or the Python package nvidia-nccl-cu13. {}",
                library::searched()
            ),
        )
    })
}

fn config() -> sys::ncclConfig_t {
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: BLOCKS_MAX,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: std::ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// NCCL's number for a format.
fn data_type(dtype: Dtype) -> u32 {
    match dtype {
        Dtype::F32 => sys::ncclDataType_t::ncclFloat32 as u32,
        Dtype::Bf16 => sys::ncclDataType_t::ncclBfloat16 as u32,
    }
}

impl Api {
    /// A new id; its maker listens for the others from now on.
    pub(super) fn unique_id(&self) -> Result<[u8; ID_BYTES], EngineError> {
        let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
        // SAFETY: writes one id.
        let status = unsafe { (self.get_unique_id)(&mut id) };
        if status != SUCCESS {
            return Err(self.error("ncclGetUniqueId", status, std::ptr::null_mut()));
        }
        Ok(id.internal.map(|c| c as u8))
    }

    /// What `status` means, with what NCCL said last.
    pub(super) fn error(&self, what: &str, status: u32, comm: Comm) -> EngineError {
        let text = |p: *const std::ffi::c_char| {
            // SAFETY: null or a terminated string that NCCL keeps.
            if p.is_null() { String::new() } else { unsafe { CStr::from_ptr(p) }.to_string_lossy().chars().take(300).collect() }
        };
        // SAFETY: any number is answered; a null communicator asks for the thread's last error.
        let (meaning, last) = unsafe { (text((self.error_string)(status)), text((self.last_error)(comm))) };
        let last = if last.is_empty() { String::new() } else { format!(": {}", last.trim()) };
        EngineError::internal(format!("{what}: {meaning} ({status}){last}"))
    }

    /// Begins to connect; [`Api::state`] tells when it is done. `comm` is written to until then, by a thread of NCCL's.
    ///
    /// # Safety
    /// `comm` stays valid until the communicator is aborted.
    pub(super) unsafe fn init(&self, comm: *mut Comm, id: &[u8; ID_BYTES], rank: usize, world: usize) -> u32 {
        let id = sys::ncclUniqueId { internal: id.map(|b| b as std::ffi::c_char) };
        // SAFETY: the configuration is read during the call; `comm` outlives it (caller).
        unsafe { (self.init_rank)(comm, world as c_int, id, rank as c_int, &mut config()) }
    }

    /// Success, in progress, or what went wrong.
    ///
    /// # Safety
    /// `comm` was made and not aborted, and no other call on it is under way.
    pub(super) unsafe fn state(&self, comm: Comm) -> u32 {
        let mut state = SUCCESS;
        // SAFETY: writes one status; the communicator is alive (caller).
        let asked = unsafe { (self.async_error)(comm, &mut state) };
        if asked == SUCCESS { state } else { asked }
    }

    /// Enqueues an all-gather in place: `share` elements of each rank in `buf`.
    ///
    /// # Safety
    /// As [`Api::state`]; `buf` holds a share of each rank and lives until the stream has done it.
    pub(super) unsafe fn all_gather(&self, comm: Comm, buf: u64, rank: usize, share: u64, dtype: Dtype, stream: *mut c_void) -> u32 {
        let own = buf + rank as u64 * share * dtype.size();
        // SAFETY: the caller's.
        unsafe { (self.all_gather)(own as *const c_void, buf as *mut c_void, share as usize, data_type(dtype), comm, stream.cast()) }
    }

    /// Enqueues a reduce-scatter in place.
    ///
    /// # Safety
    /// As [`Api::all_gather`].
    pub(super) unsafe fn reduce_scatter(&self, comm: Comm, buf: u64, rank: usize, share: u64, dtype: Dtype, stream: *mut c_void) -> u32 {
        let own = buf + rank as u64 * share * dtype.size();
        let sum = sys::ncclRedOp_t::ncclSum as u32;
        // SAFETY: the caller's.
        unsafe {
            (self.reduce_scatter)(buf as *const c_void, own as *mut c_void, share as usize, data_type(dtype), sum, comm, stream.cast())
        }
    }

    /// Ends whatever the communicator does, on the device too, and frees it.
    ///
    /// # Safety
    /// As [`Api::state`]; `comm` is not used again.
    pub(super) unsafe fn abort(&self, comm: Comm) -> u32 {
        // SAFETY: the caller's.
        unsafe { (self.abort)(comm) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is too old or lacks a function is the reason, whatever is tried after it; but a later one that can be used is used.
    #[test]
    fn the_reason_that_tells_most_is_kept() {
        let files = || ["/a", "/b", "/c", "name"].map(PathBuf::from).to_vec();
        let take = |path: &Path| match path.to_str().unwrap() {
            "/a" => Err((Lack::Opening, "not a library".to_owned())),
            "/b" => Err((Lack::Content, "/b: too old".to_owned())),
            "/c" => Err((Lack::Content, "/c: older still".to_owned())),
            _ => Err((Lack::File, "no such file".to_owned())),
        };
        assert_eq!(first::<()>(files(), take), Err("/b: too old".to_owned()));
        assert_eq!(first(files(), |p| if p == Path::new("name") { Ok(()) } else { take(p) }), Ok(()));
        assert_eq!(first::<()>(files()[3..].to_vec(), take), Err("no such file".to_owned()));
        assert!(first::<()>(Vec::new(), take).is_err());
    }

    /// Where NCCL is installed, even without a GPU, it opens and makes ids; elsewhere the message says how to get it.
    #[test]
    fn nccl_is_found_or_the_message_says_what_to_do() {
        match api() {
            Ok(api) => {
                assert!(api.version >= LEAST, "{}", api.version);
                assert!(api.error("ncclX", 4, std::ptr::null_mut()).message.contains("ncclX: invalid argument"));
            }
            Err(e) => {
                assert_eq!(e.kind, ErrorKind::Resources);
                assert!(e.message.contains("libnccl.so.2") && e.message.contains("nvidia-nccl") && e.message.contains("Searched: "), "{e}");
            }
        }
    }
}
