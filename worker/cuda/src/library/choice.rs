//! Which file each library is opened from, and how it comes to be that one.
//!
//! Libraries are opened by bare names, the unversioned one first and then the newest version. So a file for the driver's
//! CUDA loses to a newer one in any later folder, whatever the order of folders. Where the loader would not take the file
//! that is wanted, a folder of links with unversioned names goes in front of all others.

use super::search;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// A library of which files are compared.
pub(super) struct Kind {
    /// Start of the file's name.
    pub(super) file: &'static str,
    /// Start of the names of what belongs to it and is opened by it, by name.
    family: &'static str,
    /// Versions by which the loader is asked, in the order in which cudarc does it.
    versions: &'static [&'static str],
    /// Function that tells the version, and what is to be called.
    ask: unsafe fn(*mut libc::c_void) -> Option<Version>,
    /// Least version, major · 1000 + minor · 10.
    least: u64,
}

/// What a file says of itself; major · 1000 + minor · 10, and the major version of CUDA that it is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) number: u64,
    pub(super) made_for: Option<u64>,
}

pub(super) const KINDS: [Kind; 3] = [
    Kind { file: "libnvrtc.so", family: "libnvrtc", versions: &["", ".13", ".12", ".11"], ask: ask_nvrtc, least: 12000 },
    Kind { file: "libcublasLt.so", family: "libcublas", versions: &["", ".13", ".12", ".11"], ask: ask_cublaslt, least: 12000 },
    Kind { file: "libcudnn.so", family: "libcudnn", versions: &["", ".9"], ask: ask_cudnn, least: 9000 },
];
const DRIVER: Kind = Kind { file: "libcuda.so", family: "libcuda", versions: &["", ".1"], ask: ask_driver, least: 0 };

/// The address of a function of an open library.
///
/// # Safety
/// `handle` is open, and `F` a pointer to a function of the signature that this name has.
unsafe fn function<F: Copy>(handle: *mut libc::c_void, name: &CStr) -> Option<F> {
    const { assert!(size_of::<F>() == size_of::<*mut libc::c_void>()) };
    // SAFETY: an open library and a terminated string.
    let address = unsafe { libc::dlsym(handle, name.as_ptr()) };
    // SAFETY: as large as a pointer (checked), and of the right signature (caller).
    (!address.is_null()).then(|| unsafe { std::mem::transmute_copy(&address) })
}

unsafe fn ask_driver(handle: *mut libc::c_void) -> Option<Version> {
    // SAFETY: cuda.h; writes one integer.
    unsafe {
        let f: unsafe extern "C" fn(*mut i32) -> i32 = function(handle, c"cuDriverGetVersion")?;
        let mut v = 0;
        (f(&mut v) == 0 && v > 0).then_some(Version { number: v as u64, made_for: None })
    }
}
unsafe fn ask_nvrtc(handle: *mut libc::c_void) -> Option<Version> {
    // SAFETY: nvrtc.h; writes two integers.
    unsafe {
        let f: unsafe extern "C" fn(*mut i32, *mut i32) -> i32 = function(handle, c"nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        (f(&mut major, &mut minor) == 0)
            .then_some(Version { number: major as u64 * 1000 + minor as u64 * 10, made_for: Some(major as u64) })
    }
}
unsafe fn ask_cublaslt(handle: *mut libc::c_void) -> Option<Version> {
    // SAFETY: cublasLt.h; no arguments.
    unsafe {
        let f: unsafe extern "C" fn() -> usize = function(handle, c"cublasLtGetVersion")?;
        let number = super::cublaslt_number(f() as u64);
        Some(Version { number, made_for: Some(number / 1000) })
    }
}
unsafe fn ask_cudnn(handle: *mut libc::c_void) -> Option<Version> {
    // SAFETY: cudnn.h; no arguments.
    unsafe {
        let version: unsafe extern "C" fn() -> usize = function(handle, c"cudnnGetVersion")?;
        let runtime: unsafe extern "C" fn() -> usize = function(handle, c"cudnnGetCudartVersion")?;
        Some(Version { number: super::cudnn_number(version() as u64), made_for: super::cudnn_runtime(runtime() as u64) })
    }
}

/// Opens `name` (a path, or a name for the loader) and asks it. In a process of its own: libraries that are not wanted leave
/// nothing behind here, and one that ends the process (cuDNN does, where a part of it is missing) ends only that one. There is
/// only one thread yet.
fn ask(kind: &Kind, name: &OsStr) -> Option<(PathBuf, Version)> {
    let name = CString::new(name.as_bytes()).ok()?;
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: no other thread holds a lock that the child would want.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // What a dying library prints would be taken for an error of this program.
        // SAFETY: plain system calls; the process ends here and runs no destructor of the parent's.
        unsafe {
            libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 });
            let nothing = libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY);
            libc::dup2(nothing, 1);
            libc::dup2(nothing, 2);
            let answer = answer(kind, &name).unwrap_or_default();
            libc::write(pipe[1], answer.as_ptr().cast(), answer.len());
            libc::_exit(0);
        }
    }
    // SAFETY: two descriptors that nobody else knows; the first is closed with the file.
    let mut reader = unsafe {
        libc::close(pipe[1]);
        <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(pipe[0])
    };
    if child < 0 {
        return None;
    }
    let mut text = Vec::new();
    let read = std::io::Read::read_to_end(&mut reader, &mut text);
    // SAFETY: the child that was made above.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    read.ok()?;
    parse(&text)
}

