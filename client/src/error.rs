//! What can go wrong between a user and the daemon, and the exit code of each.

use crate::exit;
use std::path::PathBuf;
use tonic::{Code, Status};

/// Response metadata in which the daemon gives the exit code of a refused call, as a decimal number. Without it
/// the code follows from the gRPC status.
pub const EXIT_CODE_METADATA: &str = "ramtorch-exit-code";

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on any of the sockets.
    #[error("cannot reach ramtorchd{}\nstart it with `ramtorchd start`, or name its socket with --socket PATH or RAMTORCH_SOCKET", tried_text(.tried))]
    Unreachable {
        /// Each socket, and why it did not answer.
        tried: Vec<(PathBuf, String)>,
    },
    /// The connection broke while a call was under way.
    #[error("lost the connection to ramtorchd: {0}\nthe daemon may have stopped; `ramtorch node` tells whether it is back")]
    Lost(String),
    /// The daemon accepted a call and did not answer it in time.
    #[error("ramtorchd did not answer the {call} call within {seconds} s; it may be busy or stuck: see its log, or raise --timeout")]
    Deadline {
        /// Name of the call.
        call: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The daemon refused a call.
    #[error("{message}")]
    Refused {
        /// gRPC status code.
        code: Code,
        /// What the daemon said.
        message: String,
        /// Exit code.
        exit_code: u8,
    },
    /// The daemon's answer does not make sense.
    #[error("ramtorchd gave an answer that this version of ramtorch does not understand: {0}; are both of the same version?")]
    Protocol(String),
    /// The user asked for something that cannot be.
    #[error("{0}")]
    Usage(String),
    /// A local file cannot be read.
    #[error("cannot read {what} {}: {source}", .path.display())]
    Read {
        /// Role of the file: "job file".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
        /// Exit code.
        exit_code: u8,
    },
    /// A local file cannot be written.
    #[error("cannot write {}: {source}", .path.display())]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The standard output cannot be written to. A closed pipe is one of its kinds; see [`ClientError::is_broken_pipe`].
    #[error("cannot write to the standard output: {0}")]
    Output(std::io::Error),
    /// The operating system refused something that every command needs.
    #[error("cannot {what}: {source}")]
    System {
        /// What was to be done: "listen for signals".
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// A signal from the keyboard ended the command.
    #[error("interrupted")]
    Interrupted,
}

fn tried_text(tried: &[(PathBuf, String)]) -> String {
    match tried {
        [(path, why)] => format!(" on {}: {why}", path.display()),
        _ => tried.iter().map(|(path, why)| format!("\n  {}: {why}", path.display())).collect::<String>().replacen('\n', "; tried:\n", 1),
    }
}

/// What a call was about: the same gRPC status means different things to a user of different calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A job file: submit, plan.
    JobFile,
    /// An existing job: get, watch, cancel, checkpoint, logs.
    Job,
    /// A model source: generate, eval, export, inspect.
    Model,
    /// The node itself.
    Node,
}

impl ClientError {
    /// Exit code of a command that ends with this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Unreachable { .. } | ClientError::Lost(_) | ClientError::Deadline { .. } => exit::UNREACHABLE,
            ClientError::Refused { exit_code, .. } | ClientError::Read { exit_code, .. } => *exit_code,
            ClientError::Protocol(_) | ClientError::System { .. } => exit::INTERNAL,
            ClientError::Usage(_) => exit::USAGE,
            ClientError::Output(_) if self.is_broken_pipe() => exit::OK,
            ClientError::Output(_) | ClientError::Write { .. } => exit::OUTPUT,
            ClientError::Interrupted => exit::INTERRUPTED,
        }
    }

    /// Whether the reader of the standard output went away (`ramtorch list | head -1`): the end, but no failure.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, ClientError::Output(e) if e.kind() == std::io::ErrorKind::BrokenPipe)
    }

    /// Whether the connection, rather than the daemon's judgement, failed: the same call may work later.
    pub fn is_connection(&self) -> bool {
        matches!(self, ClientError::Unreachable { .. } | ClientError::Lost(_))
            || matches!(self, ClientError::Refused { code: Code::Unavailable, exit_code: exit::UNREACHABLE, .. })
    }

    pub(crate) fn from_status(status: Status, subject: Subject) -> Self {
        if made_here(&status) {
            return ClientError::Lost(root_cause(&status));
        }
        let code = status.code();
        let given = status.metadata().get(EXIT_CODE_METADATA).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<u8>().ok());
        // A refusal never exits with 0, whatever the metadata says.
        let exit_code = given.filter(|&c| c != exit::OK).unwrap_or_else(|| default_exit_code(code, subject));
        let message = match (code, status.message()) {
            (Code::Unimplemented, _) => "this daemon does not know the call; it is older than this ramtorch: upgrade it".to_owned(),
            (_, "") => format!("ramtorchd refused the call: {code}"),
            (_, text) => text.to_owned(),
        };
        ClientError::Refused { code, message, exit_code }
    }
}

