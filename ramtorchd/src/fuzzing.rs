//! Ways in for fuzz targets (`fuzz/`): built with `--cfg fuzzing` alone.

pub use crate::supervisor::fuzz::{conversations, converse, history_line, records};

use crate::logs::LogReader;
use crate::supervisor::fuzz::adopt;
use ramtorch_store::Registry;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Starts from a state folder as a daemon does, up to the state task; no process is started, and none ended: nobody can
/// know the name of this boot.
///
/// # Panics
/// What a daemon must not do with what it finds.
pub fn recover(folder: &Path) {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let boot_id = format!("fuzz-{now}-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let Ok(registry) = Registry::open(folder.join("segments")) else { return };
    let jobs = folder.join("jobs");
    let Ok(found) = crate::recovery::recover(&jobs, &registry, &boot_id, 100) else { return };
    for (record, ..) in &found.jobs {
        let mut reader = LogReader::new(jobs.join(&record.id).join("logs"), None);
        reader.skip_to_tail(2);
        let _ = reader.read();
    }
    adopt(found.jobs);
}
