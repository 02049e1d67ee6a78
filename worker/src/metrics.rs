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
//!
//! A disk that is full or broken ends no training. An event tells of it, and every later step tries again: the user's file gets what
//! it lacks from the job's own, which gets it from memory. So a line is lost only of steps that could not be written to the job's own
//! file before the process died, and of those beyond [`OWED_MAX`].

use crate::api::{Control, EngineError, ErrorKind, History, Level, StepMetrics};
use crate::record::StepNumbers;
use ramtorch_failpoint::{Point, hit};
use serde::de::IgnoredAny;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of lines that are kept in memory while the job's own file cannot be written: some ten thousand steps.
const OWED_MAX: usize = 8 << 20;
/// Bytes that are made up at a time.
const PIECE: u64 = 1 << 20;

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

/// Why a file could not be opened.
struct Unopened {
    error: EngineError,
    /// Of the disk, which may have room again, or be there again; not of the path that was asked for.
    of_disk: bool,
}

fn of_disk(e: &std::io::Error) -> bool {
    use nix::errno::Errno::{EDQUOT, EIO, EMFILE, ENFILE, ENOLINK, ENOMEM, ENOSPC, ENXIO, ESTALE, ETIMEDOUT};
    let such = [EDQUOT, EIO, EMFILE, ENFILE, ENOLINK, ENOMEM, ENOSPC, ENXIO, ESTALE, ETIMEDOUT];
    e.raw_os_error().is_some_and(|code| such.iter().any(|errno| *errno as i32 == code))
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
    fn open(path: &Path, committed: u64, strict: bool) -> Result<LineFile, Unopened> {
        let fail = |what: &'static str| move |e: std::io::Error| Unopened { error: cannot(path, what, &e), of_disk: of_disk(&e) };
        let folder = path.parent().unwrap_or(Path::new("/"));
        if strict {
            crate::places::check("metrics file", path).map_err(|error| Unopened { error, of_disk: false })?;
        }
        std::fs::create_dir_all(folder).map_err(fail("make its folder"))?;
        let is_new = !path.exists();
        #[cfg(test)]
        if is_new {
            tests::room_for(path, 1).map_err(fail("open it"))?;
        }
        let file = match strict {
            true => crate::places::open(path),
            // 0640 as everything in the state folder.
            false => OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o640).open(path),
        };
        let file = file.map_err(fail("open it"))?;
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
        let refused = |what: String| Unopened { error: foreign(path, &what), of_disk: false };
        let kept = survey(&this.text, committed, strict).map_err(refused)?;
        this.text.truncate(kept.bytes);
        (this.bytes, this.last) = (kept.bytes as u64, kept.last);
        this.cut().map_err(fail("shorten it"))?;
        Ok(this)
    }

    /// Cuts off what is past the last whole line.
    fn cut(&mut self) -> std::io::Result<()> {
        self.file.set_len(self.bytes)?;
        self.file.seek(SeekFrom::Start(self.bytes)).map(drop)
    }

    /// Whether the line of this step has to be written. One that was loaded was run elsewhere, perhaps long ago: its line is that
    /// of a file that has all before it.
    fn lacks(&self, n: &StepNumbers) -> bool {
        // Numbers without tokens are not those of a whole step.
        n.step > 0 && n.tokens > 0 && self.last != n.step && (!n.loaded || self.last + 1 == n.step)
    }

    /// Adds whole lines, the last of this step. Where that fails, nothing of them stays, or it is cut off before the next try.
    fn append(&mut self, lines: &[u8], last: u64) -> Result<(), EngineError> {
        // One write call, so that a line is torn only by a full disk.
        if let Err(e) = self.write(lines) {
            if self.regular {
                let _ = self.cut();
            }
            return Err(cannot(&self.path, "write it", &e));
        }
        (self.bytes, self.last) = (self.bytes + lines.len() as u64, last);
        Ok(())
    }

    fn write(&mut self, lines: &[u8]) -> std::io::Result<()> {
        // A broken disk may have kept what failed before: a place that is not the end of the last line is not written to.
        if self.regular && self.file.metadata()?.len() > self.bytes {
            self.cut()?;
        }
        #[cfg(test)]
        if let Err((e, room)) = tests::room_for(&self.path, lines.len()).map_err(|e| (e, tests::take_room(&self.path))) {
            self.file.write_all(&lines[..room])?;
            return Err(e);
        }
        self.file.write_all(lines)
    }

    /// Adds those of these lines that are of later steps than the last one.
    fn append_later(&mut self, lines: &[u8]) -> Result<(), EngineError> {
        let (mut later, mut last) = (Vec::new(), self.last);
        for line in lines.split_inclusive(|b| *b == b'\n') {
            if let Piece::Line(step) = piece(line) {
                if step > last {
                    later.extend_from_slice(line);
                    last = step;
                }
            }
        }
        if later.is_empty() { Ok(()) } else { self.append(&later, last) }
    }

    /// Whole lines from here on, [`PIECE`] at most, and where the next ones begin.
    fn read(&self, from: u64) -> Result<(Vec<u8>, u64), EngineError> {
        let mut length = (self.bytes - from.min(self.bytes)).min(PIECE);
        loop {
            let mut piece = vec![0; usize::try_from(length).map_err(EngineError::internal)?];
            self.file.read_exact_at(&mut piece, from).map_err(|e| cannot(&self.path, "read it", &e))?;
            match piece.iter().rposition(|b| *b == b'\n') {
                Some(end) => piece.truncate(end + 1),
                // No line of ours is so long; the file may hold anything else.
                None if from + length < self.bytes => {
                    length = (2 * length).min(self.bytes - from);
                    continue;
                }
                None => {}
            }
            let next = from + piece.len() as u64;
            return Ok((piece, next));
        }
    }

    fn lines(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.text.split_inclusive(|b| *b == b'\n')
    }
}

