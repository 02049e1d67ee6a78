//! Where a job writes for its user. The daemon has followed all links before the job starts (`ramtorchd`, `access::outputs`); a link
//! that somebody puts there later may lead to another user's results, so none is followed any more.

use crate::api::{EngineError, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A pipe or a device: names of them are links (`/dev/stdout`), and they have no content to lose.
fn is_special(path: &Path) -> bool {
    path.metadata().is_ok_and(|m| !m.is_file() && !m.is_dir())
}

/// The first link on the way to a file or a folder, and at its end.
fn link_on(path: &Path) -> Option<PathBuf> {
    let links = path.ancestors().filter(|p| p.symlink_metadata().is_ok_and(|m| m.is_symlink()));
    links.last().map(Path::to_path_buf).filter(|_| !is_special(path))
}

fn text(path: &Path, link: &Path) -> String {
    format!(
        "{}: {} is a link by now, and was none when the job started; nothing is written there. Remove the link",
        path.display(),
        link.display()
    )
}

/// Refuses a place that leads elsewhere by now.
///
/// # Errors
/// There is a link on the way.
pub(crate) fn check(what: &str, path: &Path) -> Result<(), EngineError> {
    link_on(path).map_or(Ok(()), |link| Err(EngineError::new(ErrorKind::Output, format!("{what} {}", text(path, &link)))))
}

/// Opens a file for reading and writing, makes it where it is not there, and follows no link.
pub(crate) fn open(path: &Path) -> std::io::Result<File> {
    let refused = |link: &Path| std::io::Error::other(text(path, link));
    if is_special(path) {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        // It may have been another one a moment ago.
        return if file.metadata()?.is_file() { Err(refused(path)) } else { Ok(file) };
    }
    let how = OpenHow::new().flags(OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_CLOEXEC).mode(Mode::from_bits_truncate(0o666));
    match openat2(nix::fcntl::AT_FDCWD, path, how.resolve(ResolveFlag::RESOLVE_NO_SYMLINKS)) {
        Ok(file) => Ok(file.into()),
        Err(Errno::ELOOP) => Err(refused(&link_on(path).unwrap_or_else(|| path.to_path_buf()))),
        // Linux before 5.6, or a container that allows no such call: a look, and a leaf that is no link.
        Err(Errno::ENOSYS | Errno::EPERM) => match link_on(path) {
            Some(link) => Err(refused(&link)),
            None => OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW).open(path),
        },
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn no_link_is_followed_wherever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let at = |p: &str| root.join(p);
        for d in ["mine", "theirs"] {
            std::fs::create_dir(at(d)).unwrap();
        }
        std::fs::write(at("theirs/m"), "theirs").unwrap();
        open(&at("mine/new")).unwrap();
        assert!(at("mine/new").exists() && check("x", &at("mine/not/there")).is_ok());
        symlink(at("theirs/m"), at("mine/m")).unwrap();
        symlink(at("theirs"), at("way")).unwrap();
        symlink(at("theirs/none"), at("mine/dangling")).unwrap();
        for path in ["mine/m", "way/m", "way/other", "mine/dangling"] {
            let e = open(&at(path)).unwrap_err().to_string();
            assert!(
                e.contains("is a link by now") && e.contains(at(path.split("/o").next().unwrap()).parent().unwrap().to_str().unwrap()),
                "{e}"
            );
            let e = check("`output.path`", &at(path)).unwrap_err();
            assert!(e.kind == ErrorKind::Output && e.message.contains("`output.path`"), "{}", e.message);
        }
        assert_eq!(std::fs::read_to_string(at("theirs/m")).unwrap(), "theirs");
        assert!(!at("theirs/none").exists() && !at("theirs/other").exists());
        symlink("/dev/null", at("mine/null")).unwrap();
        assert!(open(Path::new("/dev/null")).is_ok() && open(&at("mine/null")).is_ok());
    }
}
