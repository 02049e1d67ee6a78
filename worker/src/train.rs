//! Training: the life of one rank in a gang.
//!
//! ```text
//!             ┌────────────────────── a gang starts ──────────────────────┐
//!             ▼                                                           │
//!   record: Loading ─► (pages filled) ─► Committed(s₀)                    │
//!   Committed(s-1) ─► sweeps of step s ─► gradients of all ranks in the segment
//!        ─► GradientsComplete(s): loss, norm and rate are in the record   │
//!        ─► every owner brings its pages to s ─► Committed(s) ─► metrics line ─► next step
//!   killed before GradientsComplete(s): the gradients are thrown away, step s runs again
//!   killed after it: pages still at s-1 are updated from the gradients in the segment
//! ```
//! Without clipping (`early`), owners bring pages to s as their gradients come:
//! ```text
//!   Committed(s-1) ─► sweeps of step s ─┬► Updating(s) ─► pages whose gradients are whole to s ─┬► GradientsComplete(s) ─► …
//!   killed in Updating(s): step s runs again, with the weights of s-1 that pages at s left where their gradients were
//! ```
//! Where gradients stay on the device (`EnginePlan::device_gradients`) they die with the process. Killed after GradientsComplete(s):
//! ```text
//!   no page is at s:    Committed(s-1) again, step s runs again          every page is at s: Committed(s)
//!   some are:           Loading, going back ─► every page as in the newest sound checkpoint c, or at the beginning
//!                       ─► Committed(c); lines past c are cut off the metrics file and written again
//! ```
//! The optimizer of step s runs on a thread of its own beside the sweeps of step s+1, which take each page's weights as soon
//! as they are made. Pages whose state is held on the device are published last, beside the backward pass. What leaves the
//! device of step s+1 are gradients of pages that are published at s: those of s are not needed any more, neither to
//! update them nor to do so again after a crash. GradientsComplete(s+1) comes after Committed(s). A checkpoint of step s is
//! begun on the same thread as soon as s is committed, and written beside the steps that follow (`checkpoint::writer`).

use crate::api::*;
use crate::batch::{Part, Reader};
use crate::checkpoint::{self, Checkpoints, Due};
use crate::early::{Ahead, EarlyDone, EarlyJob, EarlyPages, Gate, Watch};
use crate::metrics::MetricsFile;
use crate::model::{Block, Model};
use crate::optimizer::{StepScalars, factors};
use crate::plan::{EnginePlan, rank_share};
use crate::record::{StepNumbers, goes_back, going_back};
use crate::session::{Session, StepBatches};
use crate::trace::Tracing;
use ramtorch_cpu::{Channel, Collectives, Kept, PagesUpdated, update_pages_recorded, write_back};
use ramtorch_data::{Dataset, Order};
use ramtorch_device::{DeviceGradients, Dtype, GradientReader, HeldPage, PageUpdater, StagedPage};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::JobSpec;
use ramtorch_job::schedule::learning_rate;
use ramtorch_modelio::Architecture;
use ramtorch_store::{Owner, SharedOwner, StepPhase, Store};
use ramtorch_trace::{Kind, Label, Recorder, Row};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// What every part of a rank's life refers to.
struct Rank<'a> {
    assignment: &'a Assignment,
    spec: &'a JobSpec,
    prepared: &'a Prepared,
    plan: EnginePlan,
    architecture: Architecture,
    store: Arc<Store>,
    comm: Arc<Collectives>,
    recorder: Arc<Recorder>,
    control: &'a dyn Control,
}

/// Work for the optimizer's thread.
enum Job {
    /// Pages of the step that is swept.
    Early(EarlyJob),
    Commit(OptimizerJob),
}

/// A step whose gradients are complete.
struct OptimizerJob {
    numbers: StepNumbers,
    /// Pages that were updated before they were.
    early: EarlyDone,
    /// The line of this step is written by the step loop, after a validation.
    line_later: bool,
    begun: Instant,
    /// Pages whose state the device has already.
    staged: Vec<StagedPage>,
    sent: Instant,
    /// A checkpoint of this step is due; one above the request that asked for it, or 0.
    checkpoint: Option<u64>,
}

/// What the optimizer's thread has of the device.
struct Tools {
    updater: Option<Box<dyn PageUpdater>>,
    /// Where gradients stay on the device: who brings them to the processor, and where they are.
    kept: Option<(Box<dyn GradientReader>, DeviceGradients)>,
    /// Pages whose state stays on the device.
    held: Vec<HeldPage>,
}

/// What the optimizer's thread answers.
enum Answer {
    Early(EarlyDone),
    Committed(Committed),
}

struct Committed {
    numbers: StepNumbers,
    at: Instant,
}