/// A file that may be in no state to be written for a while.
struct Target {
    path: PathBuf,
    /// The step that training went on from.
    committed: u64,
    strict: bool,
    file: Option<LineFile>,
    /// An event has told that it cannot be written, and none that it can be again.
    troubled: bool,
}

impl Target {
    fn open(path: &Path, committed: u64, strict: bool) -> (Target, Option<Unopened>) {
        let (file, why) = match LineFile::open(path, committed, strict) {
            Ok(file) => (Some(file), None),
            Err(e) => (None, Some(e)),
        };
        (Target { path: path.to_path_buf(), committed, strict, file, troubled: false }, why)
    }

    /// The file, opened by now.
    fn ready(&mut self, durable: &Durable) -> Result<&mut LineFile, EngineError> {
        if self.file.is_none() {
            let mut file = LineFile::open(&self.path, self.committed, self.strict).map_err(|e| e.error)?;
            file.text = Vec::new();
            durable.add(&file);
            self.file = Some(file);
        }
        self.file.as_mut().ok_or_else(|| EngineError::internal("a metrics file is neither open nor refused"))
    }

    /// Tells of a change for the worse or the better, once.
    fn tell(&mut self, control: &dyn Control, done: &Result<(), EngineError>, what_then: &str) {
        match done {
            Err(e) if !self.troubled => {
                self.troubled = true;
                control.event(Level::Warn, &format!("{e}. Training goes on, and every step tries again; {what_then}"));
            }
            Ok(()) if self.troubled => {
                self.troubled = false;
                control.event(Level::Info, &format!("metrics file {} is written again", self.path.display()));
            }
            _ => {}
        }
    }
}

/// The job's own file.
struct Own {
    target: Target,
    /// Lines that are not in the file yet: all that come after the first which could not be written.
    owed: Vec<u8>,
    /// Some of them were given up.
    forgot: bool,
}

impl Own {
    fn add(&mut self, line: &[u8], control: &dyn Control, durable: &Durable) {
        self.owed.extend_from_slice(line);
        let owed = std::mem::take(&mut self.owed);
        let done = self.target.ready(durable).and_then(|file| file.append_later(&owed));
        if done.is_err() {
            self.owed = owed;
            if self.owed.len() > OWED_MAX {
                let excess = self.owed.len() - OWED_MAX;
                let end = self.owed[excess..].iter().position(|b| *b == b'\n').map_or(self.owed.len(), |at| excess + at + 1);
                self.owed.drain(..end);
                if !std::mem::replace(&mut self.forgot, true) {
                    let path = self.target.path.display();
                    control.event(
                        Level::Warn,
                        &format!("metrics file {path}: it lacks more lines than are kept in memory; the oldest are lost"),
                    );
                }
            }
        }
        self.target.tell(control, &done, "until then its lines are in memory alone, and a death of this process would lose them");
    }

    /// Where its file ends.
    fn end(&self) -> u64 {
        self.target.file.as_ref().map_or(0, |f| f.bytes)
    }
}

/// The user's file.
struct Wanted {
    target: Target,
    /// It lacks lines: none of those that begin before this place of the job's own file.
    behind: Option<u64>,
    /// The line of a step that was loaded, which no file of this job has.
    loaded: Option<(StepNumbers, Vec<u8>)>,
}