/// Version, CUDA's major version (0: unknown) and path, as a line.
fn answer(kind: &Kind, name: &CStr) -> Option<Vec<u8>> {
    // SAFETY: a terminated string; the libraries' initialisers have no preconditions. `ask` gets an open library.
    let (handle, version) = unsafe {
        let handle = libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_LOCAL);
        (handle, if handle.is_null() { None } else { (kind.ask)(handle) }?)
    };
    let path = place_of(handle)?;
    let mut line = format!("{} {} ", version.number, version.made_for.unwrap_or(0)).into_bytes();
    line.extend(path.as_os_str().as_bytes());
    Some(line)
}

/// Where an open library was opened from.
pub(crate) fn place_of(handle: *mut libc::c_void) -> Option<PathBuf> {
    let mut map: *const LinkMap = std::ptr::null();
    // SAFETY: an open library; writes one pointer, to a structure that lives as long as the library is open.
    let name = unsafe {
        if libc::dlinfo(handle, libc::RTLD_DI_LINKMAP, (&raw mut map).cast()) != 0 || map.is_null() {
            return None;
        }
        CStr::from_ptr((*map).name).to_bytes().to_vec()
    };
    Some(OsString::from_vec(name).into())
}

/// The beginning of `struct link_map` (link.h).
#[repr(C)]
struct LinkMap {
    address: usize,
    name: *const libc::c_char,
}

fn parse(line: &[u8]) -> Option<(PathBuf, Version)> {
    let mut parts = line.splitn(3, |b| *b == b' ');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse::<u64>().ok();
    let (version, made_for) = (number()?, number()?);
    let path = parts.next().filter(|p| !p.is_empty())?;
    Some((OsString::from_vec(path.to_vec()).into(), Version { number: version, made_for: (made_for > 0).then_some(made_for) }))
}

/// Files of a library in a folder: the unversioned one, then the newest first.
fn files(folder: &Path, file: &str) -> Vec<PathBuf> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut found: Vec<(Vec<u64>, String)> = names
        .filter_map(|n| {
            let rest = n.strip_prefix(file)?;
            let numbers = if rest.is_empty() {
                vec![u64::MAX]
            } else {
                rest.strip_prefix('.')?.split('.').map(|p| p.parse().ok()).collect::<Option<_>>()?
            };
            Some((numbers, n))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, n)| folder.join(n)).collect()
}

/// Where the libraries of one kind come from.
#[derive(Debug, PartialEq, Eq)]
struct Choice {
    /// The first that suits, in the order of the search.
    wanted: Option<PathBuf>,
    /// What the loader gives by itself.
    given: Option<PathBuf>,
}

