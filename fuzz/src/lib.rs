//! What the fuzz targets share: files for interfaces that read files, parts of an input, seeds, and where panics go.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Ends a part of an input that is made of several texts. No byte of UTF-8.
pub const SEPARATOR: u8 = 0xff;

/// Folder in memory that belongs to this process.
///
/// # Panics
/// It cannot be made.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        // Left by runs that were killed: a fuzzer ends by exiting, and drops nothing.
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.strip_prefix("ramtorch-fuzz-")).and_then(|n| n.split('.').next()?.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
                let path = entry.path();
                let _ = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            }
        }
        let path = PathBuf::from(format!("/dev/shm/ramtorch-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder in /dev/shm");
        path
    })
}

/// Writes a file of [`folder`], and the folders above it; returns its path.
///
/// # Panics
/// It cannot be written.
pub fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = folder().join(name);
    if std::fs::write(&path, content).is_err() {
        std::fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("a folder in /dev/shm");
        std::fs::write(&path, content).expect("room in /dev/shm");
    }
    path
}

/// Removes a file of [`folder`].
pub fn no_file(name: &str) {
    let _ = std::fs::remove_file(folder().join(name));
}

/// Parts of an input; the last one is the rest, whatever is in it.
pub fn parts<const N: usize>(data: &[u8]) -> [&[u8]; N] {
    let mut parts = data.splitn(N, |b| *b == SEPARATOR);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}

/// Parts joined to an input.
pub fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.join(&SEPARATOR)
}

/// A file of the repository's fixtures.
///
/// # Panics
/// There is none.
pub fn fixture(name: &str) -> Vec<u8> {
    // This file is part of tests elsewhere in the repository, too.
    let mut folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|d| d.join("tests/fixtures").join(name));
    let path = folders.find(|p| p.exists()).unwrap_or_else(|| panic!("no fixture {name}"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// To be called when a target begins: where `RAMTORCH_FUZZ_SEEDS` names a folder, its seeds are written there and that is all.
pub fn seeds(make: impl FnOnce() -> Vec<Vec<u8>>) {
    let Some(folder) = std::env::var_os("RAMTORCH_FUZZ_SEEDS").map(PathBuf::from) else { return };
    std::fs::create_dir_all(&folder).expect("the folder for seeds");
    for (i, seed) in make().into_iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{i}")), seed).expect("a seed");
    }
    let _ = std::fs::remove_dir_all(self::folder());
    std::process::exit(0);
}

/// For targets whose code catches panics of libraries on purpose: only those that are caught by nobody end the process.
pub fn panics_may_be_caught() {
    std::panic::set_hook(Box::new(|_| {}));
}