impl Wanted {
    /// Adds what it lacks.
    fn catch_up(&mut self, own: &Own, durable: &Durable) -> Result<(), EngineError> {
        let Some(mut at) = self.behind else { return Ok(()) };
        let file = self.target.ready(durable)?;
        if let Some((n, line)) = self.loaded.as_ref().filter(|(n, _)| file.lacks(n)) {
            file.append(line, n.step)?;
        }
        self.loaded = None;
        if let Some(source) = &own.target.file {
            while at < source.bytes {
                let (lines, next) = source.read(at)?;
                file.append_later(&lines)?;
                at = next;
                self.behind = Some(at);
            }
        }
        file.append_later(&own.owed)?;
        self.behind = None;
        Ok(())
    }

    fn add(&mut self, line: &[u8], step: u64, before: u64, own: &Own, durable: &Durable) -> Result<(), EngineError> {
        if self.behind.is_none() {
            let done = self.target.ready(durable)?.append(line, step);
            // Lines that the job's own file owes as well are found by their steps.
            self.behind = done.is_err().then_some(before);
            return done;
        }
        self.catch_up(own, durable)
    }

    fn tell(&mut self, control: &dyn Control, done: &Result<(), EngineError>) {
        self.target.tell(control, done, "it will get what it lacks from the job's own file");
    }
}

/// The metrics files of a job; none, on ranks that write none.
#[derive(Default)]
pub(crate) struct Metrics {
    /// The job's own.
    own: Option<Own>,
    /// The user's, where one was asked for.
    user: Option<Wanted>,
    durable: Durable,
}

impl Metrics {
    /// Opens them where the run goes on from step `committed`. The user's gets what only the job's own has.
    ///
    /// # Errors
    /// The user's cannot be written, and that is not the disk's fault, before this job has made a step: better said then than after
    /// days. An event tells of all else, which is of less worth than a run: of a file that is somebody else's, which [`check`] has denied
    /// before training, and of one that cannot be written now.
    pub fn open(user: Option<&Path>, history: &History, committed: u64, control: &dyn Control) -> Result<Metrics, EngineError> {
        let ours = |path: &&Path| match check(path, committed) {
            Ok(()) => true,
            Err(e) => {
                control.event(Level::Error, &format!("{e}. Steps are not written there until the next start"));
                false
            }
        };
        let (target, why) = Target::open(&history.path, committed, false);
        let mut own = Own { target, owed: Vec::new(), forgot: false };
        if let Some(why) = why {
            own.target.tell(control, &Err(why.error), "until then what is known of this job's steps after a restart will have gaps");
        }
        let mut wanted = None;
        if let Some(path) = user.filter(ours) {
            let (target, why) = Target::open(path, committed, true);
            let mut user = Wanted { target, behind: Some(0), loaded: None };
            let done = match why {
                Some(why) if !why.of_disk && history.told == 0 => return Err(why.error),
                Some(why) => Err(why.error),
                None => user.catch_up(&own, &Durable::default()),
            };
            user.tell(control, &done);
            wanted = Some(user);
        }
        let whole = wanted.as_ref().filter(|u| u.behind.is_none()).and_then(|u| u.target.file.as_ref());
        if let Some(user) = whole.filter(|u| u.last > 0 && u.last + 1 < committed) {
            let text = format!(
                "metrics file {} ends with step {}, and the run goes on from step {committed}: the steps between are not in it",
                user.path.display(),
                user.last
            );
            control.event(Level::Warn, &text);
        }
        let durable = Durable::default();
        for file in [own.target.file.as_ref(), wanted.as_ref().and_then(|u| u.target.file.as_ref())].into_iter().flatten() {
            durable.add(file);
        }
        Ok(Metrics { own: Some(own), user: wanted, durable })
    }

    /// Whether the line of this step, the committed one, is missing.
    pub fn lacks(&self, n: &StepNumbers) -> bool {
        let own = self.own.as_ref().map(|o| o.target.file.as_ref());
        let user = self.user.as_ref().map(|u| u.target.file.as_ref());
        // Of one that cannot be opened it is not known: then its line is made, and written where it is missing.
        [own, user].into_iter().flatten().any(|file| file.map_or(n.step > 0 && n.tokens > 0, |file| file.lacks(n)))
    }

