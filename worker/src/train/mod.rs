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
//! as they are made. Pages whose state is held on the device are published last, beside the backward pass, or, where the segment
//! has a log of gradients, at every few steps only: Committed(s) then says that a page is at s or can be made so from the log. What leaves the
//! device of step s+1 are gradients of pages that are published at s: those of s are not needed any more, neither to
//! update them nor to do so again after a crash. GradientsComplete(s+1) comes after Committed(s). A checkpoint of step s is
//! begun on the same thread as soon as s is committed, and written beside the steps that follow (`checkpoint::writer`).

mod optimizer;
mod recovery;
mod steps;

use crate::api::*;
use crate::batch::Reader;
use crate::checkpoint::{self, Checkpoints, Due, FirstCheckpoint};
use crate::early::{Ahead, EarlyPages};
use crate::metrics::Metrics;
use crate::model::Model;
use crate::optimizer::optimizer_threads;
use crate::plan::EnginePlan;
use crate::record::StepNumbers;
use crate::session::Session;
use crate::trace::Tracing;
use optimizer::{Answer, Job, Tools};
use ramtorch_cpu::{Channel, Collectives};
use ramtorch_data::{Dataset, Order};
use ramtorch_device::{Dtype, caught};
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::JobSpec;
use ramtorch_modelio::Architecture;
use ramtorch_store::{SharedOwner, StepPhase, Store};
use ramtorch_trace::Recorder;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use steps::Loop;

/// For messages.
const OPTIMIZER: &str = "the optimizer's thread";

/// Lets the threads beside the step loop end when that panics: they may be waiting for it, or for other ranks.
struct AbortOnPanic<'a>(&'a Collectives);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.abort();
        }
    }
}

/// What every part of a rank's life refers to.
struct Rank<'a> {
    assignment: &'a Assignment,
    spec: &'a JobSpec,
    prepared: &'a Prepared,
    history: &'a History,
    plan: EnginePlan,
    architecture: Architecture,
    store: Arc<Store>,
    comm: Arc<Collectives>,
    recorder: Arc<Recorder>,
    control: &'a dyn Control,
}

