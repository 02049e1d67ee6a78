//! Where CUDA's libraries are looked for.

use super::{CHOICE, LIBRARIES};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Folders below a toolkit's that hold libraries.
const TOOLKIT: [&str; 4] = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"];
/// Toolkits, and the container runtime's folder for the driver.
const SYSTEM: [&str; 3] = ["/usr/local/nvidia/lib64", "/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/*-linux/lib"];
/// Python packages of the system; wheels put libraries into `nvidia/*/lib` below.
const SITES: [&str; 5] = [
    "/opt/*/.venv/lib/python3*/site-packages",
    "/opt/*/lib/python3*/site-packages",
    "/usr/local/lib/python3*/dist-packages",
    "/usr/local/lib/python3*/site-packages",
    "/usr/lib/python3/dist-packages",
];

/// A place that is searched: its name in messages, and its folders.
pub(super) struct Place {
    name: String,
    folders: Vec<PathBuf>,
}

/// All places, in order; those before and after the system's own (the loader's cache), which only the loader knows.
pub(super) fn places(variable: &dyn Fn(&str) -> Option<OsString>) -> (Vec<Place>, Vec<Place>) {
    let variable = |name: &str| variable(name).filter(|v| !v.is_empty());
    let list = |name: &str| variable(name).map(|v| std::env::split_paths(&v).collect::<Vec<_>>()).unwrap_or_default();
    let shown = |name: &str| match variable(name) {
        Some(v) => format!("{name}={}", v.to_string_lossy()),
        None => format!("{name} (not set)"),
    };
    // The second one grows long when this program starts itself again.
    let before = vec![
        Place { name: shown(CHOICE), folders: list(CHOICE) },
        Place { name: "LD_LIBRARY_PATH".into(), folders: list("LD_LIBRARY_PATH") },
    ];
    let mut after = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        let home = variable(name);
        let folders = home.iter().flat_map(|home| TOOLKIT.map(|s| Path::new(home).join(s))).collect();
        after.push(Place { name: shown(name), folders });
    }
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        let home = variable(name).map(PathBuf::from);
        let below = |home: &PathBuf| {
            let mut all = folders(&format!("{}/lib/python3*/site-packages/nvidia/*/lib", home.display()));
            all.push(home.join("lib"));
            all
        };
        after.push(Place { name: shown(name), folders: home.iter().flat_map(below).collect() });
    }
    let home = variable("HOME").map(|home| format!("{}/.local/lib/python3*/site-packages", home.to_string_lossy()));
    let sites = SITES.iter().map(|s| (*s).to_owned()).chain(home).map(|site| format!("{site}/nvidia/*/lib"));
    for pattern in SYSTEM.iter().map(|s| (*s).to_owned()).chain(sites) {
        after.push(Place { folders: folders(&pattern), name: pattern });
    }
    (before, after)
}

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

/// Those of the places' folders that hold one of the libraries, each once.
pub(super) fn with_libraries(places: &[Place]) -> Vec<PathBuf> {
    let mut seen = Vec::new();
    let mut all: Vec<PathBuf> = places.iter().flat_map(|p| p.folders.clone()).collect();
    // A relative folder would be another one wherever the program is started.
    all.retain(|p| {
        let key = std::fs::canonicalize(p).unwrap_or_else(|_| p.clone());
        let fresh = p.is_absolute() && !seen.contains(&key) && holds_library(p);
        seen.push(key);
        fresh
    });
    all
}

fn of_this_process() -> (Vec<Place>, Vec<Place>) {
    places(&|name| std::env::var_os(name))
}

/// Folders that hold one of the libraries: those that come before the system's own, and those after.
pub(super) fn around_the_system() -> (Vec<PathBuf>, Vec<PathBuf>) {
    let (before, after) = of_this_process();
    (with_libraries(&before), with_libraries(&after))
}

/// Folders that hold one of the libraries, in the order in which they are to be searched.
pub(crate) fn search_folders() -> Vec<PathBuf> {
    let (mut all, after) = of_this_process();
    all.extend(after);
    with_libraries(&all)
}

/// For messages: every place that was searched, whether it exists or not, and the folders in which something was.
pub(crate) fn searched() -> String {
    let (before, after) = of_this_process();
    text(&before, &after)
}

fn text(before: &[Place], after: &[Place]) -> String {
    let system = std::iter::once("the system's library folders");
    let names: Vec<&str> = before.iter().map(|p| p.name.as_str()).chain(system).chain(after.iter().map(|p| p.name.as_str())).collect();
    let folders: Vec<PathBuf> = with_libraries(before).into_iter().chain(with_libraries(after)).collect();
    let found = match folders.is_empty() {
        true => "none of these folders has a CUDA library, the system's aside".to_owned(),
        false => format!("with CUDA libraries: {}", folders.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(", ")),
    };
    format!("Searched: {}; {found}. {CHOICE} adds folders, which are searched first", names.join(", "))
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

    /// A place that does not exist is named too: it is where somebody may have meant to install something.
    #[test]
    fn every_place_is_named() {
        let (before, after) = places(&|name| match name {
            CHOICE => Some("/nowhere/a:/nowhere/b".into()),
            "CONDA_PREFIX" => Some("/nowhere/conda".into()),
            "HOME" => Some("/nowhere/home".into()),
            _ => None,
        });
        assert_eq!(before[0].folders, [Path::new("/nowhere/a"), Path::new("/nowhere/b")]);
        let text = text(&before, &after);
        for part in [
            "RAMTORCH_CUDA_LIBRARIES=/nowhere/a:/nowhere/b, LD_LIBRARY_PATH, the system's library folders",
            "CUDA_HOME (not set)",
            "CUDA_PATH (not set)",
            "VIRTUAL_ENV (not set)",
            "CONDA_PREFIX=/nowhere/conda",
            "/usr/local/cuda*/lib64",
            "/usr/local/lib/python3*/dist-packages/nvidia/*/lib",
            "/nowhere/home/.local/lib/python3*/site-packages/nvidia/*/lib",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
