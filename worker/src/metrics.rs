//! Files with one JSON line a committed step: one in the job's own folder, which the daemon reads, and the one that the job
//! file names, if it names any.
//!
//! ```text
//!   commit ─► line in the job's own file ─► line in the user's ─► told to the daemon
//!   killed before the first:   the next gang writes it from the step record
//!   killed before the second:  the next gang copies it from the job's own file
//!   killed before the third:   the next gang tells every line that the daemon does not know
//! ```
//! For a power cut, both are made durable before a checkpoint gets its name (`checkpoint::writer`): the state that is loaded then has
//! its lines. The one that may not be there is that of the checkpoint's own step, whose line waits for a validation; a checkpoint
//! carries its numbers.
//!
//! Nothing is cut off but lines of steps that will be run again, and what a death or a power cut left of one. A file that holds
//! anything else is somebody else's: it is refused, before training, and not touched. Where somebody has written into the user's file
//! since, the run goes on without it, and the job's own file has the lines.

use crate::api::{Control, EngineError, ErrorKind, History, Level, StepMetrics};
use crate::record::StepNumbers;
use ramtorch_failpoint::{Point, hit};
use serde::de::IgnoredAny;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// What tells a line of ours from other JSON. Its values are looked at elsewhere.
#[derive(serde::Deserialize)]
struct Line {
    step: u64,
    #[serde(rename = "loss")]
    _loss: IgnoredAny,
    #[serde(rename = "lr")]
    _lr: IgnoredAny,
    #[serde(rename = "tokens_total")]
    _tokens_total: IgnoredAny,
}

/// What stands between two ends of lines.
enum Piece {
    Line(u64),
    /// Of a line that a full disk, a death or a power cut left: its beginning, or zeros in place of its data.
    Torn,
    Foreign,
}

fn piece(bytes: &[u8]) -> Piece {
    let whole = bytes.ends_with(b"\n");
    match serde_json::from_slice::<Line>(bytes) {
        Ok(line) if whole => Piece::Line(line.step),
        _ if bytes.contains(&0) || (!whole && begins_a_line(bytes)) => Piece::Torn,
        _ => Piece::Foreign,
    }
}

/// Whether lines of ours begin like this.
fn begins_a_line(bytes: &[u8]) -> bool {
    let agrees = |bytes: &[u8], with: &[u8]| bytes.iter().zip(with).all(|(a, b)| a == b);
    let (before, after) = (b"{\"step\":", b",\"loss\":");
    let rest = bytes.get(before.len()..).unwrap_or_default();
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    agrees(bytes, before) && (rest.is_empty() || digits > 0) && agrees(&rest[digits..], after)
}

/// What of a file is kept.
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    bytes: usize,
    /// Step of the last line; 0 without any.
    last: u64,
}

/// Keeps lines up to step `committed`, whichever they begin with. `Err`: what is wrong with a file that has to be of ours alone.
fn survey(text: &[u8], committed: u64, strict: bool) -> Result<Kept, String> {
    let (mut at, mut before, mut kept) = (0, 0, Kept { bytes: 0, last: 0 });
    for (i, bytes) in text.split_inclusive(|b| *b == b'\n').enumerate() {
        at += bytes.len();
        match piece(bytes) {
            // A run that went on from a checkpoint with a file of an earlier one may have left steps out, and never goes back.
            Piece::Line(step) if strict && step <= before => {
                return Err(format!("line {} is of step {step}, after one of step {before}", i + 1));
            }
            Piece::Line(step) => {
                before = step;
                if step <= committed {
                    kept = Kept { bytes: at, last: step };
                }
            }
            Piece::Foreign if strict => {
                let text: String = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).trim_end().chars().collect();
                return Err(format!("line {} is none of a metrics file: {text:?}", i + 1));
            }
            Piece::Torn | Piece::Foreign => {}
        }
    }
    Ok(kept)
}

fn foreign(path: &Path, what: &str) -> EngineError {
    EngineError::new(
        ErrorKind::Output,
        format!("metrics file {}: {what}. It is left as it is: name another file as output.metrics, or move this one away", path.display()),
    )
}