/// Looks for the first file of `kind` that is new enough, and not too new for a driver of CUDA `driver`: in the folders
/// before the system's, then by what the loader gives for each of the names, then in the folders after. `ask` opens a path or
/// a name and tells where that is and which version.
fn choose(
    kind: &Kind,
    driver: u64,
    (before, after): &(Vec<PathBuf>, Vec<PathBuf>),
    ask: &dyn Fn(&OsStr) -> Option<(PathBuf, Version)>,
) -> Choice {
    let suits = |v: &Version| v.number >= kind.least && v.made_for.is_none_or(|m| m <= driver);
    // Every file once: a folder has up to three names for it.
    let mut asked = Vec::new();
    let mut first = |folders: &[PathBuf]| {
        folders.iter().flat_map(|f| files(f, kind.file)).find(|path| {
            let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
            let fresh = !asked.contains(&real);
            asked.push(real);
            fresh && ask(path.as_os_str()).is_some_and(|(_, v)| suits(&v))
        })
    };
    let by_name = |version: &&str| ask(OsStr::new(&format!("{}{version}", kind.file)));
    let given = kind.versions.iter().find_map(&by_name);
    let wanted = first(before)
        .or_else(|| given.iter().find(|(_, v)| suits(v)).map(|(p, _)| p.clone()))
        .or_else(|| kind.versions.iter().filter_map(by_name).find(|(_, v)| suits(v)).map(|(p, _)| p))
        .or_else(|| first(after));
    Choice { wanted, given: given.map(|(p, _)| p) }
}

impl Choice {
    /// Whether the loader gives another file than the one that is wanted.
    fn differs(&self) -> bool {
        let real = |p: &PathBuf| std::fs::canonicalize(p).unwrap_or_else(|_| p.clone());
        self.wanted.as_ref().is_some_and(|w| self.given.as_ref().map(real) != Some(real(w)))
    }
}

/// The links that make the loader give `path` for `kind`: its unversioned name, and the names of all that belongs to it beside
/// the file, since libraries look for their parts beside the link and not beside the file.
fn links(kind: &Kind, path: &Path) -> Vec<(OsString, PathBuf)> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut all: Vec<(OsString, PathBuf)> = names
        .filter(|n| n.starts_with(kind.family) && n.contains(".so") && n != kind.file)
        .map(|n| (OsString::from(&n), folder.join(n)))
        .collect();
    all.push((kind.file.into(), path.to_path_buf()));
    all
}

/// A folder below `cache` with these links. Its name is a hash of them, so it never changes, and processes that make it at the
/// same time make the same; one may open a part of a library hours later.
fn link_folder(cache: &Path, mut links: Vec<(OsString, PathBuf)>) -> std::io::Result<PathBuf> {
    links.sort();
    let mut key = blake3::Hasher::new();
    for part in links.iter().flat_map(|(name, to)| [name.as_bytes(), to.as_os_str().as_bytes()]) {
        key.update(&(part.len() as u64).to_le_bytes()).update(part);
    }
    let folder = cache.join(&key.finalize().to_hex().as_str()[..32]);
    let unless_there = |made: std::io::Result<()>| made.or_else(|e| if e.kind() == ErrorKind::AlreadyExists { Ok(()) } else { Err(e) });
    unless_there(std::fs::create_dir(&folder))?;
    // Each time: what cleans folders for temporary files may have taken some of them.
    for (name, to) in &links {
        unless_there(symlink(to, folder.join(name)))?;
    }
    Ok(folder)
}

/// What is to be done to have the wanted files opened.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Folders that go in front of `LD_LIBRARY_PATH`.
    pub(super) first: Vec<PathBuf>,
    /// Folders that must be in it, wherever: workers may read what lies there.
    pub(super) also: Vec<PathBuf>,
    /// The driver is there, where the loader does not find it by itself.
    pub(super) driver_elsewhere: bool,
}

impl Outcome {
    pub(super) fn is_nothing(&self) -> bool {
        self.first.is_empty() && !self.driver_elsewhere
    }
}

