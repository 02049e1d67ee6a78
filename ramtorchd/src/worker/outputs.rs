//! Before anything is read or written for a job: its outputs are where they were at its submission, or it does not start.
//!
//! A file server that does not answer, or a file system that is mounted later than the daemon starts, is waited for, as a state
//! folder without room is: that is nobody's fault, and fails the job only after [`LIMIT`].

use crate::access::outputs::{self, Moved};
use crate::access::sandbox::Rules;
use ramtorch_worker::{Control, EngineError, ErrorKind, Level, Task};
use std::time::Duration;

/// Pauses between two looks: the first; they double.
const PAUSE: Duration = Duration::from_millis(250);
/// The longest.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Outputs that are not there are waited for so long.
const LIMIT: Duration = Duration::from_secs(600);

/// Makes the outputs of a job those that it was submitted with.
pub(super) fn settle(task: &mut Task, control: &dyn Control) -> Result<(), EngineError> {
    let (Task::Train { spec, .. } | Task::Prepare { spec, .. }) = task else { return Ok(()) };
    let rules = Rules::from_environment().map_err(EngineError::internal)?;
    patiently(|| outputs::settle(spec, rules.outputs.as_deref()), control, std::thread::sleep)
        .map_err(|text| EngineError::new(ErrorKind::Output, text))
}

/// Looks until the outputs are where they were, for as long as what is wrong may pass. `Err`: what is wrong.
fn patiently(mut look: impl FnMut() -> Result<(), Moved>, control: &dyn Control, mut sleep: impl FnMut(Duration)) -> Result<(), String> {
    let (mut pause, mut waited) = (PAUSE, Duration::ZERO);
    loop {
        let moved = match look() {
            Ok(()) if waited.is_zero() => return Ok(()),
            Ok(()) => {
                let text = format!("the job's outputs are where they were again, after {:.1} s", waited.as_secs_f64());
                control.event(Level::Info, &text);
                return Ok(());
            }
            Err(moved) if !moved.is_passing() => return Err(moved.to_string()),
            Err(moved) => moved,
        };
        if waited >= LIMIT {
            return Err(format!("{moved}. It was waited for, {} s", waited.as_secs()));
        }
        if waited.is_zero() {
            control.event(Level::Warn, &format!("{moved}; it is looked for again, for {} s at most", LIMIT.as_secs()));
        }
        // Also a sign that this worker is not stuck.
        control.progress("waiting for the job's outputs", waited.as_secs(), LIMIT.as_secs());
        sleep(pause);
        waited += pause;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use std::sync::Mutex;

    /// Keeps what is told.
    #[derive(Default)]
    struct Ear(Mutex<Vec<String>>);

    impl Control for Ear {
        fn heartbeat(&self, _step: u64, _phase: &'static str) {}
        fn metrics(&self, _metrics: &ramtorch_worker::StepMetrics, _line: &str) {}
        fn event(&self, _level: Level, text: &str) {
            self.0.lock().unwrap().push(text.into());
        }
        fn progress(&self, _what: &str, _done: u64, _total: u64) {}
        fn token(&self, _prompt: usize, _text: &str) {}
        fn checkpoint(&self, _path: &std::path::Path, _step: u64, _request: u64, _error: Option<&str>) {}
        fn trace(&self, _request: u64, _trace: ramtorch_worker::RankTrace) {}
        fn command(&self) -> Option<ramtorch_worker::Command> {
            None
        }
    }

    fn moved(now: PathBuf) -> Moved {
        Moved::Elsewhere { what: "`output.path`", path: "/way".into(), now, then: vec!["/mnt/x".into()] }
    }

    /// Looks that fail `times` times; the pauses, what came of it, what was told.
    fn run(times: usize, now: &str) -> (Vec<Duration>, Result<(), String>, Vec<String>) {
        let (mut looks, mut pauses, ear) = (0, Vec::new(), Ear::default());
        let look = || {
            looks += 1;
            if looks > times { Ok(()) } else { Err(moved(now.into())) }
        };
        let result = patiently(look, &ear, |pause| pauses.push(pause));
        (pauses, result, ear.0.into_inner().unwrap())
    }

    #[test]
    fn what_may_pass_is_waited_for_and_told_once() {
        let (pauses, result, told) = run(6, "/nowhere/x");
        assert_eq!(result, Ok(()));
        assert_eq!(pauses.iter().map(Duration::as_millis).collect::<Vec<_>>(), [250, 500, 1000, 2000, 4000, 5000]);
        assert!(told.len() == 2 && told[0].contains("`output.path`") && told[0].contains("600 s at most"), "{told:?}");
        assert!(told[1].contains("after 12.8 s"), "{told:?}");
        assert_eq!(run(0, "/nowhere/x"), (vec![], Ok(()), vec![]));
    }

    #[test]
    fn what_does_not_pass_is_told_at_once_and_the_rest_at_last() {
        let (pauses, result, told) = run(usize::MAX, "/tmp");
        assert!(pauses.is_empty() && told.is_empty() && result.unwrap_err().contains("leads to /tmp now"));
        let (pauses, result, told) = run(usize::MAX, "/nowhere/x");
        let waited: Duration = pauses.iter().sum();
        assert!(waited >= LIMIT && waited < LIMIT + LONGEST_PAUSE && told.len() == 1, "{waited:?} {told:?}");
        assert!(result.unwrap_err().contains("It was waited for, 60"));
    }
}
