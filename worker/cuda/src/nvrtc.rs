//! Compiling kernels at run time, and keeping the machine code on disk.
//!
//! The name of a cached file is a hash of everything that determines its content: sources, options, compiler version. A
//! file holds the hash of its machine code first, so a damaged one is compiled again. The folder is
//! `$XDG_CACHE_HOME/ramtorch/kernels`, or `~/.cache/ramtorch/kernels`, or one of this user's in the folder for
//! temporary files; nothing is cached in a folder that others may write.

use cudarc::nvrtc::sys as nv;
use ramtorch_device::{EngineError, ErrorKind};
use std::ffi::{CStr, CString};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A kernel file of `worker/kernels`.
pub(crate) struct Source {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

/// Included by all of them.
const COMMON: Source = Source { name: "common.cuh", text: include_str!("../../kernels/common.cuh") };

/// Machine code of `source` for compute capability `capability`, from the cache or compiled.
///
/// # Errors
/// When the compiler refuses the source or does not know the device; the message carries its log.
pub(crate) fn cubin(source: &Source, capability: (i32, i32), defines: &[String]) -> Result<Vec<u8>, EngineError> {
    cubin_kept_in(cache_folder("kernels").as_deref(), source, capability, defines)
}

fn cubin_kept_in(folder: Option<&Path>, source: &Source, capability: (i32, i32), defines: &[String]) -> Result<Vec<u8>, EngineError> {
    let architecture = architecture(capability)?;
    let mut options = vec![format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()];
    options.extend(defines.iter().map(|d| format!("-D{d}")));
    let version = crate::library::nvrtc_version().map_or(0, |v| v.0);
    let mut key = blake3::Hasher::new();
    for part in [COMMON.text, source.name, source.text, &options.join("\n"), &version.to_string()] {
        key.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let path = folder.map(|f| f.join(format!("{}.cubin", key.finalize().to_hex())));
    if let Some(code) = path.as_ref().and_then(|p| std::fs::read(p).ok()).and_then(unseal) {
        return Ok(code);
    }
    let code = compile(source, &options)?;
    if let Some(path) = path
        && let Err(e) = write_aside(&path, &code)
    {
        tracing::warn!("cannot keep compiled kernels in {}: {e}", path.display());
    }
    Ok(code)
}

fn unseal(mut file: Vec<u8>) -> Option<Vec<u8>> {
    if file.len() <= 32 {
        return None;
    }
    let code = file.split_off(32);
    (file == *blake3::hash(&code).as_bytes()).then_some(code)
}

fn write_aside(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let aside = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()).replace(['(', ')'], ""));
    std::fs::write(&aside, sealed(code))?;
    std::fs::rename(&aside, path)
}

fn sealed(code: &[u8]) -> Vec<u8> {
    let mut file = blake3::hash(code).as_bytes().to_vec();
    file.extend_from_slice(code);
    file
}

/// This user's folder called `name` for what can be made again, made where it is missing.
pub(crate) fn cache_folder(name: &str) -> Option<PathBuf> {
    let named = |v: &str| std::env::var_os(v).map(PathBuf::from).filter(|p| p.is_absolute());
    // SAFETY: has no preconditions.
    let user = unsafe { libc::geteuid() };
    // A folder that others own or write could hold their code, and so could one that they put in its place.
    let own = |p: &Path| std::fs::symlink_metadata(p).is_ok_and(|m| m.is_dir() && m.uid() == user && m.mode() & 0o022 == 0);
    [
        named("XDG_CACHE_HOME").map(|p| p.join("ramtorch")),
        named("HOME").map(|p| p.join(".cache/ramtorch")),
        Some(std::env::temp_dir().join(format!("ramtorch-{user}"))),
    ]
    .into_iter()
    .flatten()
    .map(|parent| (parent.join(name), parent))
    .find(|(folder, parent)| {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).is_ok();
        made && own(parent) && own(folder)
    })
    .map(|(folder, _)| folder)
}

fn checked(status: nv::nvrtcResult, what: &str) -> Result<(), EngineError> {
    if status == nv::nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(EngineError::internal(format!("{what}: {status:?}"))) }
}

/// `sm_90` for (9, 0): the newest that the compiler knows of the same major version and not newer than the device.
fn architecture((major, minor): (i32, i32)) -> Result<String, EngineError> {
    let mut count = 0i32;
    // SAFETY: writes one integer.
    checked(unsafe { nv::nvrtcGetNumSupportedArchs(&mut count) }, "nvrtcGetNumSupportedArchs")?;
    let mut known = vec![0i32; count.max(0) as usize];
    // SAFETY: the vector has room for the number that was announced.
    checked(unsafe { nv::nvrtcGetSupportedArchs(known.as_mut_ptr()) }, "nvrtcGetSupportedArchs")?;
    let wanted = major * 10 + minor;
    match known.iter().filter(|k| *k / 10 == major && **k <= wanted).max() {
        Some(best) => Ok(format!("sm_{best}")),
        None => Err(EngineError::new(
            ErrorKind::Resources,
            format!(
                "the CUDA run-time compiler (libnvrtc) does not know devices of compute capability {major}.{minor}, only {known:?}: install a newer or older one"
            ),
        )),
    }
}

