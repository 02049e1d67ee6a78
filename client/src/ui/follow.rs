//! Follows a job to its end.
//!
//! ```text
//!            get                 watch                 job ended, stream ended (or silent for a moment)
//!  start ─────────▶ known ─────────────▶ following ────────────────────────────────▶ ended   exit code of the job
//!                                         │  ▲    │
//!                     stream broke, fell  │  │    │ interrupt, Detach
//!                     behind, or ended    ▼  │    └──────────────────▶ detached               101
//!                     before the job     lost ── nothing for 15 s ──▶ Err                     14
//!                                         │
//!    interrupt, Cancel: the job is asked to stop, following goes on; a second interrupt ──▶ given up   130
//! ```
//! - *following*: messages are shown as they come. The daemon sends what happened before first, so a new connection
//!   repeats it: [`Tracker`] tells repeated messages from new ones.
//! - *lost*: the daemon restarts, is being upgraded, or is gone. An interrupt works here as everywhere.
//! - The output may go away (a closed pipe): a command that only looks ends then; one that owns the job goes on
//!   without output.

use super::terminal::{self, Terminal};
use super::tracker::{News, Tracker};
use super::view::{Json, Plain, Quiet, View};
use crate::client::Client;
use crate::error::ClientError;
use crate::exit;
use ramtorch_proto::v1;
use std::io;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Metrics asked for at the start: enough for a curve, little to send.
const HISTORY_STEPS: u32 = 20_000;
/// A daemon that is being restarted is back within this time.
const LOST_LIMIT: Duration = Duration::from_secs(15);
/// After the job's end, what the daemon still has to say comes at once.
const END_SILENCE: Duration = Duration::from_secs(2);
/// A connection that held for so long was sound, whatever came before it.
const STEADY: Duration = Duration::from_secs(5);
/// Between attempts to connect again: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(1);

type Events = crate::client::Events<v1::WatchEvent>;

/// How output is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// What an interrupt from the keyboard does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Interrupt {
    /// The command ends, the job goes on.
    #[default]
    Detach,
    /// The first cancels the job and waits for its end (SIGTERM too), the second gives up waiting.
    Cancel,
}

/// How a job is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FollowOptions {
    /// For people or for programs.
    pub output: Format,
    /// Meaning of Ctrl-C.
    pub interrupt: Interrupt,
    /// Nothing is written but, in JSON form, the last line.
    pub quiet: bool,
}

/// How following ended.
#[derive(Debug, Clone, PartialEq)]
pub struct JobEnd {
    /// The job as it was last seen.
    pub job: v1::Job,
    /// Exit code for a command that followed it: that of the job, [`exit::NOT_FINISHED`] after detaching,
    /// [`exit::INTERRUPTED`] where a second interrupt ended the wait for a cancelled job.
    pub exit_code: u8,
}

/// Whether a job in this state has ended.
pub fn has_ended(state: i32) -> bool {
    use v1::JobState::*;
    matches!(v1::JobState::try_from(state), Ok(Succeeded | Failed | Cancelled))
}

/// Exit code that speaks for a job.
pub fn exit_code_of(job: &v1::Job) -> u8 {
    match v1::JobState::try_from(job.state) {
        Ok(v1::JobState::Succeeded) => exit::OK,
        Ok(v1::JobState::Cancelled) => exit::CANCELLED,
        Ok(v1::JobState::Failed) => match u8::try_from(job.exit_code) {
            Ok(code @ exit::JOB_FILE..=exit::OUTPUT) => code,
            _ => exit::JOB_FAILED,
        },
        _ => exit::NOT_FINISHED,
    }
}

/// Follows a job (by id, prefix or name) to its end and shows it on the standard output.
///
/// From the first call on, SIGINT (and with [`Interrupt::Cancel`] SIGTERM) no longer ends the process by itself.
///
/// # Errors
/// No such job; the connection was lost and did not come back; the standard output cannot be written to, which
/// includes a closed pipe with [`Interrupt::Detach`].
pub async fn follow(client: &mut Client, id: &str, options: FollowOptions) -> Result<JobEnd, ClientError> {
    let mut interrupts = Interrupts::listen(options.interrupt)?;
    let job = tokio::select! {
        job = client.get(id) => job?,
        () = interrupts.next() => return Err(ClientError::Interrupted),
    };
    let follower = Follower {
        client: client.clone(),
        id: job.id.clone(),
        view: view(options),
        tracker: Tracker::new(job),
        interrupt: options.interrupt,
        cancelling: None,
        interrupted: false,
        lost_since: None,
    };
    follower.run(&mut interrupts).await
}

fn view(options: FollowOptions) -> Box<dyn View> {
    match (options.output, options.quiet) {
        (Format::Json, quiet) => Box::new(Json::new(io::stdout(), quiet)),
        (Format::Human, true) => Box::new(Quiet),
        (Format::Human, false) if terminal::is_capable() => Box::new(Terminal::new()),
        (Format::Human, false) => Box::new(Plain::new(io::stdout(), io::stderr(), terminal::columns())),
    }
}

