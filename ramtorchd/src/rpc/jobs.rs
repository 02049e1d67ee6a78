//! `ramtorch.v1.Jobs`

use super::{Context as Services, MAX_JOB_FILE_BYTES, caller, convert, invalid, oneoff, peer_gid};
use crate::access::paths::Use;
use crate::access::{Caller, outputs};
use crate::disk;
use crate::logs::LogReader;
use crate::node;
use crate::supervisor::message::{LogSource, Watching};
use crate::supervisor::oneoff::OneOffEvent;
use crate::supervisor::record::{self, Record};
use crate::supervisor::watchers::Told;
use crate::supervisor::{Message, Refusal, RefusalKind};
use crate::world::RECORD_LIMIT;
use ramtorch_job::JobSpec;
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::jobs_server::Jobs;
use ramtorch_worker::{EngineError, ErrorKind, EvalResult, Exported, Generated, Inspected, Task};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::{Request, Response, Status};

/// Messages of a stream that may wait for its reader.
const STREAM_BACKLOG: usize = 64;
/// Time between two looks for new log lines.
const LOG_INTERVAL: Duration = Duration::from_millis(200);

/// The service.
pub struct JobsService {
    context: Services,
}

impl JobsService {
    /// The service of this daemon.
    pub fn new(context: Services) -> JobsService {
        JobsService { context }
    }

    async fn create(&self, spec: JobSpec, caller: &Caller, outputs: Vec<PathBuf>) -> Result<pb::Job, Refusal> {
        // Durable before it is accepted: a job that was answered for is not forgotten.
        let jobs = self.context.jobs.clone();
        let (made, places, uid) = (spec.clone(), outputs.clone(), caller.uid);
        let write = tokio::task::spawn_blocking(move || -> std::io::Result<Record> {
            loop {
                let mut record = Record::new(new_id()?, &made, uid, node::unix_ms());
                record.outputs.clone_from(&places);
                let dir = jobs.join(&record.id);
                match std::fs::create_dir(&dir) {
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                    other => other?,
                }
                let written = disk::replace(&dir.join("job.json"), &serde_json::to_vec(&record)?);
                if written.is_err() {
                    let _ = std::fs::remove_dir_all(&dir);
                }
                return written.map(|()| record);
            }
        });
        let cannot = |e: String| EngineError::new(ErrorKind::Output, format!("cannot keep the job in the state folder: {e}"));
        let record = write.await.map_err(|e| cannot(e.to_string()))?.map_err(|e| cannot(e.to_string()))?;
        let dir = self.context.jobs.join(&record.id);
        let (record, spec) = (Box::new(record), Box::new(spec));
        let asks = caller.clone();
        let answer = self.context.handle.ask(|reply| Message::Submit { record, spec, caller: asks, reply }).await;
        match answer {
            Ok(_) => self.context.claim(caller, outputs).await,
            Err(_) => drop(tokio::fs::remove_dir_all(dir).await),
        }
        answer
    }
}

/// Checks a job file.
pub(super) fn parse(request: &pb::SubmitRequest) -> Result<JobSpec, Refusal> {
    if request.job_toml.len() > MAX_JOB_FILE_BYTES {
        return Err(invalid(format!("the job file has {} bytes; at most {MAX_JOB_FILE_BYTES} are read", request.job_toml.len())));
    }
    let base = convert::absolute("base_dir", &request.base_dir)?;
    let file = if request.file_name.is_empty() { "job file" } else { &request.file_name };
    JobSpec::parse(&request.job_toml, &base, file).map_err(|e| EngineError::new(ErrorKind::JobFile, e).into())
}

/// Checks where a job reads and writes.
pub(super) async fn check_paths(context: &Services, spec: &JobSpec) -> Result<(), Refusal> {
    let spec = spec.clone();
    context.allowed(move |roots| roots.check_job(&spec)).await
}

/// Somebody else's job, as far as it concerns everybody: that it is there, and what it holds.
fn from_outside(job: pb::Job) -> pb::Job {
    pb::Job {
        id: job.id,
        state: job.state,
        uid: job.uid,
        step: job.step,
        steps: job.steps,
        world_size: job.world_size,
        restarts: job.restarts,
        created_unix_ms: job.created_unix_ms,
        started_unix_ms: job.started_unix_ms,
        ended_unix_ms: job.ended_unix_ms,
        exit_code: job.exit_code,
        segment_bytes: job.segment_bytes,
        ..Default::default()
    }
}

