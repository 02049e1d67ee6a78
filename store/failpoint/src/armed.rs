//! What is armed in this process.

use crate::{MARKS_VARIABLE, Point, VARIABLE};
use nix::sys::signal::{Signal, raise};
use std::fs::OpenOptions;
use std::io::{Error, ErrorKind, Result, Write};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Kill,
    Stop,
    Panic,
    Error,
    Sleep(u64),
    Hold,
}

/// What is put behind the name of a mark to let go of who holds there.
const GO: &str = ".go";
/// How often it is looked for.
const HOLD_INTERVAL: Duration = Duration::from_millis(5);

/// One armed point.
#[derive(Debug)]
struct Entry {
    point: Point,
    /// Passed so many times before it fires.
    off: u64,
    action: Action,
    /// Number of the entry that has to fire first.
    after: Option<usize>,
    count: AtomicU64,
}

#[derive(Debug, Default)]
struct Armed {
    entries: Vec<Entry>,
    marks: Option<PathBuf>,
}

/// Comes by a point.
pub fn hit(point: Point) -> Result<()> {
    static ARMED: OnceLock<Armed> = OnceLock::new();
    ARMED.get_or_init(Armed::from_environment).hit(point)
}

impl Armed {
    fn from_environment() -> Armed {
        let Ok(text) = std::env::var(VARIABLE) else { return Armed::default() };
        match parse(&text) {
            Ok(entries) => Armed { entries, marks: std::env::var_os(MARKS_VARIABLE).map(PathBuf::from) },
            // A test that arms nothing would prove nothing.
            Err(e) => {
                eprintln!("{VARIABLE}: {e}");
                std::process::exit(2)
            }
        }
    }

    fn hit(&self, point: Point) -> Result<()> {
        for (number, entry) in self.entries.iter().enumerate().filter(|(_, e)| e.point == point) {
            if entry.after.is_some_and(|first| !self.has_fired(first)) {
                continue;
            }
            let before = entry.count.fetch_add(1, Ordering::Relaxed);
            // With marks, whoever is past the count may be the one that fires; alone, only the one that reaches it.
            let due = if self.marks.is_some() { before >= entry.off } else { before == entry.off };
            if due && self.mark(number) {
                eprintln!("fail point {}: {:?}", point.name(), entry.action);
                self.act(number, entry)?;
            }
        }
        Ok(())
    }

    fn mark_of(&self, number: usize) -> Option<PathBuf> {
        self.marks.as_ref().map(|m| m.join(format!("{number}-{}", self.entries[number].point.name())))
    }

    /// Takes the mark of an entry. `false`: somebody has it.
    fn mark(&self, number: usize) -> bool {
        let Some(path) = self.mark_of(number) else { return true };
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(mut file) => {
                let _ = writeln!(file, "{}", std::process::id());
                true
            }
            Err(_) => false,
        }
    }

    fn act(&self, number: usize, entry: &Entry) -> Result<()> {
        let signal = |signal| raise(signal).map_err(Error::from);
        match entry.action {
            Action::Kill => signal(Signal::SIGKILL),
            Action::Stop => signal(Signal::SIGSTOP),
            Action::Panic => panic!("fail point {}", entry.point.name()),
            Action::Error => Err(Error::other(format!("fail point {}", entry.point.name()))),
            Action::Sleep(milliseconds) => {
                std::thread::sleep(Duration::from_millis(milliseconds));
                Ok(())
            }
            Action::Hold => {
                // Without marks nobody can let go.
                let go = self.marks.as_ref().map(|m| m.join(format!("{number}-{}{GO}", entry.point.name())));
                while go.as_ref().is_none_or(|go| !go.exists()) {
                    std::thread::sleep(HOLD_INTERVAL);
                }
                Ok(())
            }
        }
    }

    fn has_fired(&self, number: usize) -> bool {
        match self.mark_of(number) {
            Some(path) => path.exists(),
            None => self.entries[number].count.load(Ordering::Relaxed) > self.entries[number].off,
        }
    }
}

