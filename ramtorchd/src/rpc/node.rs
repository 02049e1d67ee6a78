//! `ramtorch.v1.Node`

use super::{Context, caller, jobs, oneoff, peer_gid};
use crate::access::outputs;
use crate::node;
use crate::supervisor::record::plan_to_pb;
use crate::supervisor::{Message, Refusal, RefusalKind};
use ramtorch_proto::v1 as pb;
use ramtorch_proto::v1::node_server::Node;
use tonic::{Request, Response, Status};

/// The service.
pub struct NodeService {
    context: Context,
}

impl NodeService {
    /// The service of this daemon.
    pub fn new(context: Context) -> NodeService {
        NodeService { context }
    }
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn info(&self, _: Request<pb::NodeInfoRequest>) -> Result<Response<pb::NodeInfo>, Status> {
        let books = self.context.handle.ask(|reply| Message::Info { reply }).await?;
        Ok(Response::new(pb::NodeInfo {
            version: env!("CARGO_PKG_VERSION").into(),
            hostname: node::hostname(),
            pid: i32::try_from(std::process::id()).unwrap_or(0),
            started_unix_ms: self.context.started_unix_ms,
            memory_total_bytes: books.memory.total,
            memory_available_bytes: books.memory.available,
            shm_total_bytes: books.memory.shm_total,
            shm_available_bytes: books.memory.shm_free,
            reserved_bytes: books.reserved_bytes,
            devices: books.devices,
            jobs_active: books.jobs_active,
            cpus: u32::try_from(node::cores()).unwrap_or(u32::MAX),
            state_dir: self.context.state_dir.to_string_lossy().into_owned(),
        }))
    }

    async fn plan(&self, request: Request<pb::SubmitRequest>) -> Result<Response<pb::Plan>, Status> {
        let (caller, process_gid) = (caller(&request)?, peer_gid(&request));
        let spec = jobs::parse(&request.into_inner())?;
        jobs::check_paths(&self.context, &spec).await?;
        // Its preparation looks at where it would write.
        self.context.writable(&caller, process_gid, outputs::of_job(&spec)).await?;
        let (_, plan) = oneoff::plan(&self.context, &caller, spec).await?;
        Ok(Response::new(plan_to_pb(&plan)))
    }

    async fn shutdown(&self, request: Request<pb::ShutdownRequest>) -> Result<Response<pb::ShutdownResponse>, Status> {
        if !caller(&request)?.admin {
            return Err(Refusal::new(RefusalKind::Denied, "only an administrator ([access] admins) may stop the daemon").into());
        }
        if !self.context.handle.tell(Message::Stop).await {
            return Err(Refusal::new(RefusalKind::Stopping, "the daemon has stopped").into());
        }
        Ok(Response::new(pb::ShutdownResponse {}))
    }
}
