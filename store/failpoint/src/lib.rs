//! Fail points: named places at which a test lets a process die, stop, stall or fail.
//!
//! ```text
//!   RAMTORCH_FAILPOINTS = "page.published=7*off->kill,recover.begun=kill;checkpoint.shard=stop"
//!                          └ pass 7 times, then die ┘ └ only once the entry before the comma has fired
//!   RAMTORCH_FAILPOINTS_DIR = folder of marks: an entry fires once, whichever process comes first
//! ```
//! Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP to itself), `panic`, `error` (where the place can fail; a panic
//! elsewhere), `sleep(MILLISECONDS)`, `hold` (blocks the thread until there is a file `MARK.go` beside the mark). Each
//! process counts for itself. Without a folder of marks, an entry fires once in each process.
//!
//! Only builds with debug assertions have them. In a release build [`hit`] and [`check`] are empty, and no name, variable
//! or text of this crate is in the program.
#![forbid(unsafe_code)]

mod points;

#[cfg(debug_assertions)]
mod armed;

pub use points::{Point, Process};

/// Environment variable with what is armed.
pub const VARIABLE: &str = "RAMTORCH_FAILPOINTS";
/// Environment variable with the folder of marks.
pub const MARKS_VARIABLE: &str = "RAMTORCH_FAILPOINTS_DIR";

/// Whether this build has fail points.
pub const COMPILED_IN: bool = cfg!(debug_assertions);

/// A place that cannot fail.
#[cfg(debug_assertions)]
#[inline]
pub fn hit(point: Point) {
    if let Err(e) = armed::hit(point) {
        panic!("{e}");
    }
}

/// A place that cannot fail.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub const fn hit(_: Point) {}

/// A place that can fail.
///
/// # Errors
/// The one that is armed.
#[cfg(debug_assertions)]
#[inline]
pub fn check(point: Point) -> std::io::Result<()> {
    armed::hit(point)
}

/// A place that can fail.
///
/// # Errors
/// None in a release build.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub const fn check(_: Point) -> std::io::Result<()> {
    Ok(())
}