pub(crate) fn run(
    assignment: &Assignment,
    spec: &JobSpec,
    prepared: &Prepared,
    plan: &Plan,
    segment: &str,
    control: &dyn Control,
) -> Result<TrainOutcome, EngineError> {
    control.heartbeat(0, "attaching");
    // Before this rank has threads: they do as this one.
    crate::numa::pin(&assignment.device);
    let begun = Instant::now();
    let store = Arc::new(Store::attach(segment).map_err(EngineError::internal)?);
    // What is not mapped yet is mapped a page of memory at a time, by whoever meets it first: one thread, when a device page-locks it.
    if let Err(error) = store.populate(assignment.device.threads) {
        tracing::warn!(%error, "the segment is mapped as it is used");
    }
    let mapped = begun.elapsed();
    // Before the first collective: a daemon that starts on this segment takes a larger one, whatever its records say.
    store.set_generation(assignment.generation);
    let plan = EnginePlan::of(plan)?;
    let architecture: Architecture = serde_json::from_value(prepared.architecture.clone()).map_err(EngineError::internal)?;
    let comm = Arc::new(Collectives::new(store.clone(), assignment.rank, assignment.world_size, assignment.generation));
    let rank = Rank { assignment, spec, prepared, plan, architecture, store: store.clone(), comm, recorder: Arc::default(), control };
    let mut owner = store.claim(assignment.rank as u32).map_err(EngineError::internal)?;
    rank.settle(&mut owner)?;
    rank.load(&mut owner)?;
    let owner = SharedOwner::new(owner);
    rank.recover(&owner)?;
    let rerun = rank.interrupted();
    let filled = begun.elapsed() - mapped;
    rank.steps(owner, rerun, |opened| {
        format!(
            "started in {:.1} s: {:.1} s to map the segment, {:.1} s for its pages, {:.1} s for the device",
            begun.elapsed().as_secs_f64(),
            mapped.as_secs_f64(),
            filled.as_secs_f64(),
            opened.as_secs_f64()
        )
    })
}

