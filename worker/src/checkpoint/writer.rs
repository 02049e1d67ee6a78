//! Checkpoints that are written while training goes on.
//!
//! ```text
//!   step loop ── announce(s) ──► optimizer's thread, right after step s is committed: begin(s)
//!                                   │ waits for the checkpoint before it; pins the rank's pages at step s
//!                                   ▼
//!   idle ───────────────────► copying ─────────────► writing ─────────────► agreed ─────────────► idle
//!    ▲                   each page is copied to    what is staged goes    all ranks' parts are   rename, `latest`,
//!    │                   the stage, or written     to the disk; fsync     durable                older ones go
//!    │                   where that is full, and             │                  │
//!    │                   let go                              │                  │
//!    └─────── a full disk, any rank's error, a stop: what was written is removed, an event says so
//! ```
//! Forward and backward of step s+1 overwrite nothing. Its optimizer waits for a page alone where the spare that it would
//! take still holds state of step s (see [`ramtorch_store::Snapshot`]); pages are copied in the order in which it comes.
//!
//! Two threads a rank and checkpoint: one copies, the other writes and takes part in the gang's agreements, which are a
//! sequence of collectives of their own. Every rank makes the same gathers whatever fails, and a rank that cannot go on at
//! all aborts the gang, so nobody is left waiting. A checkpoint that falls due while one is written waits for it; training
//! goes on to the end of the next backward pass meanwhile.

use super::first::FirstCheckpoint;
use super::link::{CloseOnDrop, Link};
use super::stage::{Stage, Staged};
use crate::api::*;
use crate::errors;
use crate::metrics::Durable;
use crate::record::StepNumbers;
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_device::caught;
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::JobSpec;
use ramtorch_modelio::{
    Architecture, CheckpointFiles, CheckpointMeta, CheckpointWriter, Committed, ModelError, checkpoint_folder_name, resolve,
};
use ramtorch_store::{SharedOwner, Snapshot, StepPhase, Store};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// A checkpoint of a committed step.
#[derive(Debug)]
pub(crate) struct Due {
    pub step: u64,
    pub tokens_total: u64,
    /// Those of the step's record.
    pub values: Vec<f64>,
    /// One above the number of the request that it answers; 0 for none.
    pub request: u64,
}

impl Due {
    /// A checkpoint of the step that these are the numbers of.
    pub fn of(numbers: &StepNumbers, request: u64) -> Due {
        let values = numbers.record(StepPhase::Committed).values.to_vec();
        Due { step: numbers.step, tokens_total: numbers.tokens_total, values, request }
    }
}

/// One rank's checkpoints. See the module.
pub(crate) struct Checkpoints<'a> {
    spec: &'a JobSpec,
    architecture: &'a Architecture,
    steps: u64,
    store: &'a Store,
    comm: &'a Collectives,
    control: &'a dyn Control,
    /// What becomes durable before a checkpoint.
    lines: Option<&'a Durable>,
    /// Tells that the job may have a checkpoint.
    first: Option<FirstCheckpoint>,
    stage: Stage,
    pool: rayon::ThreadPool,
    state: Mutex<State>,
    changed: Condvar,
    /// The job stops without waiting for a checkpoint.
    given_up: AtomicBool,
    /// No step follows.
    over: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Announced, and not ended.
    announced: u64,
    /// Step of the one that is being written.
    writing: Option<u64>,
    newest: Option<PathBuf>,
    missing_result: Option<EngineError>,
    /// Of a thread that wrote one: it ended the gang.
    panic: Option<EngineError>,
}

/// What became of one.
struct Written {
    checkpoint: Committed,
    /// Until the last page was let go.
    copied: Duration,
    /// The longest that a rank's optimizer stood still.
    stall: f64,
}

