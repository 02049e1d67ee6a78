//! Typed calls to the daemon.

use crate::endpoint::Endpoint;
use crate::error::{ClientError, Subject};
use hyper_util::rt::TokioIo;
use ramtorch_proto::v1;
use ramtorch_proto::v1::jobs_client::JobsClient;
use ramtorch_proto::v1::node_client::NodeClient;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

/// Largest answer that is accepted, in bytes: the tensors of a very large model, described.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;
/// Largest request that is sent, in bytes.
pub const MAX_REQUEST_BYTES: usize = 16 << 20;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long calls may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadlines {
    /// Calls that only look at, or change, the daemon's books; and the first answer of a stream.
    pub quick: Duration,
    /// Calls that read or write models and data: submit, plan, checkpoint, eval, export, inspect, generate.
    pub work: Duration,
}

impl Default for Deadlines {
    /// 30 seconds, and 24 hours.
    fn default() -> Self {
        Deadlines { quick: Duration::from_secs(30), work: Duration::from_secs(24 * 3600) }
    }
}

/// A connection to one daemon. Clones share it; it is made again by itself when the daemon was restarted.
#[derive(Debug, Clone)]
pub struct Client {
    jobs: JobsClient<Channel>,
    node: NodeClient<Channel>,
    socket: PathBuf,
    deadlines: Deadlines,
}

impl Client {
    /// Connects to the first socket of `endpoint` that answers, or to its address.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] names every socket that was tried, and why it did not answer; [`ClientError::Read`] a
    /// certificate that cannot be read.
    pub async fn connect(endpoint: Endpoint) -> Result<Self, ClientError> {
        let mut tried = Vec::new();
        match endpoint {
            Endpoint::Unix(candidates) => {
                for path in candidates {
                    match connect_unix(&path).await {
                        Ok(channel) => return Ok(Client::over(channel, path)),
                        Err(why) => tried.push((path, why)),
                    }
                }
            }
            Endpoint::Tcp(tcp) => {
                let place = PathBuf::from(format!("https://{}", tcp.address));
                match crate::tls::connect(&tcp, CONNECT_LIMIT).await? {
                    Ok(channel) => return Ok(Client::over(channel, place)),
                    Err(why) => tried.push((place, why)),
                }
            }
        }
        Err(ClientError::Unreachable { tried })
    }

    fn over(channel: Channel, socket: PathBuf) -> Self {
        let jobs =
            JobsClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES).max_encoding_message_size(MAX_REQUEST_BYTES);
        let node = NodeClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES).max_encoding_message_size(MAX_REQUEST_BYTES);
        Client { jobs, node, socket, deadlines: Deadlines::default() }
    }

    /// The same connection with other deadlines.
    pub fn with_deadlines(mut self, deadlines: Deadlines) -> Self {
        self.deadlines = deadlines;
        self
    }

    /// The socket that answered; for a daemon on another machine its address, as `https://host:port`.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Checks the job file, plans it, and admits or queues it; with `dry_run`, only checks and plans.
    pub async fn submit(&mut self, request: v1::SubmitRequest) -> Result<v1::Job, ClientError> {
        let call = Call { name: "submit", limit: self.deadlines.work, subject: Subject::JobFile };
        call.answer(self.jobs.submit(call.request(request))).await
    }

    /// One job, by id, by a unique prefix of it, or by name (the newest so named).
    pub async fn get(&mut self, id: &str) -> Result<v1::Job, ClientError> {
        let call = Call { name: "get", limit: self.deadlines.quick, subject: Subject::Job };
        call.answer(self.jobs.get(call.request(v1::GetJobRequest { id: id.to_owned() }))).await
    }

    /// Jobs that have not ended; with `all`, ended ones too.
    pub async fn list(&mut self, all: bool) -> Result<Vec<v1::Job>, ClientError> {
        let call = Call { name: "list", limit: self.deadlines.quick, subject: Subject::Job };
        Ok(call.answer(self.jobs.list(call.request(v1::ListJobsRequest { all }))).await?.jobs)
    }

    /// The job as it is, its last `history` metrics, then everything new until it has ended.
    pub async fn watch(&mut self, id: &str, history: u32) -> Result<Events<v1::WatchEvent>, ClientError> {
        let call = Call { name: "watch", limit: self.deadlines.quick, subject: Subject::Job };
        let request = Request::new(v1::WatchRequest { id: id.to_owned(), history });
        call.stream(self.jobs.watch(request)).await
    }

    /// Asks a job to stop; answers at once with the job as it is then.
    pub async fn cancel(&mut self, id: &str) -> Result<v1::Job, ClientError> {
        let call = Call { name: "cancel", limit: self.deadlines.quick, subject: Subject::Job };
        call.answer(self.jobs.cancel(call.request(v1::CancelRequest { id: id.to_owned() }))).await
    }

    /// Writes a checkpoint at the next step boundary; answers when it is durable.
    pub async fn checkpoint(&mut self, id: &str) -> Result<v1::CheckpointResponse, ClientError> {
        let call = Call { name: "checkpoint", limit: self.deadlines.work, subject: Subject::Job };
        call.answer(self.jobs.checkpoint(call.request(v1::CheckpointRequest { id: id.to_owned() }))).await
    }

    /// Records a timeline of some steps of a job; [`crate::trace::collect`] puts the parts together.
    pub async fn trace(&mut self, request: v1::TraceRequest) -> Result<Events<v1::TracePart>, ClientError> {
        let call = Call { name: "trace", limit: self.deadlines.quick, subject: Subject::Job };
        call.stream(self.jobs.trace(Request::new(request))).await
    }

    /// Log text of a job's workers.
    pub async fn logs(&mut self, request: v1::LogsRequest) -> Result<Events<v1::LogChunk>, ClientError> {
        let call = Call { name: "logs", limit: self.deadlines.quick, subject: Subject::Job };
        call.stream(self.jobs.logs(Request::new(request))).await
    }

    /// Samples text; new text arrives as it is made, and the last event has all of it.
    pub async fn generate(&mut self, request: v1::GenerateRequest) -> Result<Events<v1::GenerateEvent>, ClientError> {
        let call = Call { name: "generate", limit: self.deadlines.work, subject: Subject::Model };
        call.stream(self.jobs.generate(Request::new(request))).await
    }

    /// Loss and perplexity of a model on data.
    pub async fn eval(&mut self, request: v1::EvalRequest) -> Result<v1::EvalResponse, ClientError> {
        let call = Call { name: "eval", limit: self.deadlines.work, subject: Subject::Model };
        call.answer(self.jobs.eval(call.request(request))).await
    }

    /// Writes a Hugging Face folder.
    pub async fn export(&mut self, request: v1::ExportRequest) -> Result<v1::ExportResponse, ClientError> {
        let call = Call { name: "export", limit: self.deadlines.work, subject: Subject::Model };
        call.answer(self.jobs.export(call.request(request))).await
    }

    /// Describes the tensors of a checkpoint, a model folder or a live job.
    pub async fn inspect(&mut self, request: v1::InspectRequest) -> Result<v1::InspectResponse, ClientError> {
        let call = Call { name: "inspect", limit: self.deadlines.work, subject: Subject::Model };
        call.answer(self.jobs.inspect(call.request(request))).await
    }

    /// The machine: memory, devices, who holds them.
    pub async fn info(&mut self) -> Result<v1::NodeInfo, ClientError> {
        let call = Call { name: "info", limit: self.deadlines.quick, subject: Subject::Node };
        call.answer(self.node.info(call.request(v1::NodeInfoRequest {}))).await
    }

    /// What a job would need and take, without submitting it.
    pub async fn plan(&mut self, request: v1::SubmitRequest) -> Result<v1::Plan, ClientError> {
        let call = Call { name: "plan", limit: self.deadlines.work, subject: Subject::JobFile };
        call.answer(self.node.plan(call.request(request))).await
    }

    /// Ends the daemon and its jobs.
    pub async fn shutdown(&mut self) -> Result<(), ClientError> {
        let call = Call { name: "shutdown", limit: self.deadlines.quick, subject: Subject::Node };
        call.answer(self.node.shutdown(call.request(v1::ShutdownRequest {}))).await.map(|_| ())
    }
}