    /// Adds the line of the committed step where it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn add_missing(&mut self, n: &StepNumbers, control: &dyn Control) -> Result<(), EngineError> {
        let line = encode(&n.metrics())?;
        let Some(own) = &mut self.own else { return Ok(()) };
        let before = own.end();
        // A step that was loaded is another job's, unless all steps before it are there.
        let missing = match &own.target.file {
            Some(file) => file.lacks(n),
            None => !n.loaded && n.step > 0 && n.tokens > 0,
        };
        if missing {
            own.add(&line, control, &self.durable);
            if let Some(file) = &mut own.target.file {
                file.text.extend_from_slice(&line);
            }
        }
        if let Some(user) = &mut self.user {
            let done = match (&user.behind, &user.target.file) {
                (None, Some(file)) if file.lacks(n) => user.add(&line, n.step, before, own, &self.durable),
                (None, _) => Ok(()),
                (Some(_), _) => {
                    user.loaded = n.loaded.then_some((*n, line));
                    user.catch_up(own, &self.durable)
                }
            };
            user.tell(control, &done);
        }
        Ok(())
    }

    /// The lines up to the committed step that a daemon does not know whose last one is of step `told`. For a start; what was
    /// read of the files is forgotten.
    pub fn untold(&mut self, told: u64, committed: u64) -> Vec<(StepMetrics, String)> {
        let mut lines = Vec::new();
        // Steps come one after the other: what lies before a gap stays in the file.
        let mut next = committed;
        let own = self.own.as_ref().and_then(|o| o.target.file.as_ref());
        for line in own.iter().flat_map(|own| own.lines().rev()).take_while(|_| told < committed) {
            match serde_json::from_slice::<StepMetrics>(line) {
                Ok(m) if m.step == next && next > told => lines.push((m, String::from_utf8_lossy(line).trim_end().to_string())),
                _ => break,
            }
            next -= 1;
        }
        lines.reverse();
        let own = self.own.as_mut().and_then(|o| o.target.file.as_mut());
        let user = self.user.as_mut().and_then(|u| u.target.file.as_mut());
        for file in [own, user].into_iter().flatten() {
            file.text = Vec::new();
        }
        lines
    }

    /// Adds the line of a step that has just been committed; returns it. Where a file cannot be written, an event tells, and the next
    /// step tries again.
    ///
    /// # Errors
    /// The line cannot be made.
    pub fn write(&mut self, m: &StepMetrics, control: &dyn Control) -> Result<String, EngineError> {
        let line = encode(m)?;
        let Some(own) = &mut self.own else { return Err(EngineError::internal("this rank has no metrics files")) };
        let before = own.end();
        own.add(&line, control, &self.durable);
        hit(Point::StepNoted);
        if let Some(user) = &mut self.user {
            let done = user.add(&line, m.step, before, own, &self.durable);
            user.tell(control, &done);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_string())
    }

    /// A last try for what could not be written; an event tells what stays missing.
    pub fn close(&mut self, control: &dyn Control) {
        let Some(own) = &mut self.own else { return };
        if !own.owed.is_empty() {
            own.add(&[], control, &self.durable);
        }
        if let Some(user) = self.user.as_mut().filter(|u| u.behind.is_some()) {
            let done = user.catch_up(own, &self.durable);
            if done.is_ok() {
                return user.tell(control, &done);
            }
            let last = user.target.file.as_ref().map_or(0, |f| f.last);
            let text =
                format!("metrics file {} has no step after {last}; {} has them", user.target.path.display(), own.target.path.display());
            control.event(Level::Error, &text);
        }
    }

    /// What makes them durable.
    pub fn durable(&self) -> Durable {
        self.durable.clone()
    }
}

/// Makes metrics files durable, from any thread.
#[derive(Default, Clone)]
pub(crate) struct Durable(Arc<Mutex<Vec<(PathBuf, Arc<File>)>>>);

impl Durable {
    fn files(&self) -> MutexGuard<'_, Vec<(PathBuf, Arc<File>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, file: &LineFile) {
        if let (true, Ok(again)) = (file.regular, file.file.try_clone()) {
            self.files().push((file.path.clone(), Arc::new(again)));
        }
    }

    /// Returns once all lines that were written before are on the disk. An event tells where that fails: what is made durable
    /// next is worth more than they are.
    pub fn sync(&self, control: &dyn Control) {
        // Not under the lock, which the step loop may want meanwhile.
        let files = self.files().clone();
        for (path, file) in &files {
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

/// Opens a user's metrics file as the first rank of a gang does; returns the step of the last line that was kept.
#[cfg(fuzzing)]
pub(crate) fn recover(path: &Path, committed: u64) -> Result<u64, EngineError> {
    LineFile::open(path, committed, true).map(|file| file.last).map_err(|e| e.error)
}

#[cfg(test)]
mod tests;
