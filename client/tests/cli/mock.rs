//! A daemon made of prepared answers, on a unix socket in a folder of its own.

use ramtorch_client::{EXIT_CODE_METADATA, v1};
use ramtorch_proto::v1::jobs_server::{Jobs, JobsServer};
use ramtorch_proto::v1::node_server::{Node, NodeServer};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::{Code, Request, Response, Status};

/// What a watch of a job sends; one script a call, the last one again and again.
#[derive(Clone)]
#[allow(clippy::large_enum_variant)]
pub enum Play {
    Job(v1::Job),
    Metrics(v1::Metrics),
    Note(v1::Event),
    /// A message of a kind that this version does not know.
    Unknown,
    /// Goes on when the job is cancelled.
    UntilCancelled,
    /// Says nothing more, and stays.
    Silence,
    /// The stream ends with this status.
    Refuse(Code, &'static str),
}

/// Everything that a test sets beforehand and looks at afterwards.
#[derive(Default)]
pub struct Stage {
    pub jobs: Vec<v1::Job>,
    pub scripts: VecDeque<Vec<Play>>,
    pub logs: Vec<v1::LogChunk>,
    pub generated: Vec<v1::GenerateEvent>,
    pub tensors: Vec<v1::TensorInfo>,
    pub trace: Vec<v1::TracePart>,
    /// Every call but `Get` and `Info` answers with this status and, where given, this exit code.
    pub refusal: Option<(Code, &'static str, Option<u8>)>,
    /// No call is ever answered.
    pub mute: bool,
    pub watches: usize,
    pub cancels: usize,
    pub submitted: Vec<v1::SubmitRequest>,
    pub logs_asked: Vec<v1::LogsRequest>,
    pub trace_asked: Vec<v1::TraceRequest>,
    pub generate_asked: Vec<v1::GenerateRequest>,
    pub eval_asked: Vec<v1::EvalRequest>,
    pub export_asked: Vec<v1::ExportRequest>,
    pub inspect_asked: Vec<v1::InspectRequest>,
}

#[derive(Clone, Default)]
struct Service {
    stage: Arc<Mutex<Stage>>,
    cancelled: Arc<Notify>,
    shutdown: Arc<Notify>,
}

/// The daemon; it ends when it is dropped.
pub struct Mock {
    service: Service,
    folder: tempfile::TempDir,
    /// Its own, so that its end breaks every connection, as that of a process does.
    server: Option<Runtime>,
}

impl Mock {
    /// Listens at once.
    pub fn start(stage: Stage) -> Mock {
        let folder = tempfile::tempdir().unwrap();
        let service = Service { stage: Arc::new(Mutex::new(stage)), ..Service::default() };
        let server = Some(serve(&folder.path().join("d.sock"), service.clone()));
        Mock { service, folder, server }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("d.sock")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn stage(&self) -> MutexGuard<'_, Stage> {
        self.service.stage.lock().unwrap()
    }

    /// Breaks every connection and listens again after `pause`.
    pub async fn restart(&mut self, pause: Duration) {
        self.kill();
        std::fs::remove_file(self.socket()).unwrap();
        tokio::time::sleep(pause).await;
        self.server = Some(serve(&self.socket(), self.service.clone()));
    }

    fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown_background();
        }
    }
}

impl Drop for Mock {
    fn drop(&mut self) {
        self.kill();
    }
}

fn serve(socket: &Path, service: Service) -> Runtime {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = {
        let _guard = runtime.enter();
        UnixListener::bind(socket).unwrap()
    };
    let shutdown = service.shutdown.clone();
    runtime.spawn(async move {
        let server = tonic::transport::Server::builder()
            .add_service(JobsServer::new(service.clone()))
            .add_service(NodeServer::new(service))
            .serve_with_incoming(UnixListenerStream::new(listener));
        tokio::select! {
            served = server => served.unwrap(),
            // The answer to the call is still on its way.
            () = async { shutdown.notified().await; tokio::time::sleep(Duration::from_millis(100)).await } => {}
        }
    });
    runtime
}

type Reply<T> = Result<Response<T>, Status>;
type StreamOf<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap()
    }

    async fn ready(&self) -> Result<(), Status> {
        let (mute, refusal) = {
            let stage = self.stage();
            (stage.mute, stage.refusal)
        };
        if mute {
            std::future::pending::<()>().await;
        }
        let Some((code, message, exit_code)) = refusal else { return Ok(()) };
        let mut status = Status::new(code, message);
        if let Some(exit_code) = exit_code {
            status.metadata_mut().insert(EXIT_CODE_METADATA, exit_code.to_string().parse().unwrap());
        }
        Err(status)
    }

    fn find(&self, id: &str) -> Result<v1::Job, Status> {
        let stage = self.stage();
        let found = stage.jobs.iter().find(|job| job.id == id || job.name == id);
        found.cloned().ok_or_else(|| Status::not_found(format!("no job {id:?}; `ramtorch list --all` shows all of them")))
    }
}

