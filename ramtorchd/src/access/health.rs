//! What `grpc.health.v1` says: SERVING while the state loop goes round.
//!
//! ```text
//!   SERVING ──── no beat of the state loop for STALE ───► NOT_SERVING
//!      ▲                                                      │
//!      └──────────────────── a beat ──────────────────────────┘
//! ```

use crate::rpc::{JobsService, NodeService};
use crate::supervisor::Pulse;
use ramtorch_proto::v1::jobs_server::JobsServer;
use ramtorch_proto::v1::node_server::NodeServer;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

/// A loop that has not gone round for so long answers nobody; it does so every second when it has nothing to do.
const STALE: Duration = Duration::from_secs(10);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// Tells of the daemon as a whole, and of each of its services.
async fn tell(reporter: &HealthReporter, status: ServingStatus) {
    for service in ["", <JobsServer<JobsService> as NamedService>::NAME, <NodeServer<NodeService> as NamedService>::NAME] {
        reporter.set_service_status(service, status).await;
    }
}

/// SERVING from now on; the task, which does not end by itself, follows `pulse`.
pub(super) async fn begin(reporter: HealthReporter, pulse: Pulse) -> JoinHandle<()> {
    tell(&reporter, ServingStatus::Serving).await;
    tokio::spawn(follow(reporter, pulse))
}

async fn follow(reporter: HealthReporter, pulse: Pulse) {
    let mut serving = true;
    loop {
        tokio::time::sleep(LOOK).await;
        let goes_round = pulse.age(Instant::now()) < STALE;
        if goes_round == serving {
            continue;
        }
        serving = goes_round;
        if serving {
            tracing::info!("the state loop goes round again");
            tell(&reporter, ServingStatus::Serving).await;
        } else {
            tracing::error!("the state loop has stood still for {STALE:?}: calls are not answered, and the health check says so");
            tell(&reporter, ServingStatus::NotServing).await;
        }
    }
}