/// Signals that mean an interrupt.
struct Interrupts {
    keyboard: Signal,
    terminate: Option<Signal>,
}

impl Interrupts {
    fn listen(meaning: Interrupt) -> Result<Self, ClientError> {
        let signal = |kind| signal(kind).map_err(|source| ClientError::System { what: "listen for signals", source });
        // Ending a command that only looks needs no care; one that owns a job takes it down in order.
        let terminate = match meaning {
            Interrupt::Detach => None,
            Interrupt::Cancel => Some(signal(SignalKind::terminate())?),
        };
        Ok(Interrupts { keyboard: signal(SignalKind::interrupt())?, terminate })
    }

    async fn next(&mut self) {
        match &mut self.terminate {
            None => self.keyboard.recv().await,
            Some(terminate) => tokio::select! { s = self.keyboard.recv() => s, s = terminate.recv() => s },
        };
    }
}

/// One job, followed. See the diagram above.
struct Follower {
    client: Client,
    id: String,
    view: Box<dyn View>,
    tracker: Tracker,
    interrupt: Interrupt,
    /// The call that asks the job to stop, from the first interrupt on until it is answered.
    cancelling: Option<JoinHandle<Result<v1::Job, ClientError>>>,
    interrupted: bool,
    /// Since when nothing new has come; `None` while all is well.
    lost_since: Option<Instant>,
}

/// How the *following* state was left.
enum Left {
    JobEnded,
    StreamLost(ClientError),
    Interrupted(Box<JobEnd>),
}

impl Follower {
    async fn run(mut self, interrupts: &mut Interrupts) -> Result<JobEnd, ClientError> {
        self.show(|view, tracker| view.job(tracker, None))?;
        let mut lost = None;
        loop {
            let mut stream = match self.connect(lost.take(), interrupts).await? {
                Ok(stream) => stream,
                Err(end) => return Ok(end),
            };
            let connected = Instant::now();
            let left = self.receive(&mut stream, interrupts).await?;
            if connected.elapsed() >= STEADY {
                self.lost_since = None;
            }
            match left {
                Left::JobEnded => return self.end(),
                Left::Interrupted(end) => return Ok(*end),
                Left::StreamLost(error) => lost = Some(error),
            }
        }
    }

    /// Opens the stream of messages; where `lost` is why there is none any more, tries for a while. `Err` inside `Ok`
    /// is an interrupt that ends the command.
    async fn connect(&mut self, lost: Option<ClientError>, interrupts: &mut Interrupts) -> Result<Result<Events, JobEnd>, ClientError> {
        let mut pause = Duration::ZERO;
        if let Some(error) = lost {
            self.on_lost(error)?;
            self.tracker.reconnected();
            pause = FIRST_PAUSE;
        }
        loop {
            let attempt = async {
                tokio::time::sleep(pause).await;
                self.client.watch(&self.id, HISTORY_STEPS).await
            };
            tokio::select! {
                stream = attempt => match stream {
                    Ok(stream) => return Ok(Ok(stream)),
                    Err(error) if error.is_connection() => self.on_lost(error)?,
                    Err(error) => return Err(error),
                },
                () = interrupts.next() => if let Some(end) = self.on_interrupt()? {
                    return Ok(Err(end));
                },
            }
            pause = (pause * 2).clamp(FIRST_PAUSE, LAST_PAUSE);
        }
    }

    /// Takes note of a lost connection; returns its error once it has been lost for too long.
    fn on_lost(&mut self, error: ClientError) -> Result<(), ClientError> {
        match self.lost_since {
            None => {
                self.lost_since = Some(Instant::now());
                if fell_behind(&error) {
                    return Ok(());
                }
                self.show(|view, _| view.notice("lost the connection to ramtorchd; waiting for it to come back"))
            }
            Some(since) if since.elapsed() >= LOST_LIMIT => Err(error),
            Some(_) => Ok(()),
        }
    }

    /// Shows messages until the job has ended, the stream breaks or an interrupt ends the command.
    async fn receive(&mut self, stream: &mut Events, interrupts: &mut Interrupts) -> Result<Left, ClientError> {
        loop {
            let ended = has_ended(self.tracker.job.state);
            tokio::select! {
                message = stream.next() => match message {
                    Ok(Some(message)) => self.on_message(message)?,
                    // An ended job has been told in full, or will not be.
                    Ok(None) => return Ok(if ended { Left::JobEnded } else { Left::StreamLost(ended_early()) }),
                    Err(error) if ended && error.is_connection() => return Ok(Left::JobEnded),
                    Err(error) if error.is_connection() || fell_behind(&error) => return Ok(Left::StreamLost(error)),
                    Err(error) => return Err(error),
                },
                () = tokio::time::sleep(END_SILENCE), if ended => return Ok(Left::JobEnded),
                () = interrupts.next() => if let Some(end) = self.on_interrupt()? {
                    return Ok(Left::Interrupted(Box::new(end)));
                },
                answer = answered(&mut self.cancelling) => {
                    self.cancelling = None;
                    if let Some(error) = answer {
                        self.show(|view, _| view.notice(&format!("cannot cancel the job: {error}")))?;
                    }
                }
            }
        }
    }

