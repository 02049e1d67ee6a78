//! The step loop of a rank: sweeps, what the gang agrees on after each, validations.

use super::Rank;
use super::optimizer::{Answer, Committed, Job, OptimizerJob, commit_of, gone};
use crate::api::{Command, EngineError, Level};
use crate::batch::{Part, Reader};
use crate::checkpoint::{Checkpoints, Due};
use crate::early::{Ahead, EarlyDone, EarlyJob, Gate, Watch};
use crate::metrics::Metrics;
use crate::model::{Block, Model};
use crate::plan::rank_share;
use crate::record::StepNumbers;
use crate::session::{Session, StepBatches};
use crate::trace::Tracing;
use ramtorch_cpu::Channel;
use ramtorch_data::Order;
use ramtorch_failpoint::{Point, hit};
use ramtorch_job::schedule::learning_rate;
use ramtorch_store::StepPhase;
use ramtorch_trace::{Kind, Label, Row};
use std::sync::{Arc, mpsc};
use std::time::Instant;

// Phases of a step, by themselves and while a checkpoint is written: what a slow disk holds up says nothing of how long a phase
// takes.
const COMPUTING: [&str; 2] = ["computing", "computing beside a checkpoint"];
const REDUCING: [&str; 2] = ["reducing", "reducing beside a checkpoint"];
const OPTIMIZING: [&str; 2] = ["optimizing", "optimizing beside a checkpoint"];
const VALIDATING: [&str; 2] = ["validating", "validating beside a checkpoint"];

/// The step loop's state.
pub(super) struct Loop<'a> {
    pub(super) rank: &'a Rank<'a>,
    pub(super) reader: Reader<'a>,
    pub(super) order: Order,
    pub(super) session: Session,
    pub(super) committed: StepNumbers,
    pub(super) commit_time: Instant,
    pub(super) checkpoints: &'a Checkpoints<'a>,
    pub(super) initial_validation: f64,
    /// Pages that are ahead of the first step.
    pub(super) ahead: Option<Arc<Ahead>>,
    /// A checkpoint that was interrupted is written after the first step, because not all pages are at the step before.
    pub(super) owed: bool,
    /// Tokens of all steps that were swept whole.
    pub(super) tokens_total: u64,
    /// Steps that this gang has swept.
    pub(super) swept: u64,
    /// Of the last step that was swept, or committed before.
    pub(super) previous: StepNumbers,
    pub(super) tracing: Tracing,
    pub(super) pool: &'a rayon::ThreadPool,
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
    pub(super) fn validation_due(&self, step: u64) -> bool {
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
    pub(super) fn owed_checkpoint(&mut self) -> Result<Option<Due>, EngineError> {
        let r = self.rank;
        let (step, spec) = (self.committed.step, &r.spec.checkpoint);
        let Some(folder) = spec.path.as_deref() else { return Ok(None) };
        let last_due = match step.checked_div(spec.every_steps).map_or(0, |n| n * spec.every_steps) {
            _ if self.checkpoint_due(step) => step,
            due => due,
        };
        let mut owed = false;
        if r.leader() {
            if let Err(e) = r.first_checkpoint().forget_unfinished(r.spec) {
                r.control.event(Level::Warn, &format!("the note of a checkpoint that was not finished is not taken back: {e}"));
            }
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
    pub(super) fn run(
        &mut self,
        to_optimizer: &mpsc::Sender<Job>,
        from_optimizer: &mpsc::Receiver<Result<Answer, EngineError>>,
        metrics: &std::sync::Mutex<Metrics>,
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
            self.tell(step, OPTIMIZING);
            let stop = wishes.stop && step < steps;
            let checkpoint = (checkpoint_due || (stop && wishes.checkpoint_then_stop)).then_some(wishes.checkpoint);
            if checkpoint.is_some() {
                self.checkpoints.announce();
            }
            wishes.checkpoint = 0;
            let staged = self.session.take_staged()?;
            // What reads the segment after this step finds all of it at the step.
            let whole = checkpoint.is_some() || stop || step == steps;
            let job = OptimizerJob { numbers, early, line_later: validation_due, begun, staged, sent: Instant::now(), checkpoint, whole };
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

    /// Where this rank is.
    fn tell(&self, step: u64, phase: [&'static str; 2]) {
        self.rank.control.heartbeat(step, phase[usize::from(self.checkpoints.under_way())]);
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
        self.tell(step, COMPUTING);
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
            past: self.previous.past_of_next(),
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
            self.tell(step, REDUCING);
        }
        // All is enqueued: gradients are squared as they come, while the backward pass works on the next ones.
        let by_host = if watch.early || watch.by_host { watch.finish(&self.session)? } else { None };
        let span = r.recorder.scope(Row::Loop, Label::blocked("wait for the losses"));
        let loss = self.session.sum_losses(&batches)?;
        drop(span);
        self.tell(step, REDUCING);
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
        self.previous = numbers;
        Ok((numbers, early))
    }

    /// Mean loss over the validation sequences, with the weights of step `step`; the same on every rank.
    pub(super) fn validate(&mut self, step: u64) -> Result<f64, EngineError> {
        let r = self.rank;
        self.tell(step, VALIDATING);
        let limit = r.spec.train.validation_sequences as u64;
        let n = if limit > 0 { limit.min(r.prepared.validation_sequences) } else { r.prepared.validation_sequences };
        let all: Vec<u64> = (0..n).collect();
        let mine = &all[rank_share(all.len(), r.assignment.rank, r.assignment.world_size)];
        let most = all.len().div_ceil(r.assignment.world_size);
        let weight = self.reader.weight(Part::Validation, mine)? * self.session.model.loss_divisor();
        let mut sum = 0f64;
        self.session.evaluate(&self.reader, Part::Validation, mine, most, r.plan.micro_batches, step, &mut sum)?;
        let gathered = r.comm.gather(Channel::Step, [sum, weight, 0.0, 0.0])?;
        let (sum, weight) = gathered.iter().fold((0.0, 0.0), |(s, w), v| (s + v[0], w + v[1]));
        Ok(sum / weight.max(1.0))
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
