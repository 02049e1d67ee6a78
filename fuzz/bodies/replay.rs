//! Runs a fuzz target's body over what its fuzzer began with and what is kept in `fuzz/corpus-seeds`, in ordinary tests of the crates
//! below `worker/`.

use crate::ramtorch_fuzz;
use std::path::Path;

pub fn replay(target: &str, begin: Vec<Vec<u8>>, run: fn(&[u8])) {
    begin.iter().for_each(|input| run(input));
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus-seeds").join(target);
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 5, "{} inputs in {}", files.len(), folder.display());
    files.iter().for_each(|file| run(&std::fs::read(file).unwrap()));
    let _ = std::fs::remove_dir_all(ramtorch_fuzz::folder());
}