/// Statuses that tonic makes from errors of the connection carry their cause, or the words of the HTTP/2 layer;
/// those that a server sent never have a source.
fn made_here(status: &Status) -> bool {
    let transport = ["h2 protocol error", "transport error", "error trying to connect"];
    std::error::Error::source(status).is_some() || transport.iter().any(|text| status.message().starts_with(text))
}

fn root_cause(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = match std::error::Error::source(status) {
        Some(source) => source,
        None => return status.message().to_owned(),
    };
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

fn default_exit_code(code: Code, subject: Subject) -> u8 {
    match code {
        Code::InvalidArgument => match subject {
            Subject::JobFile => exit::JOB_FILE,
            Subject::Model => exit::INPUT,
            Subject::Job | Subject::Node => exit::USAGE,
        },
        Code::FailedPrecondition => match subject {
            Subject::JobFile | Subject::Model => exit::INPUT,
            Subject::Job | Subject::Node => exit::USAGE,
        },
        Code::NotFound => exit::NOT_FOUND,
        Code::DataLoss => exit::INPUT,
        Code::ResourceExhausted => exit::RESOURCES,
        Code::AlreadyExists => exit::OUTPUT,
        Code::Unavailable | Code::PermissionDenied | Code::Unauthenticated => exit::UNREACHABLE,
        Code::Aborted => exit::JOB_FAILED,
        Code::DeadlineExceeded => exit::NOT_FINISHED,
        Code::Cancelled => exit::CANCELLED,
        Code::Ok | Code::Unknown | Code::OutOfRange | Code::Unimplemented | Code::Internal => exit::INTERNAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: Status, subject: Subject) -> ClientError {
        ClientError::from_status(status, subject)
    }

    #[test]
    fn the_daemons_exit_code_wins_unless_it_claims_success() {
        let mut status = Status::invalid_argument("no such file");
        status.metadata_mut().insert(EXIT_CODE_METADATA, "13".parse().unwrap());
        assert_eq!(refused(status.clone(), Subject::JobFile).exit_code(), exit::OUTPUT);
        for nonsense in ["0", "-1", "256", "x", ""] {
            status.metadata_mut().insert(EXIT_CODE_METADATA, nonsense.parse().unwrap());
            assert_eq!(refused(status.clone(), Subject::JobFile).exit_code(), exit::JOB_FILE, "{nonsense:?}");
        }
    }

    #[test]
    fn a_status_means_what_the_call_was_about() {
        assert_eq!(refused(Status::invalid_argument("x"), Subject::JobFile).exit_code(), exit::JOB_FILE);
        assert_eq!(refused(Status::invalid_argument("x"), Subject::Model).exit_code(), exit::INPUT);
        assert_eq!(refused(Status::failed_precondition("x"), Subject::Job).exit_code(), exit::USAGE);
        assert_eq!(refused(Status::resource_exhausted("x"), Subject::JobFile).exit_code(), exit::RESOURCES);
        assert_eq!(refused(Status::not_found("x"), Subject::Job).exit_code(), exit::NOT_FOUND);
    }

    #[test]
    fn no_refusal_is_a_success_or_speechless() {
        for code in 1..17 {
            for subject in [Subject::JobFile, Subject::Job, Subject::Model, Subject::Node] {
                let error = refused(Status::new(Code::from(code), ""), subject);
                assert_ne!(error.exit_code(), exit::OK, "{code}");
                assert!(!error.to_string().is_empty());
            }
        }
    }

    #[test]
    fn a_broken_connection_is_told_from_a_refusal() {
        let io = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert!(matches!(refused(Status::from_error(Box::new(io)), Subject::Job), ClientError::Lost(_)));
        assert!(matches!(refused(Status::unknown("h2 protocol error: broken"), Subject::Job), ClientError::Lost(_)));
        assert!(matches!(refused(Status::unknown("the job is odd"), Subject::Job), ClientError::Refused { .. }));
    }

    #[test]
    fn every_tried_socket_is_named() {
        let tried = vec![(PathBuf::from("/a"), "no such file".to_owned()), (PathBuf::from("/b"), "refused".to_owned())];
        let text = ClientError::Unreachable { tried }.to_string();
        assert!(text.starts_with("cannot reach ramtorchd; tried:\n  /a: no such file\n  /b: refused\n"), "{text}");
        let one = ClientError::Unreachable { tried: vec![("/a".into(), "refused".into())] }.to_string();
        assert!(one.starts_with("cannot reach ramtorchd on /a: refused\n"), "{one}");
        assert!(one.contains("ramtorchd start"));
    }
}