/// `NAME=[COUNT*off->]ACTION`, joined by `;`, or by `,` where an entry waits for the one before it.
fn parse(text: &str) -> Result<Vec<Entry>> {
    let bad = |what: &str| Error::new(ErrorKind::InvalidInput, format!("{what:?} is not NAME=[COUNT*off->]ACTION"));
    let mut entries = Vec::new();
    for chain in text.split(';').filter(|c| !c.trim().is_empty()) {
        for (place, item) in chain.split(',').map(str::trim).enumerate() {
            let (name, what) = item.split_once('=').ok_or_else(|| bad(item))?;
            let point = Point::ALL.iter().copied().find(|p| p.name() == name);
            let point = point.ok_or_else(|| Error::new(ErrorKind::InvalidInput, format!("there is no fail point {name:?}")))?;
            let (off, action) = match what.split_once("*off->") {
                Some((count, action)) => (count.parse().map_err(|_| bad(item))?, action),
                None => (0, what),
            };
            let sleep = || action.strip_prefix("sleep(")?.strip_suffix(')')?.parse().ok();
            let action = match action {
                "kill" => Action::Kill,
                "stop" => Action::Stop,
                "panic" => Action::Panic,
                "error" => Action::Error,
                "hold" => Action::Hold,
                _ => Action::Sleep(sleep().ok_or_else(|| bad(item))?),
            };
            let after = if place == 0 { None } else { Some(entries.len() - 1) };
            entries.push(Entry { point, off, action, after, count: AtomicU64::new(0) });
        }
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn armed(text: &str, marks: Option<&std::path::Path>) -> Armed {
        Armed { entries: parse(text).unwrap(), marks: marks.map(PathBuf::from) }
    }

    #[test]
    fn an_entry_passes_then_fires_once() {
        let armed = armed("page.published=2*off->error", None);
        let fired: Vec<bool> = (0..5).map(|_| armed.hit(Point::PagePublished).is_err()).collect();
        assert_eq!(fired, [false, false, true, false, false]);
        assert!(armed.hit(Point::PageWritten).is_ok());
    }

    #[test]
    fn marks_are_shared_by_processes_and_order_a_chain() {
        let dir = tempfile::tempdir().unwrap();
        let text = "step.swept=error,recover.begun=1*off->error;step.swept=error";
        let (one, other) = (armed(text, Some(dir.path())), armed(text, Some(dir.path())));
        for _ in 0..3 {
            assert!(one.hit(Point::RecoverBegun).is_ok(), "the one before it has not fired");
        }
        assert!(one.hit(Point::StepSwept).is_err());
        assert!(other.hit(Point::StepSwept).is_err(), "the third entry");
        assert!(other.hit(Point::StepSwept).is_ok());
        assert!(other.hit(Point::RecoverBegun).is_ok(), "passes once");
        assert!(other.hit(Point::RecoverBegun).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn who_holds_goes_on_when_it_is_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let armed = armed("step.swept=hold", Some(dir.path()));
        std::thread::scope(|scope| {
            let holding = scope.spawn(|| armed.hit(Point::StepSwept));
            while !dir.path().join("0-step.swept").exists() {
                std::thread::yield_now();
            }
            std::thread::sleep(4 * HOLD_INTERVAL);
            assert!(!holding.is_finished());
            std::fs::write(dir.path().join("0-step.swept.go"), "").unwrap();
            assert!(holding.join().unwrap().is_ok());
        });
        assert!(armed.hit(Point::StepSwept).is_ok(), "it holds once");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in ["nobody=kill", "step.swept", "step.swept=x", "step.swept=a*off->kill", "step.swept=sleep(x)", "step.swept=kill,"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("").unwrap().is_empty() && parse(" ; ").unwrap().is_empty());
        assert_eq!(parse("step.swept=3*off->sleep(20)").unwrap()[0].action, Action::Sleep(20));
    }
}