fn stream<T: Send + 'static>(items: Vec<T>) -> StreamOf<T> {
    Box::pin(tokio_stream::iter(items.into_iter().map(Ok)))
}

#[tonic::async_trait]
impl Jobs for Service {
    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Reply<v1::Job> {
        self.ready().await?;
        let mut stage = self.stage();
        stage.submitted.push(request.into_inner());
        stage.jobs.first().cloned().map(Response::new).ok_or_else(|| Status::internal("nothing prepared"))
    }

    async fn get(&self, request: Request<v1::GetJobRequest>) -> Reply<v1::Job> {
        if self.stage().mute {
            std::future::pending::<()>().await;
        }
        self.find(&request.into_inner().id).map(Response::new)
    }

    async fn list(&self, request: Request<v1::ListJobsRequest>) -> Reply<v1::ListJobsResponse> {
        self.ready().await?;
        let all = request.into_inner().all;
        let jobs = self.stage().jobs.iter().filter(|job| all || !ramtorch_client::ui::has_ended(job.state)).cloned().collect();
        Ok(Response::new(v1::ListJobsResponse { jobs }))
    }

    type WatchStream = StreamOf<v1::WatchEvent>;
    async fn watch(&self, request: Request<v1::WatchRequest>) -> Reply<Self::WatchStream> {
        self.find(&request.into_inner().id)?;
        let script = {
            let mut stage = self.stage();
            stage.watches += 1;
            if stage.scripts.len() > 1 { stage.scripts.pop_front() } else { stage.scripts.front().cloned() }.unwrap_or_default()
        };
        let (sender, receiver) = mpsc::channel(1);
        let cancelled = self.cancelled.clone();
        tokio::spawn(async move {
            for play in script {
                use v1::watch_event::Event;
                let message = match play {
                    Play::Job(job) => Ok(v1::WatchEvent { event: Some(Event::Job(job)) }),
                    Play::Metrics(metrics) => Ok(v1::WatchEvent { event: Some(Event::Metrics(metrics)) }),
                    Play::Note(note) => Ok(v1::WatchEvent { event: Some(Event::Note(note)) }),
                    Play::Unknown => Ok(v1::WatchEvent { event: None }),
                    Play::Refuse(code, message) => Err(Status::new(code, message)),
                    Play::UntilCancelled => {
                        cancelled.notified().await;
                        continue;
                    }
                    Play::Silence => {
                        sender.closed().await;
                        return;
                    }
                };
                if sender.send(message).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel(&self, request: Request<v1::CancelRequest>) -> Reply<v1::Job> {
        self.ready().await?;
        let mut job = self.find(&request.into_inner().id)?;
        self.stage().cancels += 1;
        self.cancelled.notify_one();
        if !ramtorch_client::ui::has_ended(job.state) {
            job.state = v1::JobState::Stopping as i32;
        }
        Ok(Response::new(job))
    }

    async fn checkpoint(&self, request: Request<v1::CheckpointRequest>) -> Reply<v1::CheckpointResponse> {
        self.ready().await?;
        let job = self.find(&request.into_inner().id)?;
        Ok(Response::new(v1::CheckpointResponse { path: "/checkpoints/step-00000120".into(), step: job.step }))
    }

    type TraceStream = StreamOf<v1::TracePart>;
    async fn trace(&self, request: Request<v1::TraceRequest>) -> Reply<Self::TraceStream> {
        self.ready().await?;
        let mut stage = self.stage();
        stage.trace_asked.push(request.into_inner());
        Ok(Response::new(stream(stage.trace.clone())))
    }

    type LogsStream = StreamOf<v1::LogChunk>;
    async fn logs(&self, request: Request<v1::LogsRequest>) -> Reply<Self::LogsStream> {
        self.ready().await?;
        let request = request.into_inner();
        let mut stage = self.stage();
        let chunks = stage.logs.iter().filter(|c| request.rank.is_none_or(|rank| rank == c.rank)).cloned().collect();
        stage.logs_asked.push(request);
        Ok(Response::new(stream(chunks)))
    }

    type GenerateStream = StreamOf<v1::GenerateEvent>;
    async fn generate(&self, request: Request<v1::GenerateRequest>) -> Reply<Self::GenerateStream> {
        self.ready().await?;
        let mut stage = self.stage();
        stage.generate_asked.push(request.into_inner());
        Ok(Response::new(stream(stage.generated.clone())))
    }

    async fn eval(&self, request: Request<v1::EvalRequest>) -> Reply<v1::EvalResponse> {
        self.ready().await?;
        self.stage().eval_asked.push(request.into_inner());
        Ok(Response::new(v1::EvalResponse { loss: 2.5, perplexity: 12.182_493_960_703_473, tokens: 40_000, seconds: 8.0 }))
    }

    async fn export(&self, request: Request<v1::ExportRequest>) -> Reply<v1::ExportResponse> {
        self.ready().await?;
        let request = request.into_inner();
        let path = request.path.clone();
        self.stage().export_asked.push(request);
        Ok(Response::new(v1::ExportResponse { path, step: 300, bytes: 3 << 29 }))
    }

    async fn inspect(&self, request: Request<v1::InspectRequest>) -> Reply<v1::InspectResponse> {
        self.ready().await?;
        let mut stage = self.stage();
        stage.inspect_asked.push(request.into_inner());
        Ok(Response::new(v1::InspectResponse { step: 120, tensors: stage.tensors.clone() }))
    }
}

#[tonic::async_trait]
impl Node for Service {
    async fn info(&self, _: Request<v1::NodeInfoRequest>) -> Reply<v1::NodeInfo> {
        if self.stage().mute {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(v1::NodeInfo {
            version: "0.1.0".into(),
            hostname: "node7".into(),
            pid: 4242,
            started_unix_ms: ramtorch_client::ui::text::now_unix_ms() - 7_440_000,
            memory_total_bytes: 64 << 30,
            memory_available_bytes: 48 << 30,
            shm_total_bytes: 32 << 30,
            shm_available_bytes: 30 << 30,
            reserved_bytes: 2 << 30,
            devices: vec![
                v1::DeviceInfo {
                    name: "cpu:0".into(),
                    model: "2 threads".into(),
                    memory_bytes: 4 << 30,
                    job: "7f3a".into(),
                    state: "busy".into(),
                },
                v1::DeviceInfo {
                    name: "cpu:1".into(),
                    model: "2 threads".into(),
                    memory_bytes: 4 << 30,
                    job: "".into(),
                    state: "free".into(),
                },
            ],
            jobs_active: 1,
            cpus: 2,
            state_dir: "/var/lib/ramtorch".into(),
        }))
    }

    async fn plan(&self, request: Request<v1::SubmitRequest>) -> Reply<v1::Plan> {
        self.ready().await?;
        self.stage().submitted.push(request.into_inner());
        Ok(Response::new(plan()))
    }

    async fn shutdown(&self, _: Request<v1::ShutdownRequest>) -> Reply<v1::ShutdownResponse> {
        self.ready().await?;
        self.shutdown.notify_one();
        Ok(Response::new(v1::ShutdownResponse {}))
    }
}

/// A job of 300 steps that is at its 120th.
pub fn job(state: v1::JobState) -> v1::Job {
    v1::Job {
        id: "7f3a".into(),
        name: "austen".into(),
        state: state as i32,
        step: 120,
        steps: 300,
        world_size: 2,
        model: "Llama, 12.3M parameters".into(),
        created_unix_ms: 1_795_331_403_000,
        started_unix_ms: 1_795_331_404_000,
        segment: "/ramtorch-7f3a-1".into(),
        segment_bytes: 1 << 30,
        metrics_path: "/runs/austen.jsonl".into(),
        last_metrics: Some(metrics(120)),
        workers: (0..2)
            .map(|rank| v1::WorkerInfo {
                rank,
                device: format!("cpu:{rank}"),
                pid: 4300 + rank as i32,
                phase: "forward".into(),
                step: 121,
                ..Default::default()
            })
            .collect(),
        plan: Some(plan()),
        uid: 1000,
        ..Default::default()
    }
}

/// The metrics of one step, its loss falling from 5 towards 1.
pub fn metrics(step: u64) -> v1::Metrics {
    v1::Metrics {
        step,
        loss: 1.0 + 4.0 * (-(step as f64) / 60.0).exp(),
        grad_norm: 0.5,
        lr: 3e-4,
        tokens: 4096,
        tokens_per_second: 15_234.0,
        step_seconds: 0.25,
        tokens_total: 4096 * step,
        epoch: step as f64 / 300.0,
        json: format!("{{\"step\":{step}}}"),
        ..Default::default()
    }
}

fn plan() -> v1::Plan {
    v1::Plan {
        parameters: 12_300_000,
        segment_bytes: 1 << 30,
        device_bytes: 1 << 28,
        host_bytes: 1 << 29,
        step_seconds: 0.25,
        bound_by: "matrix products".into(),
        text: "segment   1.00 GiB\nstep      250ms, bound by matrix products\n".into(),
        json: "{\"groups\":1}".into(),
    }
}