pub(crate) fn run(
    assignment: &Assignment,
    spec: &JobSpec,
    prepared: &Prepared,
    plan: &Plan,
    segment: &str,
    history: &History,
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
    let (store_of_rank, recorder) = (store.clone(), Arc::default());
    let rank = Rank { assignment, spec, prepared, history, plan, architecture, store: store_of_rank, comm, recorder, control };
    let mut owner = store.claim(assignment.rank as u32).map_err(EngineError::internal)?;
    rank.settle(&mut owner)?;
    // On this rank's share of the processors, and not on all of them.
    let loading = rayon::ThreadPoolBuilder::new()
        .num_threads(assignment.device.threads.max(1))
        .thread_name(|i| format!("load{i}"))
        .build()
        .map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start the threads that load weights: {e}")))?;
    loading.install(|| rank.load(&mut owner))?;
    drop(loading);
    let owner = SharedOwner::new(owner);
    rank.replay(&owner)?;
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
        let mut tools = Tools { updater, kept, held: session.take_held(), held_gradients: session.held_gradients() };
        let recorded = match &rerun {
            Some((numbers, ahead)) => {
                session.set_ahead(ahead.clone());
                numbers.before()
            }
            None => StepNumbers::from_record(&self.store.record()),
        };
        let committed = recorded.step;
        let mut metrics = match self.leader() {
            true => Metrics::open(self.spec.output.metrics.as_deref(), self.history, committed, self.control)?,
            false => Metrics::default(),
        };
        let durable = metrics.durable();
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(optimizer_threads(self.assignment.device.kind, self.assignment.device.threads))
            .thread_name(move |i| format!("adamw{rank}-{i}"))
            .build()
            .map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start the optimizer's threads: {e}")))?;
        let (steps, staging) = (self.prepared.steps, self.plan.checkpoint_staging);
        // Beside a GPU the processor has little else to do; on a CPU device it is the one that trains.
        let share = if self.assignment.device.kind == DeviceKind::Cuda { 2 } else { 4 };
        let copiers = (self.assignment.device.threads / share).clamp(1, 16);
        let checkpoints = Checkpoints::new(self.spec, &self.architecture, steps, &self.store, &self.comm, self.control, copiers, staging)?;
        let checkpoints = checkpoints.with_lines(&durable).with_note(self.first_checkpoint());
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
            previous: recorded,
            tracing: Tracing::new(self.recorder.clone(), rank, device, self.prepared.steps),
            pool: &pool,
        };
        // The writer may have died between a commit and its line.
        let missing = metrics.lacks(&recorded);
        if self.comm.gather(Channel::Step, [f64::from(u8::from(missing)), 0.0, 0.0, 0.0])?[0][0] > 0.0 {
            let mut n = recorded;
            if state.validation_due(n.step) && n.validation_loss.is_nan() {
                n.validation_loss = state.validate(n.step)?;
            }
            metrics.add_missing(&n, self.control)?;
        }
        for (m, line) in metrics.untold(self.history.told, committed) {
            self.control.metrics(&m, &line);
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
                            let result = caught(OPTIMIZER, || early.run(owner, &job).map(Answer::Early));
                            if !self.answer(&done, result) {
                                return;
                            }
                            continue;
                        }
                        (Job::Early(_), _) => continue,
                    };
                    let checkpoint = job.checkpoint;
                    let result = caught(OPTIMIZER, || {
                        let mut guard = metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        let file = &mut *guard;
                        let tools = &mut tools;
                        pool.install(move || self.commit(owner, tools, job, file))
                    });
                    let due = checkpoint.and_then(|request| Some(Due::of(&result.as_ref().ok()?.numbers, request)));
                    if !self.answer(&done, result.map(|c| Answer::Committed(Box::new(c)))) {
                        return;
                    }
                    // Before the next job, which would overwrite what belongs to this step.
                    if let Some(Err(e)) = due.map(|due| caught(OPTIMIZER, || checkpoints.begin(scope, owner, due))) {
                        self.answer(&done, Err(e));
                        return;
                    }
                }
            });
            spawned.map_err(|e| EngineError::new(ErrorKind::Resources, format!("cannot start the optimizer's thread: {e}")))?;
            checkpoints.warm(scope);
            let _panic = AbortOnPanic(&self.comm);
            let owed = state.owed_checkpoint().and_then(|due| due.map_or(Ok(()), |due| checkpoints.begin(scope, owner, due)));
            let result = owed.and_then(|()| state.run(&to_optimizer, &from_optimizer, metrics));
            // The first error is the optimizer's, or a checkpoint's, where the loop only noticed that it was gone; what they say
            // once this rank has given up for the loop's own error is not.
            let first = from_optimizer.try_iter().find_map(Result::err).or_else(|| checkpoints.panic());
            if result.is_err() || first.is_some() {
                self.comm.abort();
            }
            drop(to_optimizer);
            // Also where the loop was at its end: a checkpoint that is a result of the job is missing.
            first.map_or(result, Err)
        })?;
        metrics.lock().unwrap_or_else(std::sync::PoisonError::into_inner).close(self.control);
        durable.sync(self.control);
        let Loop { session, committed, .. } = state;
        session.close(); // frees the device for the sample
        let (newest_checkpoint, missing_result) = checkpoints.results();
        let outcome = self.finish(committed.step, stopped, newest_checkpoint)?;
        missing_result.map_or(Ok(outcome), Err)
    }

    /// The note of whether the job has a checkpoint.
    fn first_checkpoint(&self) -> FirstCheckpoint {
        FirstCheckpoint::beside(&self.history.path)
    }

    /// The optimizer's thread tells the step loop, which gives up after an error: it may be waiting for pages that will not come.
    /// `false`: there is no more to do.
    fn answer(&self, done: &mpsc::Sender<Result<Answer, EngineError>>, result: Result<Answer, EngineError>) -> bool {
        let failed = result.is_err();
        // Sent first: the step loop looks for the cause when it notices that the rank has given up.
        let heard = done.send(result).is_ok();
        if failed {
            self.comm.abort();
        }
        heard && !failed
    }

    /// Model folder and sample, by the leader.
    fn finish(&self, step: u64, stopped: bool, checkpoint: Option<std::path::PathBuf>) -> Result<TrainOutcome, EngineError> {
        let mut outcome = TrainOutcome { step, stopped, output: None, sample: None, checkpoint };
        if !self.leader() || stopped {
            return Ok(outcome);
        }
        if let Some(path) = &self.spec.output.path {
            self.control.heartbeat(step, "exporting");
            crate::places::check("`output.path`", path)?;
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
