//! Every call of a client, with any bytes as its request, to a daemon in this process: it answers or refuses, and lives. Root calls, who
//! is an administrator, and a user who is none; for the latter the target has to run as root.
//!
//! Input: calls, each a number (u8: which one; from 128 on it is the user who calls), a length (u16) and the request's bytes. The worker
//! program is `/bin/false`. A daemon that root has shut down leaves nothing, and the next one starts on its state folder.
#![no_main]

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use prost::Message;
use ramtorch_fuzz::folder;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, ErrorKind, Plan, PlanRequest};
use ramtorchd::access::config::UserRef;
use ramtorchd::config::{JobLimits, Service, Settings, Supervision, WorkerCommand};
use ramtorchd::daemon::Daemon;
use ramtorchd::devices::Device;
use ramtorchd::supervisor::outside::Engine;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::signal::unix::SignalKind;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// Those that workers make are on the other socket.
const CALLS: [(&str, bool); 21] = [
    ("/ramtorch.v1.Jobs/Submit", false),
    ("/ramtorch.v1.Jobs/Get", false),
    ("/ramtorch.v1.Jobs/List", false),
    ("/ramtorch.v1.Jobs/Watch", false),
    ("/ramtorch.v1.Jobs/Cancel", false),
    ("/ramtorch.v1.Jobs/Checkpoint", false),
    ("/ramtorch.v1.Jobs/Logs", false),
    ("/ramtorch.v1.Jobs/Trace", false),
    ("/ramtorch.v1.Jobs/Generate", false),
    ("/ramtorch.v1.Jobs/Eval", false),
    ("/ramtorch.v1.Jobs/Export", false),
    ("/ramtorch.v1.Jobs/Inspect", false),
    ("/ramtorch.v1.Node/Info", false),
    ("/ramtorch.v1.Node/Plan", false),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", false),
    ("/ramtorch.v1.Worker/Register", true),
    ("/ramtorch.v1.Worker/Control", true),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", false),
    ("/grpc.health.v1.Health/Check", false),
    ("/grpc.health.v1.Health/Watch", false),
    (SHUTDOWN, false),
];
const SHUTDOWN: &str = "/ramtorch.v1.Node/Shutdown";
/// Number of the first call that is the user's.
const USERS: u8 = 128;
/// The user `nobody`, and the group here.
const NOBODY: u32 = 65_534;
/// A daemon lives at least so long: starting one takes as long as a hundred calls.
const LIFE: Duration = Duration::from_secs(5);
/// Root's Shutdown is answered in this time.
const END: Duration = Duration::from_secs(5);
/// Calls of one input.
const MOST: usize = 6;
/// Answers that are read of one call, and how long they are waited for.
const ANSWERS: usize = 3;
const PATIENCE: Duration = Duration::from_millis(4);

/// Bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;
    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

struct NoEngine;

impl Engine for NoEngine {
    fn plan(&self, _: &PlanRequest) -> Result<Plan, EngineError> {
        Err(EngineError::new(ErrorKind::Resources, "this engine plans nothing"))
    }
    fn create_segment(&self, _: &str, _: &Plan) -> Result<(), EngineError> {
        Err(EngineError::internal("nor does it make segments"))
    }
}

/// A daemon and the ways to it.
struct Bench {
    started: Instant,
    root: Channel,
    /// None where this process may not become another user.
    nobody: Option<Channel>,
    workers: Channel,
    daemon: Daemon,
}

/// The kernel tells the daemon the user of the thread that connects.
fn connect_as(path: &Path, user: Option<u32>) -> std::io::Result<UnixStream> {
    let path = path.to_path_buf();
    let connect = move || {
        if let Some(id) = user {
            let (gid, uid) = (rustix::thread::Gid::from_raw(id), rustix::thread::Uid::from_raw(id));
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        }
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    // A thread of its own: it stays what it has become.
    std::thread::spawn(connect).join().expect("it does not panic")
}

async fn connect(path: PathBuf, user: Option<u32>) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let stream = connect_as(&path, user);
        async move { stream.and_then(tokio::net::UnixStream::from_std).map(hyper_util::rt::TokioIo::new) }
    });
    tonic::transport::Endpoint::from_static("http://fuzz").connect_with_connector(connector).await
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime"))
}