/// Could the lines of a run that goes on from step `committed` be written into this file? To be asked before the work that they
/// keep. Changes nothing.
///
/// # Errors
/// It holds something else, or cannot be read.
pub(crate) fn check(path: &Path, committed: u64) -> Result<(), EngineError> {
    match path.metadata() {
        Ok(m) if m.is_file() => {
            let text = std::fs::read(path).map_err(|e| cannot(path, "read it", &e))?;
            survey(&text, committed, true).map_err(|what| foreign(path, &what)).map(drop)
        }
        _ => Ok(()),
    }
}

fn cannot(path: &Path, what: &str, e: &std::io::Error) -> EngineError {
    EngineError::new(ErrorKind::Output, format!("metrics file {}: cannot {what}: {e}", path.display()))
}

/// One file.
struct LineFile {
    path: PathBuf,
    file: File,
    /// A pipe or a device has no lines to keep, and may never end.
    regular: bool,
    /// What it holds, until training begins.
    text: Vec<u8>,
    bytes: u64,
    /// Step of the last line.
    last: u64,
}

impl LineFile {
    /// Opens the file and cuts off what will be written again. `strict`: nobody else may have written there.
    fn open(path: &Path, committed: u64, strict: bool) -> Result<LineFile, EngineError> {
        let fail = |what: &'static str| move |e: std::io::Error| cannot(path, what, &e);
        let folder = path.parent().unwrap_or(Path::new("/"));
        std::fs::create_dir_all(folder).map_err(fail("make its folder"))?;
        let is_new = !path.exists();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        if !strict {
            options.mode(0o640); // as everything in the state folder
        }
        let file = options.open(path).map_err(fail("open it"))?;
        let regular = file.metadata().map_err(fail("look at it"))?.is_file();
        let mut this = LineFile { path: path.to_path_buf(), file, regular, text: Vec::new(), bytes: 0, last: committed };
        if !regular {
            return Ok(this);
        }
        if is_new {
            // Its name has to outlive a power cut, too. Some file systems refuse that; they have their own ways.
            let _ = File::open(folder).and_then(|f| f.sync_all());
        }
        this.file.read_to_end(&mut this.text).map_err(fail("read it"))?;
        let kept = survey(&this.text, committed, strict).map_err(|what| foreign(path, &what))?;
        this.text.truncate(kept.bytes);
        (this.bytes, this.last) = (kept.bytes as u64, kept.last);
        this.file.set_len(this.bytes).map_err(fail("shorten it"))?;
        this.file.seek(SeekFrom::End(0)).map_err(fail("seek in it"))?;
        Ok(this)
    }

    /// Whether the line of this step has to be written. One that was loaded was run elsewhere, perhaps long ago: its line is that
    /// of a file that has all before it.
    fn lacks(&self, n: &StepNumbers) -> bool {
        // Numbers without tokens are not those of a whole step.
        n.step > 0 && n.tokens > 0 && self.last != n.step && (!n.loaded || self.last + 1 == n.step)
    }

    /// Adds whole lines, the last of this step. Where that fails, nothing of them stays.
    fn append(&mut self, lines: &[u8], last: u64) -> Result<(), EngineError> {
        // One write call, so that a line is torn only by a full disk.
        if let Err(e) = self.file.write_all(lines) {
            if self.regular {
                let _ = self.file.set_len(self.bytes).and_then(|()| self.file.seek(SeekFrom::End(0)));
            }
            return Err(cannot(&self.path, "write it", &e));
        }
        (self.bytes, self.last) = (self.bytes + lines.len() as u64, last);
        Ok(())
    }

    fn lines(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.text.split_inclusive(|b| *b == b'\n')
    }
}

/// The metrics files of a job; none, on ranks that write none.
#[derive(Default)]
pub(crate) struct Metrics {
    /// The job's own; none where it cannot be written.
    own: Option<LineFile>,
    /// The user's, where one was asked for.
    user: Option<LineFile>,
}