fn compile(source: &Source, options: &[String]) -> Result<Vec<u8>, EngineError> {
    let text = |t: &str| CString::new(t).map_err(EngineError::internal);
    let (code, name, header, header_name) = (text(source.text)?, text(source.name)?, text(COMMON.text)?, text(COMMON.name)?);
    let options: Vec<CString> = options.iter().map(|o| text(o)).collect::<Result<_, _>>()?;
    let options: Vec<_> = options.iter().map(|o| o.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: terminated strings and arrays of them that live until the call returns; one header.
    let status = unsafe {
        nv::nvrtcCreateProgram(&mut program, code.as_ptr(), name.as_ptr(), 1, [header.as_ptr()].as_ptr(), [header_name.as_ptr()].as_ptr())
    };
    checked(status, source.name)?;
    // SAFETY: a program just made; the option strings live until the call returns (`options` above shadows only pointers).
    let status = unsafe { nv::nvrtcCompileProgram(program, options.len() as i32, options.as_ptr()) };
    let result = if status == nv::nvrtcResult::NVRTC_SUCCESS {
        take(program)
    } else {
        Err(EngineError::internal(format!("{} does not compile: {status:?}: {}", source.name, log(program))))
    };
    // SAFETY: made above, destroyed once.
    unsafe { nv::nvrtcDestroyProgram(&mut program) };
    result
}

fn take(program: nv::nvrtcProgram) -> Result<Vec<u8>, EngineError> {
    let mut bytes = 0usize;
    // SAFETY: a compiled program; writes one integer.
    checked(unsafe { nv::nvrtcGetCUBINSize(program, &mut bytes) }, "nvrtcGetCUBINSize")?;
    let mut code = vec![0u8; bytes];
    // SAFETY: the buffer has the size that was announced.
    checked(unsafe { nv::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }, "nvrtcGetCUBIN")?;
    Ok(code)
}

fn log(program: nv::nvrtcProgram) -> String {
    let mut bytes = 0usize;
    // SAFETY: a live program; writes one integer.
    if unsafe { nv::nvrtcGetProgramLogSize(program, &mut bytes) } != nv::nvrtcResult::NVRTC_SUCCESS || bytes == 0 {
        return String::new();
    }
    let mut buffer = vec![0u8; bytes];
    // SAFETY: the buffer has the size that was announced.
    unsafe { nv::nvrtcGetProgramLog(program, buffer.as_mut_ptr().cast()) };
    CStr::from_bytes_until_nul(&buffer).map(|s| s.to_string_lossy().chars().take(2000).collect()).unwrap_or_default()
}

/// Whether tests can compile. `RAMTORCH_REQUIRE_NVRTC` is set where the library was installed for them, so that they are not
/// skipped unseen.
#[cfg(test)]
pub(crate) fn to_test_with() -> bool {
    // SAFETY: opens and closes a library by name.
    let present = unsafe { nv::is_culib_present() };
    assert!(present || std::env::var_os("RAMTORCH_REQUIRE_NVRTC").is_none(), "libnvrtc is not on the library path");
    if !present {
        crate::say_skipped("1 NVRTC test: libnvrtc is not on the library path");
    }
    present
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was compiled once is read, and not compiled again; another source, other options and damage make it again.
    #[test]
    fn a_source_is_compiled_once() {
        if !to_test_with() {
            return;
        }
        let folder = std::env::temp_dir().join(format!("ramtorch-cubins-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let source = Source { name: "once.cu", text: "extern \"C\" __global__ void once(int *x) { *x = STEP; }" };
        let step = |n: i32| vec![format!("STEP={n}")];
        let cubin = |source, defines: &[String]| cubin_kept_in(Some(&folder), source, (9, 0), defines).unwrap();
        let files = || std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        let code = cubin(&source, &step(1));
        assert!(code.starts_with(b"\x7fELF"));
        let [file] = files().try_into().unwrap();
        // Nobody but the cache gives this.
        std::fs::write(&file, sealed(b"not the compiler's")).unwrap();
        assert_eq!(cubin(&source, &step(1)), b"not the compiler's");
        assert_ne!(cubin(&source, &step(2)), b"not the compiler's", "other options");
        let other = Source { name: "once.cu", text: "extern \"C\" __global__ void once(int *x) { *x = -STEP; }" };
        assert_ne!(cubin(&other, &step(1)), b"not the compiler's", "another source");
        assert_eq!(files().len(), 3);
        std::fs::write(&file, b"damaged").unwrap();
        assert_eq!(cubin(&source, &step(1)), code);
        assert_eq!(std::fs::read(&file).unwrap(), sealed(&code), "and kept again");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn damaged_files_are_not_used() {
        let mut file = sealed(b"code");
        assert_eq!(unseal(file.clone()).as_deref(), Some(&b"code"[..]));
        *file.last_mut().unwrap() ^= 1;
        assert_eq!(unseal(file), None);
        assert_eq!(unseal(vec![0; 8]), None);
    }
}