/// Eight letters and digits, a letter first, none that are easily confused.
fn new_id() -> std::io::Result<String> {
    const LETTERS: &[u8] = b"abcdefghjkmnpqrstuvwxyz";
    const ALL: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";
    let pick = |(i, byte): (usize, u8)| {
        let set = if i == 0 { LETTERS } else { ALL };
        char::from(set[usize::from(byte) % set.len()])
    };
    Ok(node::random::<8>()?.into_iter().enumerate().map(pick).collect())
}

#[tonic::async_trait]
impl Jobs for JobsService {
    async fn submit(&self, request: Request<pb::SubmitRequest>) -> Result<Response<pb::Job>, Status> {
        let (caller, process_gid) = (caller(&request)?, peer_gid(&request));
        let request = request.into_inner();
        let spec = parse(&request)?;
        check_paths(&self.context, &spec).await?;
        let outputs = self.context.writable(&caller, process_gid, outputs::of_job(&spec)).await?;
        if request.dry_run {
            let name = spec.name.clone();
            let spec_toml = spec.to_toml();
            let (prepared, plan) = oneoff::plan(&self.context, &caller, spec).await?;
            return Ok(Response::new(pb::Job {
                name,
                spec_toml,
                uid: caller.uid,
                steps: prepared.steps,
                model: prepared.description,
                world_size: u32::try_from(plan.device_bytes.len()).unwrap_or(u32::MAX),
                segment_bytes: plan.segment_bytes,
                plan: Some(record::plan_to_pb(&plan)),
                message: "planned only: nothing was submitted".into(),
                ..Default::default()
            }));
        }
        Ok(Response::new(self.create(spec, &caller, outputs).await?))
    }

    async fn get(&self, request: Request<pb::GetJobRequest>) -> Result<Response<pb::Job>, Status> {
        let caller = caller(&request)?;
        let id = self.context.own(&caller, request.into_inner().id).await?;
        Ok(Response::new(self.context.handle.ask(|reply| Message::Get { id, reply }).await?))
    }

    async fn list(&self, request: Request<pb::ListJobsRequest>) -> Result<Response<pb::ListJobsResponse>, Status> {
        let caller = caller(&request)?;
        let all = request.into_inner().all;
        let jobs = self.context.handle.ask(|reply| Message::List { all, reply }).await?;
        let jobs = jobs.into_iter().map(|job| if caller.may_touch(job.uid) { job } else { from_outside(job) }).collect();
        Ok(Response::new(pb::ListJobsResponse { jobs }))
    }

    type WatchStream = WatchStream;
    async fn watch(&self, request: Request<pb::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let caller = caller(&request)?;
        let pb::WatchRequest { id, history } = request.into_inner();
        let id = self.context.own(&caller, id).await?;
        let history = history as usize;
        let mut watching = self.context.handle.ask(|reply| Message::Watch { id, history, reply }).await?;
        if let Some(path) = watching.history_file.take() {
            let read = tokio::task::spawn_blocking(move || record::read_history(&path, history));
            let on_disk = read.await.map_err(|e| Status::internal(e.to_string()))?;
            // What was told is in the file, unless it could not be written.
            let newest = |history: &[pb::Metrics]| (history.last().map_or(0, |m| m.step), history.len());
            if newest(&on_disk) > newest(&watching.history) {
                watching.history = on_disk;
            }
        }
        Ok(Response::new(WatchStream::new(watching)))
    }

    async fn cancel(&self, request: Request<pb::CancelRequest>) -> Result<Response<pb::Job>, Status> {
        let caller = caller(&request)?;
        let id = self.context.own(&caller, request.into_inner().id).await?;
        let job = self.context.handle.ask(|reply| Message::Cancel { id, reply }).await?;
        // Durable before it is answered: a job that its user was told is cancelled does not go on when the daemon dies.
        let (records, id) = (self.context.records.clone(), job.id.clone());
        let durable = tokio::task::spawn_blocking(move || records.durable(&id, RECORD_LIMIT)).await;
        if let Err(why) = durable.map_err(|e| e.to_string()).and_then(|written| written) {
            let text = format!(
                "job {} is being cancelled, and that could not be noted in the state folder: {why}; a daemon that starts before it is \
                 noted goes on with the job: make room, and see `ramtorch describe {}`",
                job.id, job.id
            );
            return Err(Refusal::from(EngineError::new(ErrorKind::Output, text)).into());
        }
        ramtorch_failpoint::hit(ramtorch_failpoint::Point::JobCancelled);
        Ok(Response::new(job))
    }