impl Metrics {
    /// Opens them where the run goes on from step `committed`. The user's gets what only the job's own has.
    ///
    /// # Errors
    /// The user's cannot be written. An event tells where it is somebody else's, which [`check`] has denied before training, or where the
    /// job's own cannot be written: both are of less worth than a run.
    pub fn open(user: Option<&Path>, history: &History, committed: u64, control: &dyn Control) -> Result<Metrics, EngineError> {
        let ours = |path: &&Path| match check(path, committed) {
            Ok(()) => true,
            Err(e) => {
                control.event(Level::Error, &format!("{e}. Steps are not written there until the next start"));
                false
            }
        };
        let mut user = user.filter(ours).map(|path| LineFile::open(path, committed, true)).transpose()?;
        let own = LineFile::open(&history.path, committed, false).map_err(|e| tell_of_own(control, &e)).ok();
        if let (Some(user), Some(own)) = (&mut user, &own) {
            let missing = own.lines().filter(|l| matches!(piece(l), Piece::Line(step) if step > user.last));
            let missing = missing.collect::<Vec<_>>().concat();
            if !missing.is_empty() {
                user.append(&missing, own.last)?;
            }
        }
        if let Some(user) = user.as_ref().filter(|u| u.last > 0 && u.last + 1 < committed) {
            let text = format!(
                "metrics file {} ends with step {}, and the run goes on from step {committed}: the steps between are not in it",
                user.path.display(),
                user.last
            );
            control.event(Level::Warn, &text);
        }
        Ok(Metrics { own, user })
    }

    /// Whether the line of this step, the committed one, is missing.
    pub fn lacks(&self, n: &StepNumbers) -> bool {
        [&self.own, &self.user].into_iter().flatten().any(|file| file.lacks(n))
    }

    /// Adds the line of the committed step where it is missing.
    ///
    /// # Errors
    /// The user's cannot be written.
    pub fn add_missing(&mut self, n: &StepNumbers) -> Result<(), EngineError> {
        let line = encode(&n.metrics())?;
        for file in [&mut self.own, &mut self.user].into_iter().flatten().filter(|file| file.lacks(n)) {
            file.append(&line, n.step)?;
            file.text.extend_from_slice(&line);
        }
        Ok(())
    }

    /// The lines up to the committed step that a daemon does not know whose last one is of step `told`. For a start; what was
    /// read of the files is forgotten.
    pub fn untold(&mut self, told: u64, committed: u64) -> Vec<(StepMetrics, String)> {
        let mut lines = Vec::new();
        // Steps come one after the other: what lies before a gap stays in the file.
        let mut next = committed;
        for line in self.own.iter().flat_map(|own| own.lines().rev()).take_while(|_| told < committed) {
            match serde_json::from_slice::<StepMetrics>(line) {
                Ok(m) if m.step == next && next > told => lines.push((m, String::from_utf8_lossy(line).trim_end().to_string())),
                _ => break,
            }
            next -= 1;
        }
        lines.reverse();
        for file in [&mut self.own, &mut self.user].into_iter().flatten() {
            file.text = Vec::new();
        }
        lines
    }

    /// Adds the line of a step that has just been committed; returns it.
    ///
    /// # Errors
    /// The user's file cannot be written.
    pub fn write(&mut self, m: &StepMetrics, control: &dyn Control) -> Result<String, EngineError> {
        let line = encode(m)?;
        if let Some(Err(e)) = self.own.as_mut().map(|own| own.append(&line, m.step)) {
            tell_of_own(control, &e);
            self.own = None;
        }
        hit(Point::StepNoted);
        if let Some(user) = &mut self.user {
            user.append(&line, m.step)?;
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_string())
    }

    /// What makes them durable.
    pub fn durable(&self) -> Durable {
        let files = [&self.own, &self.user].into_iter().flatten().filter(|f| f.regular);
        Durable(files.filter_map(|f| Some((f.path.clone(), f.file.try_clone().ok()?))).collect())
    }
}

/// Makes metrics files durable, from any thread.
#[derive(Default)]
pub(crate) struct Durable(Vec<(PathBuf, File)>);

impl Durable {
    /// Returns once all lines that were written before are on the disk. An event tells where that fails: what is made durable
    /// next is worth more than they are.
    pub fn sync(&self, control: &dyn Control) {
        for (path, file) in &self.0 {
            if let Err(e) = file.sync_data() {
                let text = format!("metrics file {}: cannot make it durable: {e}; a power cut may cost its last lines", path.display());
                control.event(Level::Warn, &text);
            }
        }
    }
}

fn encode(m: &StepMetrics) -> Result<Vec<u8>, EngineError> {
    let mut line = serde_json::to_vec(m).map_err(EngineError::internal)?;
    line.push(b'\n');
    Ok(line)
}

fn tell_of_own(control: &dyn Control, e: &EngineError) {
    let text = format!("{e}; what is known of this job's steps after a restart will have gaps");
    control.event(Level::Warn, &text);
}

