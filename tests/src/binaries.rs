//! Where the binaries under test are, built in the profile that this test was built in.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names a folder with ready binaries: nothing is built then. For test runners that start a process per test.
const READY_BINARIES: &str = "RAMTORCH_TEST_BIN_DIR";

/// One of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binary {
    /// `ramtorchd`
    Daemon,
    /// `ramtorch`
    Client,
}

impl Binary {
    fn file_name(self) -> String {
        let name = match self {
            Binary::Daemon => "ramtorchd",
            Binary::Client => "ramtorch",
        };
        format!("{name}{}", std::env::consts::EXE_SUFFIX)
    }
}

/// Path of a binary, which is up to date.
///
/// `cargo test` builds a package's binaries only for that package's own tests, so the first call in a process runs
/// `cargo build` for both; when there is nothing to do, that takes a fraction of a second.
///
/// # Panics
/// The build failed.
pub fn binary(which: Binary) -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| std::env::var_os(READY_BINARIES).map_or_else(build, PathBuf::from)).join(which.file_name())
}

/// Builds both binaries; returns their folder.
fn build() -> PathBuf {
    // <target>/<profile folder>/deps/<test>-<hash>
    let test = std::env::current_exe().expect("the path of this test");
    let folder = test.ancestors().nth(2).expect("a test lies in <target>/<profile>/deps").to_path_buf();
    let target = folder.parent().expect("the profile's folder lies in the target folder");
    let profile = match folder.file_name().and_then(|n| n.to_str()).expect("a profile's folder has a name") {
        "debug" => "dev",
        other => other,
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate lies in the workspace");
    let output = Command::new(env!("CARGO"))
        .current_dir(root)
        .args(["build", "--quiet", "--bins", "-p", "ramtorchd", "-p", "ramtorch-client", "--profile", profile, "--target-dir"])
        .arg(target)
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "building the binaries under test:\n{}", String::from_utf8_lossy(&output.stderr));
    folder
}