impl Bench {
    fn start() -> Bench {
        let dir = folder();
        let device = Device {
            spec: DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes: 1 << 30, bus_id: None },
            model: "CPU".into(),
        };
        let mut service = Service::default();
        service.limits.calls_per_second = 1e9;
        service.access.users = vec![UserRef::Uid(NOBODY)];
        let settings = Settings {
            socket: dir.join("d.sock"),
            state_dir: dir.join("state"),
            cache_dir: dir.join("cache"),
            devices: vec![device],
            devices_note: String::new(),
            worker: WorkerCommand { exe: "/bin/false".into(), args: Vec::new() },
            supervision: Supervision {
                restart_budget: 1,
                restart_backoff_seconds: 0.01,
                settle_seconds: 0.01,
                stop_timeout_seconds: 2.0,
                ..Supervision::default()
            },
            jobs: JobLimits { active_max: 16, ended_max: 16, ..JobLimits::default() },
            service,
        };
        runtime().block_on(async {
            let daemon = Daemon::start(settings, Arc::new(NoEngine)).await.expect("a daemon");
            let socket = dir.join("d.sock");
            // The mode of the file keeps out whoever is not in the daemon's group.
            std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).expect("the socket");
            let listens = "the daemon listens";
            Bench {
                started: Instant::now(),
                root: connect(socket.clone(), None).await.expect(listens),
                nobody: connect(socket, Some(NOBODY)).await.ok(),
                workers: connect(dir.join("state/run/worker.sock"), None).await.expect(listens),
                daemon,
            }
        })
    }

    /// Waits for the end of a daemon that was shut down, and starts the next.
    fn replace(self) -> Bench {
        let Bench { daemon, .. } = self;
        let left = runtime().block_on(daemon.finish());
        assert!(left.is_empty(), "left over: {left:?}");
        Bench::start()
    }
}

fn call(number: u8, request: &impl Message) -> Vec<u8> {
    let bytes = request.encode_to_vec();
    [&[number][..], &(bytes.len() as u16).to_le_bytes(), &bytes].concat()
}

fn seeds() -> Vec<Vec<u8>> {
    let job_toml = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n";
    let submit = pb::SubmitRequest { job_toml: job_toml.into(), base_dir: "/tmp".into(), file_name: "j".into(), dry_run: false };
    let id = || "a".to_string();
    let model = |source| Some(pb::ModelSource { source: Some(source) });
    let of_path = model(pb::model_source::Source::Path("/nowhere".into()));
    let of_job = model(pb::model_source::Source::Job(id()));
    let generate =
        pb::GenerateRequest { model: of_path.clone(), prompts: vec!["p".into()], max_new_tokens: 3, top_p: 0.5, ..Default::default() };
    let eval = pb::EvalRequest {
        model: of_job.clone(),
        data_format: "text".into(),
        files: vec!["/f".into()],
        sequence_length: 8,
        ..Default::default()
    };
    let export = pb::ExportRequest { model: of_job.clone(), path: "/nowhere/x".into(), dtype: "bf16".into(), overwrite: false };
    let export_to = pb::ExportRequest { model: of_path.clone(), path: "/tmp".into(), dtype: "fp32".into(), overwrite: true };
    let inspect = pb::InspectRequest { model: of_path, names: vec!["n".into()], values: 3 };
    let register = pb::RegisterRequest { token: "t".into(), pid: 7, start_time_ticks: 9 };
    let heartbeat = pb::worker_report::Report::Heartbeat(pb::Heartbeat { step: 1, phase: "p".into(), sequence: 2 });
    let report = pb::WorkerReport { token: "t".into(), report: Some(heartbeat) };
    vec![
        [call(0, &submit), call(1, &pb::GetJobRequest { id: id() }), call(3, &pb::WatchRequest { id: id(), history: 9 })].concat(),
        [call(2, &pb::ListJobsRequest { all: true }), call(4, &pb::CancelRequest { id: id() })].concat(),
        [call(5, &pb::CheckpointRequest { id: id() }), call(7, &pb::TraceRequest { id: id(), steps: 2, first_step: 1 })].concat(),
        call(6, &pb::LogsRequest { id: id(), rank: Some(0), follow: true, tail_lines: 2 }),
        call(8, &generate),
        call(9, &eval),
        call(10, &export),
        call(11, &inspect),
        [call(12, &pb::NodeInfoRequest {}), call(13, &submit)].concat(),
        call(14, &pb::NodeInfoRequest {}),
        [call(15, &register), call(16, &report)].concat(),
        [call(17, &pb::NodeInfoRequest {}), call(18, &pb::NodeInfoRequest {}), call(19, &pb::NodeInfoRequest {})].concat(),
        [call(0, &submit), call(20, &pb::ShutdownRequest {}), call(2, &pb::ListJobsRequest { all: true })].concat(),
        // Another user's job, and one's own.
        [
            call(0, &submit),
            call(USERS + 1, &pb::GetJobRequest { id: id() }),
            call(USERS, &submit),
            call(USERS + 1, &pb::GetJobRequest { id: id() }),
            call(USERS + 4, &pb::CancelRequest { id: id() }),
            call(USERS + 20, &pb::ShutdownRequest {}),
        ]
        .concat(),
        [call(USERS + 10, &export_to), call(USERS + 9, &eval), call(USERS + 13, &submit)].concat(),
    ]
}