impl<'a> Checkpoints<'a> {
    /// `threads`: how many copy; `staging`: bytes of this rank's stage.
    pub fn new(
        spec: &'a JobSpec,
        architecture: &'a Architecture,
        steps: u64,
        store: &'a Store,
        comm: &'a Collectives,
        control: &'a dyn Control,
        threads: usize,
        staging: u64,
    ) -> Result<Self, EngineError> {
        let rank = comm.rank();
        let threads = if spec.checkpoint.path.is_some() { threads } else { 1 };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(move |i| format!("snapshot{rank}-{i}"));
        let pool =
            pool.build().map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start threads for checkpoints: {e}")))?;
        let stage = Stage::new(staging, store.layout());
        let (state, changed) = (Mutex::default(), Condvar::new());
        let (given_up, over) = (AtomicBool::new(false), AtomicBool::new(false));
        let (lines, first) = (None, None);
        Ok(Checkpoints { spec, architecture, steps, store, comm, control, lines, first, stage, pool, state, changed, given_up, over })
    }

    /// Whoever finds a checkpoint after a power cut finds the lines of its steps.
    pub fn with_lines(self, lines: &'a Durable) -> Self {
        Checkpoints { lines: Some(lines), ..self }
    }

    /// Whoever begins the job again after a reboot is told that it may have one.
    pub fn with_note(self, first: FirstCheckpoint) -> Self {
        Checkpoints { first: Some(first), ..self }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leader(&self) -> bool {
        self.comm.rank() == 0
    }

    /// Makes the stage ready on a thread beside the first steps, where a checkpoint will fall due: the memory of a process
    /// costs most when it is touched for the first time.
    pub fn warm<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        if self.spec.checkpoint.every_steps == 0 {
            return;
        }
        let thread = std::thread::Builder::new().name(format!("stage{}", self.comm.rank()));
        let run = || loop {
            if self.over.load(Ordering::Relaxed) || self.comm.aborted() || !self.stage.warm_one() {
                return;
            }
        };
        // Without it, the first checkpoint takes longer.
        drop(thread.spawn_scoped(scope, run));
    }

    /// One more will be begun: [`Checkpoints::finish`] waits for it.
    pub fn announce(&self) {
        self.lock().announced += 1;
    }

    /// Whether one was announced and has not ended.
    pub fn under_way(&self) -> bool {
        self.lock().announced > 0
    }

