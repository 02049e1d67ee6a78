//! `ramtorch stop`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{Client, ClientError, Endpoint, exit, v1};
use serde_json::json;
use std::io::{IsTerminal, Write};
use std::time::Duration;
use tokio::time::Instant;

/// A daemon stops its jobs at their next step and then ends; longer than this it does not take.
const STOP_LIMIT: Duration = Duration::from_secs(120);
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Stop the daemon and its jobs
#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Stop {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let mut client = global.connect().await?;
        let info = client.info().await?;
        if !self.yes && !confirmed(&info, printer).await? {
            printer.remark("not stopped");
            return Ok(exit::OK);
        }
        match client.shutdown().await {
            // It may be gone before its answer has left.
            Ok(()) | Err(ClientError::Lost(_)) => {}
            Err(error) => return Err(error),
        }
        wait_for_end(global, &client, info.pid).await?;
        printer.confirmation(|| json!({ "stopped": true, "pid": info.pid }), || format!("ramtorchd (pid {}) has stopped\n", info.pid))?;
        Ok(exit::OK)
    }
}

async fn confirmed(info: &v1::NodeInfo, printer: Printer) -> Result<bool, ClientError> {
    if printer.is_json() || !std::io::stdin().is_terminal() {
        return Err(ClientError::Usage("nobody is here to confirm that the daemon and its jobs are to end: give --yes".to_owned()));
    }
    let jobs = match info.jobs_active {
        0 => "has no jobs under way".to_owned(),
        n => format!("has {} under way, which will be stopped", text::plural(n.into(), "job")),
    };
    let mut err = std::io::stderr();
    let question = format!("ramtorchd on {} (pid {}) {jobs}. Stop it? [y/N] ", text::one_line(&info.hostname), info.pid);
    err.write_all(question.as_bytes()).and_then(|()| err.flush()).map_err(ClientError::Output)?;
    let read = || std::io::stdin().lines().next().transpose();
    let line = tokio::task::spawn_blocking(read).await.map_err(|e| ClientError::Protocol(e.to_string()))?;
    Ok(is_yes(line.ok().flatten().as_deref().unwrap_or("")))
}

fn is_yes(line: &str) -> bool {
    matches!(line.trim().to_lowercase().as_str(), "y" | "yes")
}

/// Waits until nobody listens on the socket, or another daemon does.
async fn wait_for_end(global: &Global, client: &Client, pid: i32) -> Result<(), ClientError> {
    let endpoint = match global.endpoint()? {
        // Of several sockets, the one that answered.
        Endpoint::Unix(_) => Endpoint::unix(client.socket()),
        tcp @ Endpoint::Tcp(_) => tcp,
    };
    let started = Instant::now();
    while started.elapsed() < STOP_LIMIT {
        match Client::connect(endpoint.clone()).await {
            Err(_) => return Ok(()),
            Ok(mut again) => match again.info().await {
                Ok(info) if info.pid != pid => return Ok(()),
                _ => tokio::time::sleep(POLL_EVERY).await,
            },
        }
    }
    Err(ClientError::Deadline { call: "shutdown", seconds: STOP_LIMIT.as_secs() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_yes_is_one() {
        assert!(["y", "Y\n", " yes "].into_iter().all(is_yes));
        assert!(!["", "n", "yep", "no"].into_iter().any(is_yes));
    }
}
