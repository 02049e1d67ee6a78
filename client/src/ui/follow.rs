//! Follows a job to its end.

use crate::client::Client;
use crate::error::ClientError;
use crate::exit;
use ramtorch_proto::v1;

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
    /// Write nothing while the job runs, and in human form nothing at its end either.
    pub quiet: bool,
}

/// How following ended.
#[derive(Debug, Clone, PartialEq)]
pub struct JobEnd {
    /// The job as it was last seen.
    pub job: v1::Job,
    /// Exit code for a command that followed it; [`exit::NOT_FINISHED`] after detaching.
    pub exit_code: u8,
}

/// Whether a job in this state has ended.
pub(crate) fn has_ended(state: i32) -> bool {
    use v1::JobState::*;
    matches!(v1::JobState::try_from(state), Ok(Succeeded | Failed | Cancelled))
}

/// Exit code that speaks for a job.
pub(crate) fn exit_code_of(job: &v1::Job) -> u8 {
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

/// Follows a job to its end.
///
/// # Errors
/// No such job, or the connection was lost.
pub async fn follow(client: &mut Client, id: &str, options: FollowOptions) -> Result<JobEnd, ClientError> {
    let mut events = client.watch(id, 1000).await?;
    let mut last = None;
    while let Some(event) = events.next().await? {
        match event.event {
            Some(v1::watch_event::Event::Job(job)) => {
                if !options.quiet {
                    println!("{}", crate::json::state_name(job.state));
                }
                let ended = has_ended(job.state);
                last = Some(job);
                if ended {
                    break;
                }
            }
            Some(v1::watch_event::Event::Metrics(m)) if !options.quiet => println!("step {} loss {:.4}", m.step, m.loss),
            _ => {}
        }
    }
    let job = match last {
        Some(job) => job,
        None => client.get(id).await?,
    };
    let exit_code = exit_code_of(&job);
    Ok(JobEnd { job, exit_code })
}