async fn connect_unix(path: &Path) -> Result<Channel, String> {
    let path = path.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The authority is not used for a unix socket, but HTTP/2 requires one.
    let transport = tonic::transport::Endpoint::from_static("http://ramtorchd");
    match tokio::time::timeout(CONNECT_LIMIT, transport.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(why_not(&error)),
        Err(_) => Err(format!("did not accept a connection within {} s", CONNECT_LIMIT.as_secs())),
    }
}

/// The operating system's reason, in words, from wherever the transport has wrapped it.
fn why_not(error: &tonic::transport::Error) -> String {
    use std::io::ErrorKind;
    let mut cause: &dyn std::error::Error = error;
    loop {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return match io.kind() {
                ErrorKind::NotFound => "no such socket".to_owned(),
                ErrorKind::ConnectionRefused => "the socket is there, but no daemon listens on it".to_owned(),
                ErrorKind::PermissionDenied => "permission denied; ask the operator for membership of the socket's group".to_owned(),
                _ => io.to_string(),
            };
        }
        match cause.source() {
            Some(next) => cause = next,
            None => return cause.to_string(),
        }
    }
}

/// Name, time limit and meaning of one call.
struct Call {
    name: &'static str,
    limit: Duration,
    subject: Subject,
}

impl Call {
    /// The daemon is told the deadline too, a little later than ours, so that it does not work for nobody.
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.limit.saturating_add(Duration::from_secs(1)));
        request
    }

    async fn answer<T>(&self, response: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, ClientError> {
        match tokio::time::timeout(self.limit, response).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(ClientError::from_status(status, self.subject)),
            Err(_) => Err(ClientError::Deadline { call: self.name, seconds: self.limit.as_secs() }),
        }
    }

    async fn stream<T>(&self, response: impl Future<Output = Result<Response<Streaming<T>>, Status>>) -> Result<Events<T>, ClientError> {
        Ok(Events { inner: self.answer(response).await?, subject: self.subject })
    }
}

/// A stream of answers. Dropping it ends the call and nothing else.
#[derive(Debug)]
pub struct Events<T> {
    inner: Streaming<T>,
    subject: Subject,
}

impl<T> Events<T> {
    /// The next answer; `None` at the end. Safe to cancel.
    ///
    /// # Errors
    /// The daemon ended the stream with a refusal, or the connection broke.
    pub async fn next(&mut self) -> Result<Option<T>, ClientError> {
        self.inner.message().await.map_err(|status| ClientError::from_status(status, self.subject))
    }
}