/// Decides about all libraries. `None` without a driver. To be called before there are threads.
pub(super) fn decide() -> Option<Outcome> {
    let folders = search::around_the_system();
    let driver = choose(&DRIVER, u64::MAX, &folders, &|name| ask(&DRIVER, name));
    let cuda = ask(&DRIVER, driver.given.as_ref().or(driver.wanted.as_ref())?.as_os_str())?.1.number / 1000;
    let choices = KINDS.map(|kind| choose(&kind, cuda, &folders, &|name| ask(&kind, name)));
    let mut outcome = Outcome { driver_elsewhere: driver.given.is_none(), ..Outcome::default() };
    if choices.iter().any(Choice::differs) {
        let wanted: Vec<(&Kind, &PathBuf)> = KINDS.iter().zip(&choices).filter_map(|(k, c)| Some((k, c.wanted.as_ref()?))).collect();
        outcome.also = wanted.iter().filter_map(|(_, p)| p.parent().map(PathBuf::from)).collect();
        let all = wanted.iter().flat_map(|(k, p)| links(k, p)).collect();
        let made = crate::nvrtc::cache_folder("libraries").ok_or_else(|| std::io::Error::other("there is no folder for caches"));
        outcome.first = match made.and_then(|cache| link_folder(&cache, all)) {
            Ok(folder) => vec![folder],
            Err(e) => {
                eprintln!(
                    "cannot make a folder of links to the CUDA libraries ({e}): the loader may take others than those for the driver's CUDA {cuda}; set HOME or XDG_CACHE_HOME to a folder that can be written"
                );
                outcome.also.clone()
            }
        };
    }
    Some(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Folders of empty files; versions are those in the files' names, made for CUDA of that number.
    struct Disk {
        root: PathBuf,
        asked: RefCell<Vec<PathBuf>>,
    }

    impl Disk {
        fn new(tag: &str) -> Disk {
            let root = std::env::temp_dir().join(format!("ramtorch-choice-{tag}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&root);
            std::fs::create_dir_all(&root).unwrap();
            Disk { root, asked: RefCell::default() }
        }

        fn with(self, paths: &[&str]) -> Disk {
            for p in paths {
                let path = self.root.join(p);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "").unwrap();
            }
            self
        }

        /// Bare names are looked for as the loader does: the whole path for one name, then the next name.
        fn choose(&self, kind: &Kind, driver: u64, before: &[&str], system: &str, after: &[&str]) -> Choice {
            let folder = |f: &&str| self.root.join(f);
            let (before, after): (Vec<_>, Vec<_>) = (before.iter().map(folder).collect(), after.iter().map(folder).collect());
            choose(kind, driver, &(before.clone(), after), &|name| {
                let name = Path::new(name);
                let path = match name.is_absolute() {
                    true => name.to_path_buf(),
                    false => before.iter().chain([&self.root.join(system)]).map(|f| f.join(name)).find(|p| p.exists())?,
                };
                self.asked.borrow_mut().push(path.clone());
                let real = std::fs::canonicalize(&path).ok()?;
                let major: u64 = real.to_str()?.split_once(".so.")?.1.split('.').next()?.parse().ok()?;
                let made_for = if kind.file == "libcudnn.so" { None } else { Some(major) };
                Some((path, Version { number: major * 1000, made_for }))
            })
        }
    }

    impl Drop for Disk {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.root);
        }
    }

    /// A named folder with the driver's version wins over a newer one on the system's path, which the loader would take.
    #[test]
    fn a_named_folder_wins_over_newer_versions_elsewhere() {
        let disk = Disk::new("named").with(&["named/libnvrtc.so.12", "system/libnvrtc.so.13"]);
        let c = disk.choose(&KINDS[0], 12, &["named"], "system", &[]);
        assert_eq!(
            c,
            Choice { wanted: Some(disk.root.join("named/libnvrtc.so.12")), given: Some(disk.root.join("system/libnvrtc.so.13")) }
        );
        assert!(c.differs());
        // Under a driver for CUDA 13 too: what is named is wanted.
        let c = disk.choose(&KINDS[0], 13, &["named"], "system", &[]);
        assert!(c.differs() && c.wanted == Some(disk.root.join("named/libnvrtc.so.12")), "{c:?}");
    }

    #[test]
    fn what_the_loader_gives_stays_where_it_suits() {
        let disk = Disk::new("stays").with(&["system/libnvrtc.so.12", "later/libnvrtc.so.12"]);
        let c = disk.choose(&KINDS[0], 12, &[], "system", &["later"]);
        assert!(!c.differs() && c.wanted == Some(disk.root.join("system/libnvrtc.so.12")), "{c:?}");
        assert!(disk.asked.borrow().iter().all(|p| !p.starts_with(disk.root.join("later"))), "asked in vain");
    }

    #[test]
    fn an_older_version_beside_the_newest_is_found() {
        let disk = Disk::new("beside").with(&["system/libcublasLt.so.13", "system/libcublasLt.so.12", "later/libcublasLt.so.12.9"]);
        let c = disk.choose(&KINDS[1], 12, &[], "system", &["later"]);
        assert!(c.differs() && c.wanted == Some(disk.root.join("system/libcublasLt.so.12")), "{c:?}");
        // In a folder that the loader does not know, by itself.
        let disk = Disk::new("within").with(&[
            "system/libnvrtc.so.13",
            "later/libnvrtc.so.13.1",
            "later/libnvrtc.so.12.4",
            "later/libnvrtc.so.12.10",
        ]);
        let c = disk.choose(&KINDS[0], 12, &[], "system", &["later"]);
        assert_eq!(c.wanted, Some(disk.root.join("later/libnvrtc.so.12.10")));
        // And nothing at all where all are too new or too old.
        let disk = Disk::new("none").with(&["system/libnvrtc.so.13", "later/libnvrtc.so.11.2"]);
        let c = disk.choose(&KINDS[0], 12, &[], "system", &["later"]);
        assert!(c.wanted.is_none() && c.given.is_some() && !c.differs(), "{c:?}");
    }

    #[test]
    fn names_of_one_file_are_asked_once_and_other_files_not_at_all() {
        let disk = Disk::new("once").with(&["a/libcudnn.so.8.9.7", "a/libcudnn_graph.so.9", "a/libcudnn.so.9.txt", "b/libcudnn.so.9"]);
        for n in ["libcudnn.so", "libcudnn.so.8"] {
            symlink("libcudnn.so.8.9.7", disk.root.join("a").join(n)).unwrap();
        }
        let c = disk.choose(&KINDS[2], 12, &["a", "b"], "system", &[]);
        assert_eq!(c.wanted, Some(disk.root.join("b/libcudnn.so.9")));
        let asked = disk.asked.borrow();
        assert_eq!(asked.iter().filter(|p| p.starts_with(disk.root.join("a"))).count(), 2, "by the loader and by path: {asked:?}");
    }

    /// The links have the unversioned name, which is looked for first, and all that libraries open by name themselves.
    #[test]
    fn links_give_the_chosen_file_and_its_parts() {
        let disk = Disk::new("links").with(&[
            "v/libnvrtc.so.12",
            "v/libnvrtc.so.13",
            "v/libnvrtc-builtins.so.12.2",
            "v/libother.so.1",
            "v/libnvrtc_static.a",
        ]);
        symlink("libnvrtc.so.13", disk.root.join("v/libnvrtc.so")).unwrap();
        let all = links(&KINDS[0], &disk.root.join("v/libnvrtc.so.12"));
        let folder = link_folder(&disk.root, all.clone()).unwrap();
        assert_eq!(std::fs::read_link(folder.join("libnvrtc.so")).unwrap(), disk.root.join("v/libnvrtc.so.12"));
        let mut names: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["libnvrtc-builtins.so.12.2", "libnvrtc.so", "libnvrtc.so.12", "libnvrtc.so.13"]);
        std::fs::remove_file(folder.join("libnvrtc.so")).unwrap();
        assert_eq!(link_folder(&disk.root, all.into_iter().rev().collect()).unwrap(), folder, "the same links");
        assert!(folder.join("libnvrtc.so").exists(), "what was cleaned away is made again");
        let others = links(&KINDS[0], &disk.root.join("v/libnvrtc.so.13"));
        assert_ne!(link_folder(&disk.root, others).unwrap(), folder);
    }

    #[test]
    fn an_answer_is_read_back() {
        let version = Version { number: 12020, made_for: Some(12) };
        assert_eq!(parse(b"12020 12 /my libs/libnvrtc.so"), Some((PathBuf::from("/my libs/libnvrtc.so"), version)));
        assert_eq!(parse(b"9010 0 /a").unwrap().1.made_for, None);
        for bad in [&b""[..], b"1", b"1 2", b"1 2 ", b"x 2 /a"] {
            assert_eq!(parse(bad), None);
        }
    }
}