    fn on_message(&mut self, message: v1::WatchEvent) -> Result<(), ClientError> {
        match message.event {
            Some(v1::watch_event::Event::Job(job)) => {
                let before = self.tracker.on_job(job);
                if before.state != self.tracker.job.state {
                    self.lost_since = None;
                }
                self.show(|view, tracker| view.job(tracker, Some(&before)))
            }
            Some(v1::watch_event::Event::Metrics(metrics)) => match self.tracker.on_metrics(&metrics) {
                News::Repeated => Ok(()),
                news => {
                    self.lost_since = None;
                    self.show(|view, tracker| view.metrics(tracker, &metrics, news))
                }
            },
            Some(v1::watch_event::Event::Note(event)) => self.show(|view, _| view.note(&event)),
            // A kind of message that a newer daemon sends.
            None => Ok(()),
        }
    }

    /// Acts on an interrupt; `Some` where it ends the command.
    fn on_interrupt(&mut self) -> Result<Option<JobEnd>, ClientError> {
        let first = !std::mem::replace(&mut self.interrupted, true);
        let id = self.id.clone();
        match (self.interrupt, first) {
            (Interrupt::Detach, _) => {
                let hint = format!("detached: the job goes on; `ramtorch watch {id}` comes back to it, `ramtorch cancel {id}` ends it");
                self.detach(exit::NOT_FINISHED, &hint).map(Some)
            }
            (Interrupt::Cancel, true) => {
                let mut client = self.client.clone();
                self.cancelling = Some(tokio::spawn(async move { client.cancel(&id).await }));
                self.show(|view, _| view.notice("cancelling the job; interrupt again to stop waiting for it"))?;
                Ok(None)
            }
            (Interrupt::Cancel, false) => {
                let hint = format!("gave up waiting for job {id} to stop");
                self.detach(exit::INTERRUPTED, &hint).map(Some)
            }
        }
    }

    fn detach(&mut self, exit_code: u8, hint: &str) -> Result<JobEnd, ClientError> {
        self.show(|view, tracker| view.detached(tracker, exit_code, hint))?;
        Ok(JobEnd { job: self.tracker.job.clone(), exit_code })
    }

    fn end(mut self) -> Result<JobEnd, ClientError> {
        let exit_code = exit_code_of(&self.tracker.job);
        self.show(|view, tracker| view.end(tracker, exit_code))?;
        Ok(JobEnd { job: self.tracker.job, exit_code })
    }

    fn show(&mut self, draw: impl FnOnce(&mut dyn View, &Tracker) -> io::Result<()>) -> Result<(), ClientError> {
        match (draw(self.view.as_mut(), &self.tracker), self.interrupt) {
            (Ok(()), _) => Ok(()),
            (Err(error), Interrupt::Detach) => Err(ClientError::Output(error)),
            // Nobody looks any more, but the job is this command's own: see it through.
            (Err(_), Interrupt::Cancel) => {
                self.view = Box::new(Quiet);
                Ok(())
            }
        }
    }
}

/// Whether the daemon dropped this stream because its reader (a terminal that was stopped, a slow pipe) did not keep
/// up. What was missed is in the history of the next one.
fn fell_behind(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { code: tonic::Code::ResourceExhausted, .. })
}

fn ended_early() -> ClientError {
    ClientError::Lost("it stopped telling about the job before the job had ended".to_owned())
}

/// Waits for the call that cancels the job, for ever where there is none. `Some` is why it failed.
async fn answered(call: &mut Option<JoinHandle<Result<v1::Job, ClientError>>>) -> Option<ClientError> {
    match call {
        None => std::future::pending().await,
        Some(call) => match call.await {
            Ok(answer) => answer.err(),
            Err(panicked) => Some(ClientError::Protocol(panicked.to_string())),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_speaks_through_its_exit_code() {
        let job = |state: v1::JobState, exit_code| v1::Job { state: state as i32, exit_code, ..Default::default() };
        let cases = [
            (v1::JobState::Succeeded, 0, exit::OK),
            (v1::JobState::Succeeded, 12, exit::OK),
            (v1::JobState::Failed, 0, exit::JOB_FAILED),
            (v1::JobState::Failed, 1, exit::JOB_FAILED),
            (v1::JobState::Failed, 11, exit::INPUT),
            (v1::JobState::Failed, 13, exit::OUTPUT),
            (v1::JobState::Failed, 14, exit::JOB_FAILED),
            (v1::JobState::Failed, 256 + 12, exit::JOB_FAILED),
            (v1::JobState::Cancelled, 0, exit::CANCELLED),
            (v1::JobState::Running, 0, exit::NOT_FINISHED),
        ];
        for (state, code, expected) in cases {
            assert_eq!(exit_code_of(&job(state, code)), expected, "{state:?} {code}");
        }
        assert_eq!(exit_code_of(&v1::Job { state: 77, ..Default::default() }), exit::NOT_FINISHED);
    }
}
