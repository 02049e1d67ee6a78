//! `ramtorch node`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::table::{Align, Table, fields};
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};
use std::path::Path;

/// Show the machine: devices, memory, who holds them
#[derive(Debug, Args)]
pub(crate) struct Node {}

impl Node {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let mut client = global.connect().await?;
        let info = client.info().await?;
        printer.result(|| json::node(&info), || page(&info, client.socket()))?;
        Ok(exit::OK)
    }
}

fn page(n: &v1::NodeInfo, socket: &Path) -> String {
    use Align::{Left, Right};
    let up =
        text::seconds_between(n.started_unix_ms, text::now_unix_ms()).map(|s| format!(", up {}", text::duration(s))).unwrap_or_default();
    let free = |available, total| format!("{} free of {}", text::gib(available), text::gib(total));
    let head = fields(&[
        ("host", n.hostname.clone()),
        ("daemon", format!("ramtorchd {}, pid {}{up}", n.version, n.pid)),
        ("socket", socket.display().to_string()),
        ("state", n.state_dir.clone()),
        ("cores", n.cpus.to_string()),
        ("memory", free(n.memory_available_bytes, n.memory_total_bytes)),
        ("shared memory", free(n.shm_available_bytes, n.shm_total_bytes)),
        ("held by jobs", text::gib(n.reserved_bytes)),
        ("jobs", format!("{} under way", n.jobs_active)),
    ]);
    let mut table = Table::new(&[("DEVICE", Left), ("MODEL", Left), ("MEMORY", Right), ("STATE", Left), ("JOB", Left)]);
    for d in &n.devices {
        table.row([d.name.clone(), d.model.clone(), text::gib(d.memory_bytes), d.state.clone(), d.job.clone()]);
    }
    format!("{head}\n{}", table.render())
}