    /// Begins one that was announced. To be called when its step is committed and no page is beyond it, by every rank in the
    /// same order. Returns once the step's state is held; waits for the checkpoint before it.
    ///
    /// # Errors
    /// No thread can be started, or a page is at another step. The gang cannot go on.
    pub fn begin<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        owner: &'scope SharedOwner<'_>,
        due: Due,
    ) -> Result<(), EngineError> {
        let ending = Ending(self);
        let Some(folder) = self.spec.checkpoint.path.as_deref() else {
            if self.leader() && due.request > 0 {
                self.control.checkpoint(Path::new(""), due.step, due.request - 1, Some("the job has no [checkpoint] path"));
            }
            return Ok(());
        };
        let waits = Instant::now();
        let mut state = self.lock();
        let before = state.writing;
        while state.writing.is_some() && !self.comm.aborted() {
            state = self.changed.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner).0;
        }
        if self.comm.aborted() || self.given_up.load(Ordering::Acquire) {
            return Ok(());
        }
        state.writing = Some(due.step);
        drop(state);
        let waited = waits.elapsed().as_secs_f64();
        if let Some(before) = before.filter(|_| self.leader() && waited >= 1.0) {
            let text = format!(
                "the checkpoint of step {} waited {waited:.1} s for that of step {before}: they fall due faster than they are written",
                due.step
            );
            self.control.event(Level::Warn, &text);
        }
        let snapshot = owner.snapshot(due.step)?;
        hit(Point::CheckpointPinned);
        let (begun, waited) = (Instant::now(), owner.waited());
        let run = move || {
            let ending = ending;
            let ended = caught("the checkpoint's thread", || {
                let result = self.write(folder, &due, snapshot, begun, || owner.waited().saturating_sub(waited));
                hit(Point::CheckpointDone);
                self.tell(folder, &due, result, begun.elapsed());
                Ok(())
            });
            if let Err(panic) = ended {
                self.lock().panic = Some(panic);
                self.comm.abort(); // the other ranks wait for this one's agreement
            }
            drop(ending);
        };
        let thread = std::thread::Builder::new().name(format!("checkpoint{}", self.comm.rank()));
        let cannot = |e| EngineError::new(ErrorKind::Resources, format!("cannot start the checkpoint's thread: {e}"));
        thread.spawn_scoped(scope, run).map_err(cannot).map(drop)
    }

    /// Whether the one that is under way should go on.
    fn goes_on(&self) -> Result<(), EngineError> {
        if self.given_up.load(Ordering::Acquire) || self.comm.aborted() {
            return Err(EngineError::internal("it was given up, because the job stops"));
        }
        Ok(())
    }

    /// Those under way end soon, unwritten.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Release);
    }

    /// Returns once every checkpoint that was announced has ended, or the gang has.
    pub fn finish(&self, step: u64) {
        self.over.store(true, Ordering::Relaxed);
        let mut state = self.lock();
        if state.announced > 0 {
            self.control.heartbeat(step, "checkpointing");
        }
        while state.announced > 0 && !self.comm.aborted() {
            state = self.changed.wait_timeout(state, Duration::from_millis(100)).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The newest checkpoint, where this rank knows it.
    pub fn set_newest(&self, path: Option<PathBuf>) {
        self.lock().newest = path;
    }

    /// The newest checkpoint, and why the one that is a result of the job could not be written.
    pub fn results(self) -> (Option<PathBuf>, Option<EngineError>) {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        (state.newest, state.missing_result)
    }

    /// The panic of a thread that wrote one.
    pub fn panic(&self) -> Option<EngineError> {
        self.lock().panic.clone()
    }

    /// Everyone's answer to whether all is well here, with a number.
    fn agree(&self, ok: bool, number: f64) -> Result<(bool, f64), EngineError> {
        let all = self.comm.gather(Channel::Checkpoint, [f64::from(u8::from(ok)), number, 0.0, 0.0])?;
        Ok((all.iter().all(|v| v[0] > 0.0), all.iter().map(|v| v[1]).fold(0.0, f64::max)))
    }

    fn write(
        &self,
        folder: &Path,
        due: &Due,
        snapshot: Snapshot<'_>,
        begun: Instant,
        stall: impl Fn() -> Duration,
    ) -> Result<Written, EngineError> {
        let files = CheckpointFiles::new(self.store.layout(), self.comm.world() as u32, due.step).map_err(errors::model)?;
        let (files, link) = (&Arc::new(files), &Link::new(snapshot.pages().len()));
        let (to_disk, staged) = mpsc::channel();
        std::thread::scope(|scope| {
            // Whichever way this ends: the copying thread is not left waiting for files.
            let _ending = CloseOnDrop(link);
            let copier = std::thread::Builder::new().name(format!("snapshot{}", self.comm.rank()));
            let copier = copier.spawn_scoped(scope, move || self.copy(snapshot, files, to_disk, link));
            let mut failure = copier.as_ref().err().map(|e| EngineError::new(ErrorKind::Resources, format!("cannot start a thread: {e}")));
            let mut writer = None;
            if self.leader() {
                match crate::places::check("`checkpoint.path`", folder) {
                    Ok(()) => take(CheckpointWriter::begin(folder, files), &mut writer, &mut failure),
                    Err(e) => drop(failure.get_or_insert(e)),
                }
            }
            hit(Point::CheckpointBegun);
            let other = || EngineError::new(ErrorKind::Output, "another rank could not write its part");
            if !self.agree(failure.is_none(), 0.0)?.0 {
                return Err(failure.unwrap_or_else(other));
            }
            if !self.leader() {
                take(CheckpointWriter::join(folder, files), &mut writer, &mut failure);
            }
            if let Some(w) = &writer {
                let mut part = None;
                take(w.part(self.comm.rank() as u32, self.comm.world() as u32), &mut part, &mut failure);
                if let Some(part) = part {
                    link.open(part);
                }
            }
            if let Err(e) = self.drain(staged, link) {
                failure.get_or_insert(e);
            }
            if failure.is_some() {
                link.close();
            }
            let copied =
                copier.map(|c| c.join().unwrap_or_else(|panic| Err(EngineError::panicked("the thread that copies pages", panic.as_ref()))));
            match (copied, link.part.get()) {
                (Ok(Err(e)), _) => drop(failure.get_or_insert(e)),
                (Ok(Ok(())), Some(part)) if failure.is_none() => failure = part.finish().err().map(errors::model),
                _ => {}
            }
            hit(Point::CheckpointShard);
            let (all_well, stall) = self.agree(failure.is_none(), stall().as_secs_f64())?;
            if !all_well {
                return Err(failure.unwrap_or_else(other)); // dropping the leader's writer removes what was written
            }
            hit(Point::CheckpointAgreed);
            let mut committed = None;
            if let (true, Some(w)) = (self.leader(), writer.take()) {
                take(self.commit(folder, w, due), &mut committed, &mut failure);
            }
            if !self.agree(failure.is_none(), 0.0)?.0 {
                return Err(failure.unwrap_or_else(other));
            }
            let none = || Committed { path: PathBuf::new(), bytes: files.bytes(), removed: Vec::new(), warnings: Vec::new() };
            let copied = *link.copied.get().unwrap_or(&begun);
            Ok(Written { checkpoint: committed.unwrap_or_else(none), copied: copied.saturating_duration_since(begun), stall })
        })
    }

    fn commit(&self, folder: &Path, writer: CheckpointWriter, due: &Due) -> Result<Committed, ModelError> {
        let input = resolve(&self.spec.model)?;
        if let Some(lines) = self.lines {
            lines.sync(self.control);
        }
        let meta = CheckpointMeta {
            step: due.step,
            run: self.spec.name.clone(),
            architecture: self.architecture.clone(),
            job: serde_json::json!({
                "tokens_total": due.tokens_total,
                "segment": self.store.name(),
                "batch_size": self.spec.train.batch_size,
                "sequence_length": self.spec.data.sequence_length,
            }),
            values: due.values.clone(),
        };
        let noted = self.note_first(folder, due.step);
        hit(Point::CheckpointNoted);
        let committed = writer.commit(&meta, &input.assets, self.spec.checkpoint.keep);
        if committed.is_err() {
            let named = folder.join(checkpoint_folder_name(due.step)).symlink_metadata();
            if let Some(first) = noted.filter(|_| named.is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound)) {
                first.forget().unwrap_or_else(|e| tracing::warn!("a note of a checkpoint that there is not stays: {e}"));
            }
        }
        committed
    }

    /// Before the first checkpoint gets its name; the note where this call made it. Where it cannot be written (the state folder's disk is
    /// full), a checkpoint is worth more than the note of it.
    fn note_first(&self, folder: &Path, step: u64) -> Option<&FirstCheckpoint> {
        let first = self.first.as_ref()?;
        match first.note(step, folder) {
            Ok(noted) => Some(first).filter(|_| noted),
            Err(e) => {
                let text = format!("that there is a checkpoint cannot be noted in the state folder ({e}): it is written all the same");
                self.control.event(Level::Warn, &text);
                None
            }
        }
    }

    /// Copies every page to the stage, or, where that is full, into the files, and lets it go.
    fn copy<'s>(
        &'s self,
        mut snapshot: Snapshot<'_>,
        files: &CheckpointFiles,
        to_disk: mpsc::Sender<Staged<'s>>,
        link: &Link,
    ) -> Result<(), EngineError> {
        for page in snapshot.pages() {
            self.goes_on()?;
            let pieces = files.pieces(page);
            match self.pool.install(|| self.stage.copy(&snapshot, &pieces)).map_err(errors::model)? {
                Some(staged) => {
                    snapshot.release(page);
                    if to_disk.send(staged).is_err() {
                        return Ok(()); // the writer has failed, and says so
                    }
                }
                None => {
                    let Some(part) = link.part() else { return Ok(()) };
                    let write = || part.write_page(page, |start, part, out| snapshot.read(start, part, out));
                    self.pool.install(write).map_err(errors::model)?;
                    snapshot.release(page);
                    self.count(link);
                }
            }
            hit(Point::CheckpointPage);
        }
        let _ = link.copied.set(Instant::now());
        hit(Point::CheckpointCopied);
        Ok(())
    }

    /// Writes what comes from the stage until no more comes.
    fn drain(&self, staged: mpsc::Receiver<Staged<'_>>, link: &Link) -> Result<(), EngineError> {
        let Some(part) = link.part.get() else { return Ok(()) };
        for page in staged {
            part.write(&page.pieces, &page.checksums, &page.bytes).map_err(errors::model)?;
            self.goes_on()?;
            self.count(link);
        }
        Ok(())
    }

    /// One more page is in its files. For the supervisor: a rank that waits for the disk is not stuck.
    fn count(&self, link: &Link) {
        let done = link.done.fetch_add(1, Ordering::Relaxed) + 1;
        self.control.progress("writing a checkpoint", done as u64, link.pages as u64);
    }

    /// Events, and the answer to who asked. A failure is an event and not the end of training; the job fails at its end
    /// where the checkpoint is one of its results.
    fn tell(&self, folder: &Path, due: &Due, result: Result<Written, EngineError>, took: Duration) {
        let (step, request) = (due.step, due.request.saturating_sub(1));
        if self.leader() && !self.comm.aborted() {
            match &result {
                Ok(w) => {
                    for warning in &w.checkpoint.warnings {
                        self.control.event(Level::Warn, warning);
                    }
                    let text = format!(
                        "checkpoint of step {step}: {} bytes copied or written in {:.2} s and durable after {:.2} s; the optimizer stood still for {:.3} s",
                        w.checkpoint.bytes,
                        w.copied.as_secs_f64(),
                        took.as_secs_f64(),
                        w.stall
                    );
                    self.control.event(Level::Info, &text);
                    self.control.checkpoint(&w.checkpoint.path, step, request, None);
                }
                Err(e) => {
                    if self.given_up.load(Ordering::Acquire) {
                        self.control.event(Level::Info, &format!("the checkpoint of step {step} was not finished: the job stops"));
                    } else {
                        self.control.event(Level::Error, &format!("checkpoint of step {step} failed, training goes on: {e}"));
                    }
                    self.control.checkpoint(folder, step, request, Some(&e.message));
                }
            }
        }
        let mut state = self.lock();
        match result {
            Ok(w) if self.leader() => state.newest = Some(w.checkpoint.path),
            Ok(_) => {}
            Err(e) if self.spec.checkpoint.at_end && step == self.steps => state.missing_result = Some(e),
            Err(_) => {}
        }
    }
}

/// Keeps a value, or the first failure.
fn take<T>(result: Result<T, ModelError>, value: &mut Option<T>, failure: &mut Option<EngineError>) {
    match result {
        Ok(v) => *value = Some(v),
        Err(e) => drop(failure.get_or_insert(errors::model(e))),
    }
}

/// A checkpoint that was announced has ended, one way or another.
struct Ending<'a, 'b>(&'a Checkpoints<'b>);

impl Drop for Ending<'_, '_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.announced = state.announced.saturating_sub(1);
        state.writing = None;
        drop(state);
        self.0.changed.notify_all();
    }
}
