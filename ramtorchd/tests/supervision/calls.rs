//! The other calls: checkpoints, logs, one-off work, plans, and callers who have no business here.

use crate::bench::{Bench, LIMIT, refused, wait_for, wait_state};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::{Client, Events, exit, v1};
use std::time::{Duration, Instant};
use v1::JobState;
use v1::model_source::Source;
use v1::worker_client::WorkerClient;

fn model(source: Source) -> Option<v1::ModelSource> {
    Some(v1::ModelSource { source: Some(source) })
}

fn path(p: &str) -> Option<v1::ModelSource> {
    model(Source::Path(p.into()))
}

fn generate(tokens: u32) -> v1::GenerateRequest {
    let prompts = vec!["a".into(), "b".into()];
    v1::GenerateRequest { model: path("/m"), prompts, max_new_tokens: tokens, ..Default::default() }
}

async fn text(mut events: Events<v1::LogChunk>) -> String {
    let mut bytes = Vec::new();
    while let Some(chunk) = events.next().await.unwrap() {
        bytes.extend(chunk.data);
    }
    String::from_utf8(bytes).unwrap()
}

async fn running(bench: &Bench, client: &mut Client, more: &str) -> String {
    let id = client.submit(bench.job("one", 100_000, more)).await.unwrap().id;
    wait_for(client, &id, "a step", |j| j.step > 1).await;
    id
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_checkpoint_on_request", || async {
            let (bench, mut client) = Bench::start(2, Script::endless()).await;
            let id = running(&bench, &mut client, "[checkpoint]\npath = \"c\"\n").await;
            let answer = client.checkpoint(&id).await.unwrap();
            assert!(std::path::Path::new(&answer.path).is_dir() && answer.path.ends_with(&format!("step-{}", answer.step)));
            // A file in the way: the worker's error is the caller's.
            std::fs::remove_dir_all(bench.dir.path().join("c")).unwrap();
            std::fs::write(bench.dir.path().join("c"), "").unwrap();
            let (code, message) = refused(client.checkpoint(&id).await);
            assert!(code == exit::OUTPUT && message.contains("not written"), "{code} {message}");
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            assert_eq!(refused(client.checkpoint(&id).await).0, exit::USAGE);
            bench.end().await;
        }),
        trial("nobody_writes_where_an_unfinished_job_does", || async {
            // The tests' user is the daemon's, and so an administrator.
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let outputs = "[checkpoint]\npath = \"c\"\n[output]\nmetrics = \"m\"\n";
            let id = running(&bench, &mut client, outputs).await;
            for more in [outputs, "[checkpoint]\npath = \"c\"\n", "[output]\nmetrics = \"m\"\n"] {
                let (code, message) = refused(client.submit(bench.job("two", 5, more)).await);
                assert!(code == exit::OUTPUT && message.contains(&id) && message.contains("has not ended"), "{code} {message}");
            }
            assert_eq!(client.list(true).await.unwrap().len(), 1, "what is refused leaves nothing");
            let elsewhere = client.submit(bench.job("three", 5, "[output]\nmetrics = \"n\"\n")).await.unwrap().id;
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            let again = client.submit(bench.job("two", 5, outputs)).await.unwrap().id;
            for id in [elsewhere, again] {
                wait_state(&mut client, &id, JobState::Succeeded).await;
            }
            bench.end().await;
        }),
        trial("a_job_without_a_checkpoint_path_takes_none", || async {
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let id = running(&bench, &mut client, "").await;
            let (code, message) = refused(client.checkpoint(&id).await);
            assert!(code == exit::USAGE && message.contains("checkpoint.path"), "{code} {message}");
            bench.end().await;
        }),
        trial("logs_by_rank_and_followed", || async {
            let (bench, mut client) = Bench::start(2, Script { step_ms: 30, ..Script::default() }).await;
            let id = client.submit(bench.job("one", 30, "")).await.unwrap().id;
            let request = |rank, follow| v1::LogsRequest { id: id.clone(), rank, follow, tail_lines: 0 };
            let followed = client.logs(request(None, true)).await.unwrap();
            let all = tokio::time::timeout(LIMIT, text(followed)).await.unwrap();
            for line in ["prepare rank 0 generation 1", "train rank 0 generation 1", "train rank 1 generation 1"] {
                assert!(all.contains(line), "{line}: {all}");
            }
            wait_state(&mut client, &id, JobState::Succeeded).await;
            let one = text(client.logs(request(Some(1), false)).await.unwrap()).await;
            assert!(one.contains("train rank 1") && !one.contains("rank 0 generation"), "{one}");
            bench.end().await;
        }),
        trial("text_is_streamed_and_ends_with_all_of_it", || async {
            let (bench, mut client) = Bench::start(1, Script::quick()).await;
            let mut events = client.generate(generate(20)).await.unwrap();
            let mut texts = vec![String::new(), String::new()];
            let done = loop {
                match events.next().await.unwrap().unwrap().event.unwrap() {
                    v1::generate_event::Event::Token(t) => texts[t.prompt as usize].push_str(&t.text),
                    v1::generate_event::Event::Done(done) => break done,
                }
            };
            assert_eq!((done.texts, done.new_tokens), (texts, 20));
            assert_eq!((done.prefill_seconds, done.decode_seconds, done.decode_tokens), (0.1, 0.25, 18));
            assert_eq!(events.next().await.unwrap(), None);
            bench.end().await;
        }),
        trial("one_off_work_ends_when_its_caller_goes_away", || async {
            let (bench, mut client) = Bench::start(1, Script { step_ms: 50, ..Script::default() }).await;
            let mut events = client.generate(generate(1_000_000)).await.unwrap();
            events.next().await.unwrap();
            assert_eq!(bench.workers().len(), 1);
            drop(events);
            let end = Instant::now() + LIMIT;
            while !bench.workers().is_empty() {
                assert!(Instant::now() < end, "the worker goes on");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            bench.end().await;
        }),
        trial("evaluation_export_and_inspection", || async {
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let eval = |file: &str| v1::EvalRequest {
                model: path("/m"),
                data_format: "text".into(),
                files: vec![file.into()],
                sequence_length: 4,
                ..Default::default()
            };
            assert_eq!(client.eval(eval("/t.txt")).await.unwrap().tokens, 7);
            let (code, message) = refused(client.eval(eval("/missing")).await);
            assert!(code == exit::INPUT && message.contains("/missing does not exist"), "{code} {message}");
            let export = v1::ExportRequest { model: path("/m"), path: "/x/y".into(), ..Default::default() };
            assert_eq!(client.export(export.clone()).await.unwrap().path, "/x/y");
            let relative = v1::ExportRequest { path: "y".into(), ..export };
            assert!(refused(client.export(relative).await).1.contains("absolute"));
            // A live job's weights are read from its segment, while it runs.
            let id = running(&bench, &mut client, "").await;
            let inspect = v1::InspectRequest { model: model(Source::Job(id.clone())), ..Default::default() };
            let segment = client.get(&id).await.unwrap().segment;
            let answer = client.inspect(inspect.clone()).await.unwrap();
            assert!(answer.tensors[0].name.contains(&segment), "{answer:?}");
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            assert!(refused(client.inspect(inspect).await).1.contains("without a model folder"));
            bench.end().await;
        }),
        trial("too_many_one_off_calls_are_refused", || async {
            let mut bench = Bench::new(1, Script { step_ms: 50, ..Script::default() });
            bench.settings.jobs.one_off_max = 1;
            let mut client = bench.up().await;
            // The tests' user is an administrator, for whom two are kept.
            let mut served = Vec::new();
            for _ in 0..3 {
                served.push(client.generate(generate(100_000)).await.unwrap());
            }
            let (code, message) = refused(client.generate(generate(1)).await.map(|_| ()));
            assert!(code == exit::RESOURCES && message.contains("one_off_max"), "{code} {message}");
            bench.end().await;
        }),
        trial("a_plan_without_a_job", || async {
            let (bench, mut client) = Bench::start(3, Script::quick()).await;
            let plan = client.plan(bench.job("big-7", 5, "")).await.unwrap();
            assert_eq!((plan.segment_bytes, plan.text.as_str()), (7 << 20, "a fake plan"));
            let dry = client.submit(v1::SubmitRequest { dry_run: true, ..bench.job("big-7", 5, "") }).await.unwrap();
            assert_eq!((dry.world_size, dry.steps, dry.id.as_str()), (3, 5, ""));
            let (code, _) = refused(client.plan(bench.job("big-999999999", 5, "")).await);
            assert_eq!(code, exit::RESOURCES);
            assert!(client.list(true).await.unwrap().is_empty(), "nothing was submitted");
            assert!(bench.segments().is_empty());
            bench.end().await;
        }),
        trial("wrong_job_files_and_unknown_jobs", || async {
            let (bench, mut client) = Bench::start(2, Script::quick()).await;
            let (code, message) = refused(client.submit(bench.job("one", 5, "[optimiser]\nlr = 1\n")).await);
            assert!(code == exit::JOB_FILE && message.contains("optimiser") && message.contains("line"), "{code} {message}");
            let (code, message) = refused(client.submit(bench.job("one", 5, "[device]\nranks = 3\n")).await);
            assert!(code == exit::RESOURCES && message.contains('3'), "{code} {message}");
            assert_eq!(refused(client.get("nobody").await).0, exit::NOT_FOUND);
            assert_eq!(refused(client.get("").await).0, exit::USAGE);
            let id = client.submit(bench.job("one", 1, "")).await.unwrap().id;
            assert_eq!(client.get(&id[..7]).await.unwrap().id, id);
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.end().await;
        }),
        trial("strangers_are_not_taken_for_workers", || async {
            let (bench, mut client) = Bench::start(1, Script::endless()).await;
            let id = running(&bench, &mut client, "").await;
            let socket = bench.settings.state_dir.join("run/worker.sock");
            let mode = |p: &std::path::Path| std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(p).unwrap().permissions()) & 0o777;
            assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o600, 0o700));
            assert_eq!(mode(&bench.settings.socket), 0o660);
            let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", socket.display())).unwrap();
            let mut stranger = WorkerClient::new(endpoint.connect().await.unwrap());
            let request = |token: &str| v1::RegisterRequest { token: token.into(), pid: 1, start_time_ticks: 0 };
            assert_eq!(stranger.register(request("guess")).await.unwrap_err().code(), tonic::Code::PermissionDenied);
            // Not even with a worker's own token: it has registered, and this is another process.
            let pid = client.get(&id).await.unwrap().workers[0].pid;
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
            let token = environment.split(|b| *b == 0).find_map(|v| v.strip_prefix(b"RAMTORCH_WORKER_TOKEN=")).unwrap();
            let token = std::str::from_utf8(token).unwrap();
            assert_eq!(stranger.register(request(token)).await.unwrap_err().code(), tonic::Code::PermissionDenied);
            let report = v1::WorkerReport { token: token.into(), report: None };
            let stream = stranger.control(tokio_stream::iter([report])).await;
            assert_eq!(stream.unwrap_err().code(), tonic::Code::PermissionDenied);
            assert_eq!(client.get(&id).await.unwrap().state(), JobState::Running);
            bench.end().await;
        }),
        trial("health_and_reflection_answer", || async {
            let (bench, _client) = Bench::start(1, Script::quick()).await;
            let endpoint = tonic::transport::Endpoint::try_from(format!("unix://{}", bench.settings.socket.display())).unwrap();
            let channel = endpoint.connect().await.unwrap();
            let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
            let request = tonic_health::pb::HealthCheckRequest { service: "ramtorch.v1.Jobs".into() };
            assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
            use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
            use tonic_reflection::pb::v1::{ServerReflectionRequest, server_reflection_request, server_reflection_response};
            let list = server_reflection_request::MessageRequest::ListServices(String::new());
            let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
            let mut answers =
                ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::iter([request])).await.unwrap().into_inner();
            let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
            let server_reflection_response::MessageResponse::ListServicesResponse(services) = answer else { panic!("{answer:?}") };
            let names: Vec<String> = services.service.into_iter().map(|s| s.name).collect();
            assert!(names.contains(&"ramtorch.v1.Node".to_string()) && names.contains(&"grpc.health.v1.Health".to_string()), "{names:?}");
            drop(answers);
            bench.end().await;
        }),
    ]
}