/// Opens a user's metrics file as the first rank of a gang does; returns the step of the last line that was kept.
#[cfg(fuzzing)]
pub(crate) fn recover(path: &Path, committed: u64) -> Result<u64, EngineError> {
    LineFile::open(path, committed, true).map(|file| file.last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Command, RankTrace};
    use std::sync::Mutex;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Control for Heard {
        fn heartbeat(&self, _: u64, _: &'static str) {}
        fn metrics(&self, _: &StepMetrics, _: &str) {}
        fn event(&self, _: Level, text: &str) {
            self.0.lock().unwrap().push(text.into());
        }
        fn progress(&self, _: &str, _: u64, _: u64) {}
        fn token(&self, _: usize, _: &str) {}
        fn checkpoint(&self, _: &Path, _: u64, _: u64, _: Option<&str>) {}
        fn trace(&self, _: u64, _: RankTrace) {}
        fn command(&self) -> Option<Command> {
            None
        }
    }

    fn numbers(step: u64) -> StepNumbers {
        StepNumbers { step, loss: 1.0 / step as f64, tokens: 7, tokens_total: 7 * step, validation_loss: f64::NAN, ..Default::default() }
    }

    fn line(step: u64) -> String {
        String::from_utf8(encode(&numbers(step).metrics()).unwrap()).unwrap()
    }

    fn lines(steps: impl IntoIterator<Item = u64>) -> String {
        steps.into_iter().map(line).collect()
    }

    /// A folder with both files; `None` where one is not there.
    fn folder(own: Option<&str>, user: Option<&str>) -> (tempfile::TempDir, History, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let (history, path) = (History { path: dir.path().join("own"), told: 0 }, dir.path().join("m/user"));
        std::fs::create_dir(dir.path().join("m")).unwrap();
        for (path, text) in [(&history.path, own), (&path, user)] {
            text.into_iter().for_each(|text| std::fs::write(path, text).unwrap());
        }
        (dir, history, path)
    }

    fn kept(text: &str, committed: u64) -> Option<(String, u64)> {
        let kept = survey(text.as_bytes(), committed, true).ok()?;
        Some((text[..kept.bytes].to_string(), kept.last))
    }

    #[test]
    fn only_lines_past_the_committed_step_and_torn_ones_go() {
        for first in [1, 101] {
            let whole = lines(first..first + 3);
            for tail in [String::new(), line(first + 3)[..9].into(), line(first + 3).trim_end().into(), "\0\0\0".into(), "{\"st".into()] {
                let text = whole.clone() + &tail;
                for committed in first - 1..first + 4 {
                    let last = if committed < first { 0 } else { committed.min(first + 2) };
                    let expected = lines(first..=committed.min(first + 2));
                    assert_eq!(kept(&text, committed), Some((expected, last)), "{committed} of {text:?}");
                }
            }
        }
        assert_eq!(kept("", 9), Some((String::new(), 0)));
    }

    /// A run that goes on from a checkpoint of step 100 with a file that ends with step 2 writes 101 next.
    #[test]
    fn lines_after_a_gap_are_kept() {
        let text = lines([1, 2, 101, 102]);
        assert_eq!(kept(&text, 102), Some((text.clone(), 102)));
        assert_eq!(kept(&text, 101), Some((lines([1, 2, 101]), 101)));
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let not_ours = ["hello\n", "hello", "{\"step\":1}\n", "{\"step\":1,\"loss\":2.0,\"learning_rate\":3}\n", "\n", "{\"step\":x", "[]"];
        for text in not_ours {
            for before in [String::new(), lines(1..4)] {
                for committed in [0, 2, 9] {
                    assert_eq!(kept(&(before.clone() + text), committed), None, "{text:?}");
                }
            }
        }
        assert_eq!(kept(&lines([1, 2, 2]), 9), None);
        let (_dir, history, path) = folder(None, Some("# my results\nloss 2\n"));
        let (e, heard) = (check(&path, 9).unwrap_err(), Heard::default());
        assert_eq!(e.kind, ErrorKind::Output);
        let mut metrics = Metrics::open(Some(&path), &history, 9, &heard).unwrap();
        metrics.write(&numbers(10).metrics(), &heard).unwrap();
        assert_eq!(std::fs::read_to_string(&history.path).unwrap(), line(10));
        for text in [&e.message, &heard.0.lock().unwrap()[0]] {
            assert!(text.contains(path.to_str().unwrap()) && text.contains("# my results"), "{text}");
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# my results\nloss 2\n");
    }

    #[test]
    fn a_death_before_a_line_costs_none() {
        // The step was committed; died before the first write, before the second, and after both.
        for (own, user) in [(15, 15), (16, 15), (16, 16)] {
            let (_dir, history, path) = folder(Some(&lines(13..=own)), Some(&lines(1..=user)));
            let mut metrics = Metrics::open(Some(&path), &history, 16, &Heard::default()).unwrap();
            assert_eq!(metrics.lacks(&numbers(16)), own == 15);
            metrics.add_missing(&numbers(16)).unwrap();
            let told: Vec<u64> = metrics.untold(14, 16).iter().map(|(m, _)| m.step).collect();
            assert_eq!(told, [15, 16]);
            metrics.write(&numbers(17).metrics(), &Heard::default()).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=17));
            assert_eq!(std::fs::read_to_string(&history.path).unwrap(), lines(13..=17));
        }
        // The very first line of a run that goes on with an empty file, or none.
        let (_dir, history, path) = folder(None, None);
        let mut metrics = Metrics::open(Some(&path), &history, 13, &Heard::default()).unwrap();
        metrics.add_missing(&numbers(13)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), line(13));
        assert_eq!(metrics.untold(0, 13).len(), 1);
    }

    #[test]
    fn the_line_of_a_loaded_step_is_written_where_all_before_it_are() {
        let loaded = StepNumbers { loaded: true, ..numbers(10) };
        for (own, user, expected) in [("", "", ""), ("", &lines(1..=9)[..], &lines(1..=10)[..]), ("", &lines(1..=8)[..], &lines(1..=8)[..])]
        {
            let (_dir, history, path) = folder(Some(own), Some(user));
            let heard = Heard::default();
            let mut metrics = Metrics::open(Some(&path), &history, 10, &heard).unwrap();
            metrics.add_missing(&loaded).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
            assert_eq!(std::fs::read_to_string(&history.path).unwrap(), "", "another job ran it");
            assert_eq!(heard.0.lock().unwrap().len(), usize::from(user == lines(1..=8)), "a gap is told");
        }
    }

    #[test]
    fn the_jobs_own_file_brings_back_what_the_users_lost() {
        let (_dir, history, path) = folder(Some(&(lines(3..=8) + &line(9)[..20])), None);
        let mut metrics = Metrics::open(Some(&path), &history, 8, &Heard::default()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(3..=8));
        assert!(!metrics.lacks(&numbers(8)));
        assert_eq!(metrics.untold(8, 8), []);
        metrics.durable().sync(&Heard::default());
        assert_eq!(metrics.durable().0.len(), 2);
    }

    /// Lines of an earlier version's daemon had steps twice where they were run again.
    #[test]
    fn the_jobs_own_file_is_never_refused() {
        for (text, committed, left) in [
            (lines([1, 2, 3, 2, 3]), 2, lines([1, 2, 3, 2])),
            ("what is this".to_string(), 2, String::new()),
            (line(1) + "x\n" + &line(2), 2, line(1) + "x\n" + &line(2)),
        ] {
            let (_dir, history, _) = folder(Some(&text), None);
            let mut metrics = Metrics::open(None, &history, committed, &Heard::default()).unwrap();
            assert_eq!(std::fs::read_to_string(&history.path).unwrap(), left);
            metrics.untold(0, committed);
        }
        let history = History { path: "/proc/none/own".into(), told: 0 };
        let heard = Heard::default();
        let mut metrics = Metrics::open(None, &history, 1, &heard).unwrap();
        assert!(heard.0.lock().unwrap()[0].contains("/proc/none/own"));
        metrics.write(&numbers(2).metrics(), &heard).unwrap();
    }

    #[test]
    fn a_pipe_has_no_lines() {
        let (_dir, history, _) = folder(None, None);
        let mut metrics = Metrics::open(Some(Path::new("/dev/null")), &history, 5, &Heard::default()).unwrap();
        metrics.write(&numbers(6).metrics(), &Heard::default()).unwrap();
        assert_eq!(metrics.durable().0.len(), 1);
    }
}
