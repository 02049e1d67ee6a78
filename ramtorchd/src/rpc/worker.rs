//! `ramtorch.v1.Worker`, on a socket of its own that only the daemon's user can open.

use super::peer_pid;
use crate::supervisor::{Handle, Message};
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::worker_server::Worker;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Commands that may wait for a worker.
const COMMANDS: usize = 64;

/// The service.
pub struct WorkerService {
    handle: Handle,
}

impl WorkerService {
    /// The service of this daemon.
    pub fn new(handle: Handle) -> WorkerService {
        WorkerService { handle }
    }
}

#[tonic::async_trait]
impl Worker for WorkerService {
    async fn register(&self, request: Request<pb::RegisterRequest>) -> Result<Response<pb::Assignment>, Status> {
        let peer_pid = peer_pid(&request);
        let pb::RegisterRequest { token, pid, start_time_ticks } = request.into_inner();
        let ask = |reply| Message::Register { token, pid, start_ticks: start_time_ticks, peer_pid, reply };
        Ok(Response::new(self.handle.ask(ask).await?))
    }

    type ControlStream = ReceiverStream<Result<pb::Command, Status>>;
    async fn control(&self, request: Request<Streaming<pb::WorkerReport>>) -> Result<Response<Self::ControlStream>, Status> {
        let mut reports = request.into_inner();
        let first = reports.message().await?.ok_or_else(|| Status::invalid_argument("the stream ended before the first report"))?;
        let token = first.token.clone();
        let (commands, outgoing) = mpsc::channel(COMMANDS);
        let key = self.handle.ask(|reply| Message::Opened { token: first.token.clone(), commands, reply }).await?;
        let handle = self.handle.clone();
        // Waiting here when the state task is busy holds up this worker's stream, and nothing else.
        tokio::spawn(async move {
            let mut next = Some(first);
            while let Some(pb::WorkerReport { token: theirs, report }) = next {
                if theirs != token {
                    break;
                }
                if let Some(report) = report {
                    if !handle.tell(Message::Report { key, report }).await {
                        return;
                    }
                }
                next = reports.message().await.unwrap_or(None);
            }
            // The state task drops the commands' sender, which ends the stream down: the worker knows then that
            // everything it said was heard.
            handle.tell(Message::Closed { key }).await;
        });
        Ok(Response::new(ReceiverStream::new(outgoing)))
    }
}