impl Rank<'_> {
    fn leader(&self) -> bool {
        self.assignment.rank == 0
    }

    fn set_record(&self, numbers: &StepNumbers, phase: StepPhase) -> Result<(), EngineError> {
        self.store.set_record(&numbers.record(phase)).map_err(EngineError::internal)
    }

    /// Where gradients stay on the device and died there: finds the step that all pages are at, or that there is none, and has
    /// them filled again. Only one rank has such a plan.
    fn settle(&self, owner: &mut Owner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if self.plan.device_gradients.is_none() || record.phase != StepPhase::GradientsComplete {
            return Ok(());
        }
        self.control.heartbeat(record.step, "recovering");
        hit(Point::RecoverBegun);
        let numbers = StepNumbers::from_record(&record);
        let (step, all) = (numbers.step, self.store.layout().page_count() as usize);
        let event = match owner.pages().filter(|p| self.store.entry(*p).step == step).count() {
            // The gang that died here said so before its first page: nothing was lost.
            0 => {
                self.set_record(&numbers.before(), StepPhase::Committed)?;
                format!("step {step} was interrupted before a page was updated; its gradients were on the device, so it is run again")
            }
            n if n == all => {
                self.set_record(&numbers, StepPhase::Committed)?;
                format!("step {step} was interrupted after every page was updated; nothing is lost")
            }
            n => {
                self.store.set_record(&going_back()).map_err(EngineError::internal)?;
                let text = format!(
                    "step {step} was interrupted while pages were updated ({n} of {all} were), and its gradients were on the device: back to the last sound checkpoint"
                );
                self.control.event(Level::Warn, &text);
                hit(Point::RecoverRecorded);
                return Ok(());
            }
        };
        hit(Point::RecoverRecorded);
        self.control.event(Level::Info, &event);
        Ok(())
    }

    /// What to say once where gradients stay on the device.
    fn tell_of_device_gradients(&self) {
        if self.plan.device_gradients.is_none() || !self.leader() {
            return;
        }
        let what = "gradients stay on the device: a death while pages are updated goes back to the last checkpoint";
        match (&self.spec.checkpoint.path, self.spec.checkpoint.every_steps) {
            (None, _) => {
                let event = format!("{what}, and this job writes none: it would begin again. Set [checkpoint] path and every_steps");
                self.control.event(Level::Warn, &event);
            }
            (Some(_), 0) => self.control.event(Level::Warn, &format!("{what}, and every_steps is 0: only those asked for are written")),
            (Some(_), n) => self.control.event(Level::Info, &format!("{what}; one is written every {n} steps")),
        }
    }

    /// Fills this rank's pages, if the store was never filled whole, or has to be filled again.
    fn load(&self, owner: &mut Owner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if record.phase != StepPhase::Loading {
            return Ok(());
        }
        self.control.heartbeat(0, "loading");
        let begin = Instant::now();
        let back = goes_back(&record);
        let resume = if back {
            checkpoint::find_to_go_back(self.spec, &self.architecture, self.store.name())?
        } else {
            self.tell_of_device_gradients();
            self.prepared.resume.clone()
        };
        let source = checkpoint::open_source(self.spec, self.prepared, &self.architecture, resume.as_ref())?;
        let step = resume.as_ref().map_or(0, |r| r.step);
        let pages: Vec<u32> = owner.pages().collect();
        for (i, page) in pages.iter().enumerate() {
            // Filled again: a page that is at the step has the very state that the checkpoint has.
            if self.store.entry(*page).step != step {
                source.fill(owner, self.store.layout(), *page, step)?;
            }
            hit(Point::LoadPage);
            if self.leader() && i % 16 == 0 {
                self.control.progress("loading weights", i as u64, pages.len() as u64);
            }
            self.control.heartbeat(step, "loading");
        }
        tracing::info!("{} pages of weights loaded in {:.1} s", pages.len(), begin.elapsed().as_secs_f64());
        hit(Point::LoadFilled);
        self.comm.barrier(Channel::Step)?;
        if self.leader() {
            let numbers = StepNumbers {
                step,
                tokens_total: source.tokens_total(),
                validation_loss: f64::NAN,
                initial_validation_loss: f64::NAN,
                ..Default::default()
            };
            self.set_record(&numbers, StepPhase::Committed)?;
            if back {
                let from = resume.map_or("the beginning: there is no checkpoint".into(), |r| format!("checkpoint {}", r.path.display()));
                self.control.event(Level::Warn, &format!("went back to step {step}, {from}; the steps after it are run again"));
            }
            hit(Point::LoadRecorded);
        }
        self.comm.barrier(Channel::Step)?;
        Ok(())
    }

    /// Finishes a step that was interrupted after its gradients were complete.
    fn recover(&self, owner: &SharedOwner<'_>) -> Result<(), EngineError> {
        let record = self.store.record();
        if record.phase != StepPhase::GradientsComplete {
            return Ok(());
        }
        self.control.heartbeat(record.step, "recovering");
        hit(Point::RecoverBegun);
        let mut numbers = StepNumbers::from_record(&record);
        // On the CPU alone: the device is not open yet, and the bits are the same.
        let done = self.update_pages(owner, &numbers, &mut Tools { updater: None, kept: None, held: Vec::new() }, Vec::new())?;
        numbers.optimizer_seconds = done.elapsed.as_secs_f64();
        (numbers.optimizer_pages_cpu, numbers.optimizer_pages_device) = (done.cpu, done.device);
        hit(Point::RecoverUpdated);
        self.comm.barrier(Channel::Optimizer)?;
        if self.leader() {
            self.set_record(&numbers, StepPhase::Committed)?;
            hit(Point::RecoverRecorded);
            self.control.event(
                Level::Info,
                &format!("step {} was interrupted after its gradients were complete; finished it from the segment", numbers.step),
            );
        }
        self.comm.barrier(Channel::Optimizer)?;
        Ok(())
    }

    /// The step that a gang before this one died in with pages of it updated already: what its record says, and which they are.
    /// Every rank comes here before any updates a page.
    fn interrupted(&self) -> Option<(StepNumbers, Arc<Ahead>)> {
        let record = self.store.record();
        if record.phase != StepPhase::Updating {
            return None;
        }
        hit(Point::RerunBegun);
        let ahead = Ahead::find(&self.store, record.step);
        let (n, all) = ahead.count();
        if self.leader() {
            let text = format!(
                "step {} was interrupted when {n} of {all} pages had been updated beside its backward pass; it is run again with the weights that it began with",
                record.step
            );
            self.control.event(Level::Info, &text);
        }
        Some((StepNumbers::from_record(&record), Arc::new(ahead)))
    }

    fn update_pages(
        &self,
        owner: &SharedOwner<'_>,
        n: &StepNumbers,
        tools: &mut Tools,
        staged: Vec<StagedPage>,
    ) -> Result<PagesUpdated, EngineError> {
        let scalars = StepScalars { step: n.step, lr: n.lr, gradient_scale: n.gradient_scale as f32 };
        let updater: Option<&mut dyn PageUpdater> = match &mut tools.updater {
            Some(u) => Some(u.as_mut()),
            None => None,
        };
        let kept = tools.kept.as_mut().map(|(reader, gradients)| Kept { gradients, reader: reader.as_mut() });
        update_pages_recorded(owner, &factors(&self.spec.optimizer, &scalars), updater, staged, &mut tools.held, kept, &self.recorder)
    }

    fn commit(
        &self,
        owner: &SharedOwner<'_>,
        tools: &mut Tools,
        mut job: OptimizerJob,
        metrics: &mut MetricsFile,
    ) -> Result<Committed, EngineError> {
        hit(Point::OptimizerBegun);
        let step = job.numbers.step;
        // This thread may have waited for an earlier checkpoint when the job came.
        let (late, waited) = (job.sent.elapsed(), owner.waited());
        let span = self.recorder.scope(Row::Optimizer, Label::work("update pages").step(step));
        let done = self.update_pages(owner, &job.numbers, tools, std::mem::take(&mut job.staged))?;
        drop(span);
        if let (Some(updater), false) = (&mut tools.updater, tools.held.is_empty()) {
            let _span = self.recorder.scope(Row::Optimizer, Label::work("write back held pages").step(step));
            write_back(owner, step, updater.as_mut(), &tools.held)?;
        }
        job.numbers.checkpoint_wait = (late + owner.waited().saturating_sub(waited)).as_secs_f64();
        hit(Point::OptimizerUpdated);
        job.numbers.optimizer_seconds = (done.elapsed + job.early.elapsed).as_secs_f64();
        job.numbers.optimizer_pages_cpu = done.cpu + job.early.pages;
        job.numbers.optimizer_pages_device = done.device;
        let span = self.recorder.scope(Row::Optimizer, Label::collective("barrier: pages").step(step));
        self.comm.barrier(Channel::Optimizer)?;
        drop(span);
        hit(Point::OptimizerAgreed);
        let at = Instant::now();
        job.numbers.seconds = (at - job.begun).as_secs_f64();
        if job.numbers.seconds > 0.0 {
            job.numbers.tflops /= job.numbers.seconds;
        }
        if self.leader() {
            let span = self.recorder.scope(Row::Optimizer, Label::work("commit").step(step));
            self.set_record(&job.numbers, StepPhase::Committed)?;
            drop(span);
            hit(Point::StepCommitted);
            if !job.line_later {
                let _span = self.recorder.scope(Row::Optimizer, Label::work("write metrics").step(step));
                self.report(metrics, &job.numbers)?;
            }
        }
        let _span = self.recorder.scope(Row::Optimizer, Label::collective("barrier: committed").step(step));
        // Nobody begins to overwrite gradients before the leader has said that they are not needed any more.
        self.comm.barrier(Channel::Optimizer)?;
        Ok(Committed { numbers: job.numbers, at })
    }

    fn report(&self, metrics: &mut MetricsFile, n: &StepNumbers) -> Result<(), EngineError> {
        let m = n.metrics();
        let line = metrics.write(&m)?;
        hit(Point::StepReported);
        self.control.metrics(&m, &line);
        Ok(())
    }

    /// `rerun`: the step that comes first was begun before, and pages are ahead of it. `started` makes the event of the start of
    /// the time that opening the device took.
    fn steps(
        &self,
        owner: SharedOwner<'_>,
        rerun: Option<(StepNumbers, Arc<Ahead>)>,
        started: impl FnOnce(Duration) -> String,
    ) -> Result<TrainOutcome, EngineError> {
        let rank = self.assignment.rank;
        let dataset: Dataset = serde_json::from_value(self.prepared.dataset.clone()).map_err(EngineError::internal)?;
        let data = dataset.open().map_err(EngineError::input)?;
        self.control.heartbeat(self.store.record().step, "opening the device");
        let opening = Instant::now();
        let model = Model::new(&self.architecture, self.store.layout(), self.plan.dtype)?;
        let mut dev =
            crate::device::open(&self.assignment.device, self.plan.dtype, self.plan.uses.allocated(), self.spec.train.deterministic)?;
        dev.observe(&self.recorder);
        let device = dev.name();
        let mut session = Session::new(dev, model, self.store.clone(), &self.plan, true)?;
        let mut updater = if self.plan.optimizer_split { session.dev.page_updater(&self.store)? } else { None };
        let kept = match session.device_gradients() {
            Some(gradients) => {
                let page = u64::from(self.store.layout().page_parameters());
                Some((session.dev.gradient_reader(gradients.format(), page)?, gradients))
            }
            None => None,
        };
        session.join(&self.comm)?;
        // Ranks that each copy all weights have nothing from one another's devices.
        let delivers = (self.comm.world() == 1 || self.plan.gather_weights) && self.plan.dtype == Dtype::Bf16;
        if let Some(updater) = updater.as_mut().filter(|_| delivers) {
            updater.deliver_to(session.weights.direct());
        }
        if self.leader() {
            self.control.event(Level::Info, &started(opening.elapsed()));
        }
        let device_pages = session.device_pages();
        let mut tools = Tools { updater, kept, held: session.take_held() };
        let recorded = match &rerun {
            Some((numbers, ahead)) => {
                session.set_ahead(ahead.clone());
                numbers.before()
            }
            None => StepNumbers::from_record(&self.store.record()),
        };
        let committed = recorded.step;
        let (mut metrics, last_line) = if self.leader() {
            MetricsFile::open(self.spec.output.metrics.as_deref(), committed)?
        } else {
            MetricsFile::open(None, committed)?
        };
        let threads = self.assignment.device.threads;
        // The step loop enqueues the next forward pass beside the optimizer, and a thread feeds the device with pages: where
        // their cores are taken, arithmetic stands still until the last page is done.
        let threads = if self.assignment.device.kind == DeviceKind::Cuda { threads.saturating_sub(2) } else { threads };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(move |i| format!("adamw{rank}-{i}"))
            .build()
            .map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start the optimizer's threads: {e}")))?;
        let (steps, staging) = (self.prepared.steps, self.plan.checkpoint_staging);
        // Beside a GPU the processor has little else to do; on a CPU device it is the one that trains.
        let share = if self.assignment.device.kind == DeviceKind::Cuda { 2 } else { 4 };
        let copiers = (self.assignment.device.threads / share).clamp(1, 16);
        let checkpoints = Checkpoints::new(self.spec, &self.architecture, steps, &self.store, &self.comm, self.control, copiers, staging)?;
        let early = self.plan.early_updates.then(|| {
            let parts = (self.store.as_ref(), self.comm.as_ref(), self.recorder.as_ref());
            let by_host = !self.plan.squares();
            EarlyPages::new(parts, &self.spec.optimizer, &pool, &session.model.places, owner.pages(), &device_pages, by_host)
        });
        let mut state = Loop {
            rank: self,
            reader: Reader {
                data: &data,
                seq: self.prepared.sequence_length,
                document_mask: dataset.document_mask,
                padding: self.architecture.transformer().and_then(|c| c.padding_idx),
            },
            order: Order::new(self.prepared.train_sequences, self.spec.data.shuffle, self.spec.data.seed),
            session,
            committed: recorded,
            commit_time: Instant::now(),
            checkpoints: &checkpoints,
            // Taken with weights that are not those of all pages any more.
            initial_validation: rerun.as_ref().map_or(f64::NAN, |(numbers, _)| numbers.initial_validation_loss),
            ahead: rerun.map(|(_, ahead)| ahead),
            owed: false,
            tokens_total: recorded.tokens_total,
            swept: 0,
            tracing: Tracing::new(self.recorder.clone(), rank, device, self.prepared.steps),
            pool: &pool,
        };
        // The writer may have died between a commit and its line.
        let missing = self.leader() && recorded.step > 0 && last_line + 1 == recorded.step && recorded.tokens > 0;
        if self.comm.gather(Channel::Step, [f64::from(u8::from(missing)), 0.0, 0.0, 0.0])?[0][0] > 0.0 {
            let mut n = recorded;
            if state.validation_due(n.step) && n.validation_loss.is_nan() {
                n.validation_loss = state.validate(n.step)?;
            }
            if self.leader() {
                self.report(&mut metrics, &n)?;
            }
        }
        let (to_optimizer, jobs) = mpsc::channel::<Job>();
        let (done, from_optimizer) = mpsc::channel::<Result<Answer, EngineError>>();
        let metrics = std::sync::Mutex::new(metrics);
        let stopped = std::thread::scope(|scope| {
            let (metrics, pool, owner, checkpoints, early) = (&metrics, &pool, &owner, &checkpoints, &early);
            // Moved, not borrowed: the tools go with the optimizer's thread, before the device does.
            let spawned = std::thread::Builder::new().name(format!("optimizer{rank}")).spawn_scoped(scope, move || {
                for job in jobs {
                    let job = match (job, early) {
                        (Job::Commit(job), _) => job,
                        (Job::Early(job), Some(early)) if job.gate.enter() => {
                            // Not on the pool, whose threads it would keep from others while it waits.
                            let result = early.run(owner, &job).map(Answer::Early);
                            if result.is_err() {
                                self.comm.abort();
                            }
                            if done.send(result).is_err() {
                                return;
                            }
                            continue;
                        }
                        (Job::Early(_), _) => continue,
                    };
                    let checkpoint = job.checkpoint;
                    let result = {
                        let mut guard = metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        let file = &mut *guard;
                        let tools = &mut tools;
                        pool.install(move || self.commit(owner, tools, job, file))
                    };
                    if result.is_err() {
                        self.comm.abort(); // the step loop may be waiting for pages that will not come
                    }
                    let due = checkpoint.and_then(|request| Some(Due::of(&result.as_ref().ok()?.numbers, request)));
                    if done.send(result.map(Answer::Committed)).is_err() {
                        return;
                    }
                    // Before the next job, which would overwrite what belongs to this step.
                    if let Some(Err(e)) = due.map(|due| checkpoints.begin(scope, owner, due)) {
                        self.comm.abort();
                        let _ = done.send(Err(e));
                    }
                }
            });
            spawned.map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start the optimizer's thread: {e}")))?;
            checkpoints.warm(scope);
            let owed = state.owed_checkpoint().and_then(|due| due.map_or(Ok(()), |due| checkpoints.begin(scope, owner, due)));
            let result = owed.and_then(|()| state.run(&to_optimizer, &from_optimizer, metrics));
            if result.is_err() {
                self.comm.abort();
            }
            drop(to_optimizer);
            // The first error is the optimizer's where the loop only noticed that it was gone.
            match (result, from_optimizer.try_iter().find_map(Result::err)) {
                (Err(_), Some(first)) => Err(first),
                (result, _) => result,
            }
        })?;
        let Loop { session, committed, .. } = state;
        session.close(); // frees the device for the sample
        let (newest_checkpoint, missing_result) = checkpoints.results();
        let outcome = self.finish(committed.step, stopped, newest_checkpoint)?;
        missing_result.map_or(Ok(outcome), Err)
    }

    /// Model folder and sample, by the leader.
    fn finish(&self, step: u64, stopped: bool, checkpoint: Option<std::path::PathBuf>) -> Result<TrainOutcome, EngineError> {
        let mut outcome = TrainOutcome { step, stopped, output: None, sample: None, checkpoint };
        if !self.leader() || stopped {
            return Ok(outcome);
        }
        if let Some(path) = &self.spec.output.path {
            self.control.heartbeat(step, "exporting");
            checkpoint::export_store(&self.store, self.spec, &self.architecture, path)?;
            hit(Point::ExportDone);
            outcome.output = Some(path.clone());
        }
        if let Some(sample) = &self.spec.sample {
            self.control.heartbeat(step, "sampling");
            outcome.sample =
                Some(crate::generate::sample(self.assignment, self.spec, &self.architecture, &self.store, self.plan.dtype, sample)?);
        }
        Ok(outcome)
    }
}

