//! Every call of a client, with any bytes as its request, to a daemon in this process: it answers or refuses, and lives.
//!
//! Input: calls, each a number (u8: which one), a length (u16) and the request's bytes. The worker program is `/bin/false`.
#![no_main]

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use prost::Message;
use ramtorch_fuzz::folder;
use ramtorch_proto::v1 as pb;
use ramtorch_worker::{DeviceKind, DeviceSpec, EngineError, ErrorKind, Plan, PlanRequest};
use ramtorchd::config::{JobLimits, Service, Settings, Supervision, WorkerCommand};
use ramtorchd::daemon::Daemon;
use ramtorchd::devices::Device;
use ramtorchd::supervisor::outside::Engine;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Runtime;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Request, Status};

/// All but Shutdown, and those that workers make, on the other socket.
const CALLS: [(&str, bool); 17] = [
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
];
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

struct Bench {
    runtime: Runtime,
    clients: Channel,
    workers: Channel,
    _daemon: Daemon,
}

async fn connect(path: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    tonic::transport::Endpoint::from_static("http://fuzz").connect_with_connector(connector).await.expect("the daemon listens")
}

fn bench() -> &'static Bench {
    static BENCH: OnceLock<Bench> = OnceLock::new();
    BENCH.get_or_init(|| {
        let dir = folder();
        let device = Device {
            spec: DeviceSpec { kind: DeviceKind::Cpu, index: 0, threads: 1, memory_bytes: 1 << 30, bus_id: None },
            model: "CPU".into(),
        };
        let mut service = Service::default();
        service.limits.calls_per_second = 1e9;
        let settings = Settings {
            socket: dir.join("d.sock"),
            state_dir: dir.join("state"),
            cache_dir: dir.join("cache"),
            devices: vec![device],
            devices_note: String::new(),
            worker: WorkerCommand { exe: "/bin/false".into(), args: Vec::new() },
            supervision: Supervision { restart_budget: 1, restart_backoff_seconds: 0.01, settle_seconds: 0.01, ..Supervision::default() },
            jobs: JobLimits { active_max: 16, ended_max: 16, ..JobLimits::default() },
            service,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
        let (daemon, clients, workers) = runtime.block_on(async {
            let daemon = Daemon::start(settings, Arc::new(NoEngine)).await.expect("a daemon");
            (daemon, connect(dir.join("d.sock")).await, connect(dir.join("state/run/worker.sock")).await)
        });
        Bench { runtime, clients, workers, _daemon: daemon }
    })
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
    ]
}

async fn send(channel: &Channel, path: &'static str, request: Bytes) {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    grpc.ready().await.expect("the daemon lives");
    let stream = tokio_stream::once(request);
    let answers = async {
        let mut answers = match grpc.streaming(Request::new(stream), PathAndQuery::from_static(path), Raw).await {
            Ok(answers) => answers.into_inner(),
            Err(status) => {
                // A panic of a handler ends its stream without an answer.
                assert!(status.code() != tonic::Code::Unknown, "{path}: {status}");
                return;
            }
        };
        for _ in 0..ANSWERS {
            if !matches!(answers.message().await, Ok(Some(_))) {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(PATIENCE, answers).await;
}

fn init() {
    ramtorch_fuzz::seeds(seeds);
    bench();
}

libfuzzer_sys::fuzz_target!(init: init(), |data: &[u8]| {
    let bench = bench();
    let mut rest = data;
    for _ in 0..MOST {
        let [number, low, high, after @ ..] = rest else { break };
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(after.len());
        let (request, after) = after.split_at(length);
        rest = after;
        let (path, of_worker) = CALLS[usize::from(*number) % CALLS.len()];
        let channel = if of_worker { &bench.workers } else { &bench.clients };
        bench.runtime.block_on(send(channel, path, Bytes::copy_from_slice(request)));
    }
});