/// `Some`: the first answer, or the refusal, if it came in time.
async fn send(channel: &Channel, path: &'static str, request: Bytes, patience: Duration) -> Option<Result<(), Status>> {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.expect("the daemon lives");
    let stream = tokio_stream::once(request);
    let answers = async {
        let mut answers = match grpc.streaming(Request::new(stream), PathAndQuery::from_static(path), Raw).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => {
                // A panic of a handler ends its stream without an answer.
                assert!(status.code() != Code::Unknown, "{path}: {status}");
                return Err(status);
            }
        };
        for _ in 0..ANSWERS {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(status) => return Err(status),
            }
        }
        Ok(())
    };
    tokio::time::timeout(patience, answers).await.ok()
}

fn init() {
    ramtorch_fuzz::seeds(seeds);
    // Programs with a `main` of Rust's ignore it. Here a connection that a daemon closes at its end would end this process.
    runtime().block_on(async { tokio::signal::unix::signal(SignalKind::pipe()).map(drop) }).expect("a handler of SIGPIPE");
    let bench = Bench::start();
    if bench.nobody.is_none() {
        eprintln!("not root: all calls are the daemon's own user's");
    }
    *BENCH.lock().unwrap_or_else(PoisonError::into_inner) = Some(bench);
}

static BENCH: Mutex<Option<Bench>> = Mutex::new(None);

libfuzzer_sys::fuzz_target!(init: init(), |data: &[u8]| {
    let mut kept = BENCH.lock().unwrap_or_else(PoisonError::into_inner);
    let mut rest = data;
    for _ in 0..MOST {
        let [number, low, high, after @ ..] = rest else { break };
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (request, after) = after.split_at(length);
        rest = after;
        let Some(bench) = kept.as_ref() else { break };
        let (path, of_worker) = CALLS[usize::from(*number % USERS) % CALLS.len()];
        let user = bench.nobody.as_ref().filter(|_| *number >= USERS);
        let channel = if of_worker { &bench.workers } else { user.unwrap_or(&bench.root) };
        let ends = path == SHUTDOWN && user.is_none();
        if ends && bench.started.elapsed() < LIFE {
            continue;
        }
        let patience = if ends { END } else { PATIENCE };
        let answer = runtime().block_on(send(channel, path, Bytes::copy_from_slice(request), patience));
        if path == SHUTDOWN && !ends {
            assert!(!matches!(answer, Some(Ok(()))), "somebody who is no administrator has stopped the daemon");
        }
        if ends && matches!(answer, Some(Ok(()))) {
            *kept = kept.take().map(Bench::replace);
        }
    }
});