/// The step loop's state.
struct Loop<'a> {
    rank: &'a Rank<'a>,
    reader: Reader<'a>,
    order: Order,
    session: Session,
    committed: StepNumbers,
    commit_time: Instant,
    checkpoints: &'a Checkpoints<'a>,
    initial_validation: f64,
    /// Pages that are ahead of the first step.
    ahead: Option<Arc<Ahead>>,
    /// A checkpoint that was interrupted is written after the first step, because not all pages are at the step before.
    owed: bool,
    /// Tokens of all steps that were swept whole.
    tokens_total: u64,
    /// Steps that this gang has swept.
    swept: u64,
    tracing: Tracing,
    pool: &'a rayon::ThreadPool,
}

/// What the gang agreed to do after a step.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Wishes {
    stop: bool,
    checkpoint_then_stop: bool,
    checkpoint: u64,
    /// Somebody was told to record a trace; [`Tracing::agree`] says the rest.
    trace: bool,
}

impl Wishes {
    fn add(&mut self, c: Command, tracing: &mut Tracing) {
        match c {
            Command::Trace(c) => tracing.want(c),
            Command::Stop { checkpoint } => {
                self.stop = true;
                self.checkpoint_then_stop |= checkpoint;
            }
            Command::Checkpoint { request } => self.checkpoint = self.checkpoint.max(request + 1),
        }
    }
    fn encode(&self) -> [f64; 2] {
        let flags = u8::from(self.stop) + 2 * u8::from(self.checkpoint_then_stop) + 4 * u8::from(self.trace);
        [f64::from(flags), self.checkpoint as f64]
    }
    fn decode(all: &[[f64; 4]]) -> Self {
        let flags = all.iter().map(|v| v[2] as u8).fold(0, |a, b| a | b);
        let checkpoint = all.iter().map(|v| v[3] as u64).max().unwrap_or(0);
        Wishes { stop: flags & 1 != 0, checkpoint_then_stop: flags & 2 != 0, checkpoint, trace: flags & 4 != 0 }
    }
}