    async fn checkpoint(&self, request: Request<pb::CheckpointRequest>) -> Result<Response<pb::CheckpointResponse>, Status> {
        let caller = caller(&request)?;
        let id = self.context.own(&caller, request.into_inner().id).await?;
        Ok(Response::new(self.context.handle.ask(|reply| Message::Checkpoint { id, reply }).await?))
    }

    type TraceStream = ReceiverStream<Result<pb::TracePart, Status>>;
    async fn trace(&self, request: Request<pb::TraceRequest>) -> Result<Response<Self::TraceStream>, Status> {
        let caller = caller(&request)?;
        let pb::TraceRequest { id, steps, first_step } = request.into_inner();
        let id = self.context.own(&caller, id).await?;
        let mut parts = self.context.handle.ask(|reply| Message::Trace { id, first_step, steps, reply }).await?;
        let (tx, rx) = mpsc::channel(STREAM_BACKLOG);
        tokio::spawn(async move {
            loop {
                let part = tokio::select! {
                    part = parts.recv() => part,
                    () = tx.closed() => return,
                };
                let Some(part) = part else { return };
                if tx.send(part.map_err(Status::from)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    type LogsStream = ReceiverStream<Result<pb::LogChunk, Status>>;
    async fn logs(&self, request: Request<pb::LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        let caller = caller(&request)?;
        let pb::LogsRequest { id, rank, follow, tail_lines } = request.into_inner();
        let id = self.context.own(&caller, id).await?;
        let source = self.context.handle.ask(|reply| Message::Logs { id, reply }).await?;
        let (tx, rx) = mpsc::channel(STREAM_BACKLOG);
        tokio::spawn(serve_logs(source, rank, follow, tail_lines, tx));
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    type GenerateStream = ReceiverStream<Result<pb::GenerateEvent, Status>>;
    async fn generate(&self, request: Request<pb::GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        let caller = caller(&request)?;
        let mut request = request.into_inner();
        let model = request.model.take();
        let work = convert::generate(&request)?;
        let source = convert::source(&self.context, &caller, model).await?;
        let events = oneoff::start(&self.context, &caller, Task::Generate { source, request: work }, true).await?;
        let (tx, rx) = mpsc::channel(STREAM_BACKLOG);
        tokio::spawn(serve_text(events, tx));
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn eval(&self, request: Request<pb::EvalRequest>) -> Result<Response<pb::EvalResponse>, Status> {
        let caller = caller(&request)?;
        let mut request = request.into_inner();
        let model = request.model.take();
        let work = convert::eval(&request, self.context.cache.clone())?;
        let files = work.files.clone();
        self.context.allowed(move |roots| files.iter().try_for_each(|f| roots.check_pattern("the data file", f))).await?;
        let source = convert::source(&self.context, &caller, model).await?;
        let r: EvalResult = oneoff::result(&self.context, &caller, Task::Eval { source, request: work }, true).await?;
        Ok(Response::new(pb::EvalResponse { loss: r.loss, perplexity: r.perplexity, tokens: r.tokens, seconds: r.seconds }))
    }

    async fn export(&self, request: Request<pb::ExportRequest>) -> Result<Response<pb::ExportResponse>, Status> {
        let (caller, process_gid) = (caller(&request)?, peer_gid(&request));
        let request = request.into_inner();
        let (path, dtype) = (convert::absolute("path", &request.path)?, convert::precision(&request.dtype)?);
        let source = convert::source(&self.context, &caller, request.model).await?;
        let target = path.clone();
        self.context.allowed(move |roots| roots.check("the model folder", &target, Use::Write)).await?;
        let outputs = self.context.writable(&caller, process_gid, outputs::of_export(path.clone())).await?;
        // Where the links on the way led when they were looked at: a link that comes later is not followed any more.
        let (places, place, uid) = (outputs.clone(), outputs.first().cloned(), caller.uid);
        self.context.handle.ask(|reply| Message::Vacant { outputs: places, uid, reply }).await?;
        self.context.claim(&caller, outputs).await;
        let task = Task::Export { source, path: place.unwrap_or_else(|| path.clone()), dtype, overwrite: request.overwrite };
        let r: Exported = oneoff::result(&self.context, &caller, task, false).await?;
        Ok(Response::new(pb::ExportResponse { path: path.to_string_lossy().into_owned(), step: r.step, bytes: r.bytes }))
    }

    async fn inspect(&self, request: Request<pb::InspectRequest>) -> Result<Response<pb::InspectResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let values = convert::values(request.values)?;
        let source = convert::source(&self.context, &caller, request.model).await?;
        let task = Task::Inspect { source, names: request.names, values };
        let r: Inspected = oneoff::result(&self.context, &caller, task, false).await?;
        let tensors = r.tensors.into_iter().map(convert::tensor).collect();
        Ok(Response::new(pb::InspectResponse { step: r.step, tensors }))
    }
}

/// The past, then the future, until the job ends or the reader is too slow.
///
/// It is read by the connection itself: no task and no channel for each watcher, which a thousand of them would notice.
pub struct WatchStream {
    past: std::vec::IntoIter<pb::WatchEvent>,
    future: Option<BroadcastStream<Told>>,
    told: Told,
    /// Number of the next event.
    next: u64,
}

impl WatchStream {
    fn new(watching: Watching) -> WatchStream {
        use pb::watch_event::Event;
        let past = std::iter::once(Event::Job(watching.job)).chain(watching.history.into_iter().map(Event::Metrics));
        let (future, next) = watching.events.map_or((None, 0), |ear| (Some(ear.receiver), ear.since));
        let past: Vec<_> = past.map(|event| pb::WatchEvent { event: Some(event) }).collect();
        WatchStream { past: past.into_iter(), future: future.map(BroadcastStream::new), told: Told::default(), next }
    }
}

impl Stream for WatchStream {
    type Item = Result<pb::WatchEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(event) = self.past.next() {
            return Poll::Ready(Some(Ok(event)));
        }
        loop {
            if let Some(event) = self.told.since(self.next).first().cloned() {
                self.next += 1;
                return Poll::Ready(Some(Ok(event)));
            }
            let Some(future) = &mut self.future else { return Poll::Ready(None) };
            match ready!(Pin::new(future).poll_next(context)) {
                Some(Ok(told)) => {
                    self.next = self.next.max(told.first);
                    self.told = told;
                }
                Some(Err(BroadcastStreamRecvError::Lagged(n))) => {
                    self.future = None;
                    let text =
                        format!("this watcher is {n} messages behind and was dropped; watch again to go on with the job as it is now");
                    return Poll::Ready(Some(Err(Refusal::new(RefusalKind::Busy, text).into())));
                }
                None => self.future = None,
            }
        }
    }
}

async fn serve_logs(source: LogSource, rank: Option<u32>, follow: bool, tail: u32, tx: mpsc::Sender<Result<pb::LogChunk, Status>>) {
    let LogSource { dir, mut ended } = source;
    let mut reader = LogReader::new(dir, rank);
    let mut first = true;
    loop {
        // Looked at before reading: what is written until the end is then surely read.
        let over = *ended.borrow();
        let read = tokio::task::spawn_blocking(move || {
            if first {
                reader.skip_to_tail(tail);
            }
            let chunks = reader.read();
            (reader, chunks)
        });
        let Ok((back, chunks)) = read.await else { return };
        (reader, first) = (back, false);
        let idle = chunks.is_empty();
        for chunk in chunks {
            if tx.send(Ok(chunk)).await.is_err() {
                return;
            }
        }
        if !idle {
            continue;
        }
        if over || !follow {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(LOG_INTERVAL) => {}
            _ = ended.changed() => {}
            () = tx.closed() => return,
        }
    }
}

async fn serve_text(mut events: mpsc::UnboundedReceiver<OneOffEvent>, tx: mpsc::Sender<Result<pb::GenerateEvent, Status>>) {
    use pb::generate_event::Event;
    loop {
        let event = tokio::select! {
            event = events.recv() => event,
            // Nobody reads any more: dropping `events` ends the work.
            () = tx.closed() => return,
        };
        let (message, last) = match event {
            Some(OneOffEvent::Token(text)) => (Ok(Event::Token(text)), false),
            Some(OneOffEvent::Done(result)) => {
                let done = oneoff::decode::<Generated>(result).map(|g| {
                    let Generated { texts, prompt_tokens, new_tokens, seconds, prefill_seconds, decode_seconds, decode_tokens } = g;
                    Event::Done(pb::GenerateDone {
                        texts,
                        prompt_tokens,
                        new_tokens,
                        seconds,
                        prefill_seconds,
                        decode_seconds,
                        decode_tokens,
                    })
                });
                (done.map_err(Status::from), true)
            }
            None => (Err(Refusal::new(RefusalKind::Stopping, "the daemon stopped before the work was done").into()), true),
        };
        let message = message.map(|event| pb::GenerateEvent { event: Some(event) });
        if tx.send(message).await.is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::watchers::Ear;
    use tokio::sync::broadcast;
    use tokio_stream::StreamExt;

    #[test]
    fn ids_are_short_and_start_with_a_letter() {
        let ids: std::collections::HashSet<String> = (0..200).map(|_| new_id().unwrap()).collect();
        assert_eq!(ids.len(), 200);
        assert!(ids.iter().all(|id| id.len() == 8 && id.starts_with(|c: char| c.is_ascii_lowercase())));
    }

    #[test]
    fn job_files_are_checked_before_anything_else() {
        let request = |toml: &str, base: &str| pb::SubmitRequest { job_toml: toml.into(), base_dir: base.into(), ..Default::default() };
        let error = |r: &pb::SubmitRequest| Status::from(parse(r).unwrap_err());
        assert_eq!(error(&request("nonsense = 1", "/")).code(), tonic::Code::InvalidArgument);
        assert!(error(&request("nonsense = 1", "/")).message().contains("nonsense"));
        assert!(error(&request("", "relative")).message().contains("absolute"));
        assert!(error(&request(&"#".repeat(MAX_JOB_FILE_BYTES + 1), "/")).message().contains("bytes"));
    }

    #[test]
    fn somebody_elses_job_tells_no_secrets() {
        let job = pb::Job { id: "abc".into(), uid: 7, segment_bytes: 9, spec_toml: "s".into(), name: "n".into(), ..Default::default() };
        let job = pb::Job { message: "m".into(), sample: "s".into(), segment: "s".into(), workers: vec![Default::default()], ..job };
        let seen = from_outside(job);
        assert_eq!(seen, pb::Job { id: "abc".into(), uid: 7, segment_bytes: 9, ..Default::default() });
    }

    fn told(steps: std::ops::Range<u64>) -> Told {
        let event = |step| pb::watch_event::Event::Metrics(pb::Metrics { step, ..Default::default() });
        Told::new(steps.start, steps.map(|step| pb::WatchEvent { event: Some(event(step)) }).collect())
    }

    #[tokio::test]
    async fn a_watcher_that_is_too_slow_is_told_so_and_dropped() {
        let (events, receiver) = broadcast::channel(4);
        for step in 0..100u64 {
            events.send(told(step..step + 2)).unwrap();
        }
        let mut stream = WatchStream::new(Watching {
            job: Default::default(),
            history: vec![],
            history_file: None,
            events: Some(Ear { receiver, since: 2 }),
        });
        assert!(stream.next().await.unwrap().is_ok(), "the job comes first");
        let status = stream.next().await.unwrap().unwrap_err();
        assert!(status.message().contains("96 messages behind"), "{}", status.message());
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_watcher_hears_the_past_then_the_future_then_the_end() {
        let (events, receiver) = broadcast::channel(4);
        let history = vec![pb::Metrics { step: 1, ..Default::default() }];
        let stream =
            WatchStream::new(Watching { job: Default::default(), history, history_file: None, events: Some(Ear { receiver, since: 2 }) });
        events.send(told(1..5)).unwrap();
        events.send(told(5..6)).unwrap();
        drop(events);
        let step = |event: Result<pb::WatchEvent, Status>| match event.unwrap().event {
            Some(pb::watch_event::Event::Metrics(m)) => m.step,
            _ => 0,
        };
        assert_eq!(stream.map(step).collect::<Vec<_>>().await, [0, 1, 2, 3, 4, 5]);
    }
}