impl Loop<'_> {
    fn validation_due(&self, step: u64) -> bool {
        let every = self.rank.spec.train.validate_every;
        self.rank.prepared.validation_sequences > 0
            && (step == 0 || step == self.rank.prepared.steps || (every > 0 && step.is_multiple_of(every)))
    }

    /// Whether the job file asks for a checkpoint of this step.
    fn checkpoint_due(&self, step: u64) -> bool {
        let spec = &self.rank.spec.checkpoint;
        step > 0 && ((spec.every_steps > 0 && step.is_multiple_of(spec.every_steps)) || (spec.at_end && step == self.rank.prepared.steps))
    }

    /// Removes what the gang before this one left of a checkpoint. Where it died before the last one that was due was whole,
    /// there is one of the committed step to be written in its place.
    fn owed_checkpoint(&mut self) -> Result<Option<Due>, EngineError> {
        let r = self.rank;
        let (step, spec) = (self.committed.step, &r.spec.checkpoint);
        let Some(folder) = spec.path.as_deref() else { return Ok(None) };
        let last_due = match step.checked_div(spec.every_steps).map_or(0, |n| n * spec.every_steps) {
            _ if self.checkpoint_due(step) => step,
            due => due,
        };
        let mut owed = false;
        if r.leader() {
            match ramtorch_modelio::tidy_checkpoints(folder, step, &r.spec.name, spec.keep) {
                Ok(there) => {
                    owed = last_due > there.as_ref().map_or(0, |(newest, _)| *newest);
                    self.checkpoints.set_newest(there.map(|(_, path)| path));
                }
                Err(e) => r.control.event(Level::Warn, &format!("unfinished checkpoints were not looked for: {e}")),
            }
        }
        if r.comm.gather(Channel::Step, [f64::from(u8::from(owed)), 0.0, 0.0, 0.0])?[0][0] == 0.0 {
            return Ok(None);
        }
        // Pages are ahead: there is no state of the committed step any more.
        self.owed = self.ahead.is_some();
        if r.leader() {
            let now = match self.owed {
                true => format!("that of step {} is written in its place", step + 1),
                false if step == last_due => "it is written now".to_string(),
                false => format!("that of step {step} is written in its place now"),
            };
            r.control.event(Level::Info, &format!("the checkpoint of step {last_due} was interrupted; {now}"));
        }
        if self.owed {
            return Ok(None);
        }
        self.checkpoints.announce();
        Ok(Some(Due::of(&self.committed, 0)))
    }

    /// Runs to the last step; true when told to stop before it.
    fn run(
        &mut self,
        to_optimizer: &mpsc::Sender<Job>,
        from_optimizer: &mpsc::Receiver<Result<Answer, EngineError>>,
        metrics: &std::sync::Mutex<MetricsFile>,
    ) -> Result<bool, EngineError> {
        let r = self.rank;
        let steps = r.prepared.steps;
        if self.committed.step == 0 && self.ahead.is_none() && self.validation_due(0) {
            self.initial_validation = self.validate(0)?;
            if r.leader() {
                r.control.event(Level::Info, &format!("validation loss before the first step: {:.4}", self.initial_validation));
            }
        }
        let mut wishes = Wishes::default();
        // What was asked for before the first step: later it is part of the gather that every step has.
        let [flags, checkpoint] = self.listen(&mut wishes);
        wishes = Wishes::decode(&r.comm.gather(Channel::Step, [0.0, 0.0, flags, checkpoint])?);
        self.agree_on_traces(&mut wishes, self.committed.step)?;
        let mut pending = false;
        self.commit_time = Instant::now();
        for step in self.committed.step + 1..=steps {
            let begun = self.commit_time;
            self.tracing.begin_step(step, self.session.dev.as_ref())?;
            let whole = r.recorder.scope(Row::Loop, Label::new("step", Kind::Step).step(step));
            let (numbers, early) = self.sweep(step, &mut wishes, pending, to_optimizer, from_optimizer)?;
            let begun = if pending { self.commit_time } else { begun };
            if r.leader() {
                r.set_record(&numbers, StepPhase::GradientsComplete)?;
                hit(Point::StepRecorded);
            }
            let span = r.recorder.scope(Row::Loop, Label::collective("barrier: gradients complete"));
            r.comm.barrier(Channel::Step)?;
            drop(span);
            drop(whole);
            hit(Point::StepAnnounced);
            let checkpoint_due = self.checkpoint_due(step) || wishes.checkpoint > 0 || std::mem::take(&mut self.owed);
            let validation_due = self.validation_due(step);
            r.control.heartbeat(step, "optimizing");
            let stop = wishes.stop && step < steps;
            let checkpoint = (checkpoint_due || (stop && wishes.checkpoint_then_stop)).then_some(wishes.checkpoint);
            if checkpoint.is_some() {
                self.checkpoints.announce();
            }
            wishes.checkpoint = 0;
            let staged = self.session.take_staged()?;
            let job = OptimizerJob { numbers, early, line_later: validation_due, begun, staged, sent: Instant::now(), checkpoint };
            to_optimizer.send(Job::Commit(job)).map_err(|_| gone())?;
            pending = true;
            if validation_due || wishes.stop || step == steps {
                let c = commit_of(from_optimizer)?;
                self.took(&c);
                pending = false;
                if validation_due {
                    self.committed.validation_loss = self.validate(step)?;
                    hit(Point::ValidationDone);
                    if r.leader() {
                        let mut file = metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        r.report(&mut file, &self.committed)?;
                    }
                    self.commit_time = Instant::now();
                }
                if stop {
                    if checkpoint.is_none() {
                        self.checkpoints.give_up();
                    }
                    self.checkpoints.finish(step);
                    self.tracing.end(r.control);
                    return Ok(true);
                }
            }
        }
        self.checkpoints.finish(steps);
        self.tracing.end(r.control);
        Ok(false)
    }

    fn took(&mut self, c: &Committed) {
        self.committed = c.numbers;
        self.commit_time = c.at;
        self.tracing.committed(c.numbers.step, self.rank.control);
    }

    /// Takes the commands that came; what this rank says of them to the others.
    fn listen(&mut self, wishes: &mut Wishes) -> [f64; 2] {
        while let Some(c) = self.rank.control.command() {
            wishes.add(c, &mut self.tracing);
        }
        wishes.trace = self.tracing.wants();
        wishes.encode()
    }

    fn agree_on_traces(&mut self, wishes: &mut Wishes, step: u64) -> Result<(), EngineError> {
        if std::mem::take(&mut wishes.trace) { self.tracing.agree(step, &self.rank.comm, self.rank.control) } else { Ok(()) }
    }

    /// Forward and backward of step `step`; its gradients are in the segment, its numbers agreed, when this returns, and the
    /// step before, whose commit may be `pending`, is committed. Where pages may be updated early, some are, and none any more.
    fn sweep(
        &mut self,
        step: u64,
        wishes: &mut Wishes,
        pending: bool,
        to_optimizer: &mpsc::Sender<Job>,
        from_optimizer: &mpsc::Receiver<Result<Answer, EngineError>>,
    ) -> Result<(StepNumbers, EarlyDone), EngineError> {
        let r = self.rank;
        let (spec, plan) = (r.spec, &r.plan);
        r.control.heartbeat(step, "computing");
        let batch = spec.train.batch_size as u64;
        let first = (step - 1) * batch;
        let all: Vec<u64> = (0..batch).map(|j| self.order.sequence_index(first + j)).collect();
        let share = rank_share(all.len(), r.assignment.rank, r.assignment.world_size);
        let batches = StepBatches::new(&all[share], plan.micro_batch, plan.group_len);
        let tokens = self.reader.weight(Part::Train, &all)?;
        let divisor = (tokens * self.session.model.loss_divisor()).max(1.0);
        self.session.weights.bytes = 0;
        self.session.bytes_out = 0;
        // Waits since the last step, a validation's, are nobody's.
        self.session.dev.resolve()?;
        let visits = self.session.visits(plan.groups, true);
        self.session.weights.plan_visits(visits, step - 1);
        let known = StepNumbers {
            step,
            lr: learning_rate(&spec.schedule, spec.optimizer.lr, step, r.prepared.steps),
            tokens: tokens as u64,
            tokens_total: self.tokens_total + tokens as u64,
            gradient_scale: 1.0,
            epoch: (step * batch) as f64 / r.prepared.train_sequences.max(1) as f64,
            validation_loss: f64::NAN,
            initial_validation_loss: if step == 1 { self.initial_validation } else { f64::NAN },
            ..Default::default()
        };
        let base = self.swept * self.session.model.len() as u64;
        self.swept += 1;
        let gate = plan.early_updates.then(Arc::<Gate>::default);
        if let Some(gate) = &gate {
            // Comes after the commit of the step before, and its checkpoint.
            let job = EarlyJob { numbers: known, base, gate: gate.clone() };
            to_optimizer.send(Job::Early(job)).map_err(|_| gone())?;
        }
        let mut watch = Watch::new((&r.store, &r.comm, &r.recorder), self.pool, &self.session.model.places, step - 1);
        (watch.ahead, watch.early, watch.by_host, watch.base) = (self.ahead.take(), plan.early_updates, !plan.squares(), base);
        let span = r.recorder.scope(Row::Loop, Label::work("enqueue the sweeps"));
        self.session.train_step(&self.reader, &batches, (1.0 / divisor) as f32, plan.groups, step - 1, &mut |session, b| {
            // Where the device takes in no more than it has room for, the backward pass is nearly over when all of it is enqueued.
            if watch.early { watch.advance(session, b, false) } else { Ok(()) }
        })?;
        drop(span);
        if r.comm.world() > 1 {
            // From here on it may be another rank that this one waits for.
            r.control.heartbeat(step, "reducing");
        }
        // All is enqueued: gradients are squared as they come, while the backward pass works on the next ones.
        let by_host = if watch.early || watch.by_host { watch.finish(&self.session)? } else { None };
        let span = r.recorder.scope(Row::Loop, Label::blocked("wait for the losses"));
        let loss = self.session.sum_losses(&batches)?;
        drop(span);
        r.control.heartbeat(step, "reducing");
        let span = r.recorder.scope(Row::Loop, Label::blocked("wait for the gradients"));
        self.session.finish_gradients()?;
        drop(span);
        hit(Point::StepSwept);
        if pending {
            let span = r.recorder.scope(Row::Loop, Label::blocked("wait for the last step's commit"));
            let c = commit_of(from_optimizer)?;
            drop(span);
            self.took(&c);
        }
        let mut early = EarlyDone::default();
        if let Some(gate) = gate {
            // Whoever recovers from here on takes what is in the place of gradients for gradients.
            let _span = r.recorder.scope(Row::Loop, Label::blocked("wait for the page in hand"));
            if gate.close() {
                early = match from_optimizer.recv().map_err(|_| gone())?? {
                    Answer::Early(done) => done,
                    Answer::Committed(_) => return Err(EngineError::internal("a commit in place of early pages")),
                };
            }
            hit(Point::EarlyClosed);
        }
        // Everything of the step has run: nothing is waited for.
        let waits = self.session.dev.resolve()?;
        // All ranks' parts of this rank's pages have to be in before it updates them.
        let span = r.recorder.scope(Row::Loop, Label::collective("barrier: gradients"));
        r.comm.barrier(Channel::Step)?;
        drop(span);
        hit(Point::StepReduced);
        let squares = by_host.map_or_else(|| self.session.squares_by_device(), Ok)?;
        let [flags, checkpoint] = self.listen(wishes);
        let span = r.recorder.scope(Row::Loop, Label::collective("gather"));
        let gathered = r.comm.gather(Channel::Step, [loss, squares, flags, checkpoint])?;
        drop(span);
        hit(Point::StepAgreed);
        *wishes = Wishes::decode(&gathered);
        self.agree_on_traces(wishes, step)?;
        let loss = gathered.iter().map(|v| v[0]).sum::<f64>() / divisor;
        let norm = gathered.iter().map(|v| v[1]).sum::<f64>().sqrt();
        if !loss.is_finite() || !norm.is_finite() {
            return Err(EngineError::input(format!(
                "step {step}: the loss is {loss} and the gradient norm {norm}: training has diverged. The weights of step {} are kept where checkpoints are; try a lower learning rate, more warm-up, clipping, or check the data",
                step - 1
            )));
        }
        let clip = spec.optimizer.clip_norm;
        // torch.nn.utils.clip_grad_norm_: the factor is never above 1.
        let scale = if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.tokens_total = known.tokens_total;
        let numbers = StepNumbers {
            loss,
            grad_norm: norm,
            gradient_scale: scale,
            tflops: flops(&self.session.model, batch * r.prepared.sequence_length as u64, r.prepared.sequence_length) / 1e12,
            bytes_in: self.session.weights.bytes,
            bytes_out: self.session.bytes_out,
            copy_wait: waits.weights + waits.gradients,
            optimizer_wait: waits.pages,
            ..known
        };
        Ok((numbers, early))
    }

    /// Mean loss over the validation sequences, with the weights of step `step`; the same on every rank.
    fn validate(&mut self, step: u64) -> Result<f64, EngineError> {
        let r = self.rank;
        r.control.heartbeat(step, "validating");
        let limit = r.spec.train.validation_sequences as u64;
        let n = if limit > 0 { limit.min(r.prepared.validation_sequences) } else { r.prepared.validation_sequences };
        let all: Vec<u64> = (0..n).collect();
        let mine = &all[rank_share(all.len(), r.assignment.rank, r.assignment.world_size)];
        let most = all.len().div_ceil(r.assignment.world_size);
        let weight = self.reader.weight(Part::Validation, mine)? * self.session.model.loss_divisor();
        let sum = self.session.evaluate(&self.reader, Part::Validation, mine, most, r.plan.micro_batches, step)?;
        let gathered = r.comm.gather(Channel::Step, [sum, weight, 0.0, 0.0])?;
        let (sum, weight) = gathered.iter().fold((0.0, 0.0), |(s, w), v| (s + v[0], w + v[1]));
        Ok(sum / weight.max(1.0))
    }
}

fn gone() -> EngineError {
    EngineError::internal("the optimizer's thread has ended")
}

/// The commit that the optimizer's thread answers next.
fn commit_of(from_optimizer: &mpsc::Receiver<Result<Answer, EngineError>>) -> Result<Committed, EngineError> {
    match from_optimizer.recv().map_err(|_| gone())?? {
        Answer::Committed(c) => Ok(c),
        Answer::Early(_) => Err(EngineError::internal("early pages in place of a commit")),
    }
}

/// Operations of a training step: 6 × parameters in matrix products × tokens, and causal attention; recomputation is
/// not counted.
fn flops(model: &Model, rows: u64, seq: usize) -> f64 {
    let attention: f64 = match model.architecture.transformer() {
        // forward 2 products of seq²/2 · q, backward twice that
        Some(c) => model.blocks.iter().filter(|b| matches!(b, Block::Layer(_))).count() as f64 * 6.0 * (seq * c.query_size()) as f64,
        None => 0.0,
    };
    rows as f64 * (6.0 * model.architecture.matmul_parameters() as f64 + attention)
}
