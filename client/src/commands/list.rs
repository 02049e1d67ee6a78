//! `ramtorch list`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::table::{Align, Table};
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};
use serde_json::json;

/// List jobs, the newest first
#[derive(Debug, Args)]
pub(crate) struct List {
    /// Ended jobs too
    #[arg(long, short)]
    all: bool,
}

impl List {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let mut jobs = global.connect().await?.list(self.all).await?;
        jobs.sort_by_key(|job| std::cmp::Reverse(job.created_unix_ms));
        if jobs.is_empty() && !printer.is_json() {
            printer.remark(if self.all { "no jobs yet" } else { "no jobs under way; `ramtorch list --all` shows ended ones" });
            return Ok(exit::OK);
        }
        let human = || if printer.quiet { jobs.iter().map(|job| format!("{}\n", text::one_line(&job.id))).collect() } else { table(&jobs) };
        printer.result(|| json!({ "jobs": jobs.iter().map(json::job).collect::<Vec<_>>() }), human)?;
        Ok(exit::OK)
    }
}

fn table(jobs: &[v1::Job]) -> String {
    use Align::{Left, Right};
    let columns = [
        ("ID", Left),
        ("NAME", Left),
        ("STATE", Left),
        ("STEP", Right),
        ("LOSS", Right),
        ("TOK/S", Right),
        ("RANKS", Right),
        ("MEMORY", Right),
        ("AGE", Right),
    ];
    let mut table = Table::new(&columns);
    let now = text::now_unix_ms();
    for job in jobs {
        let metrics = job.last_metrics.as_ref();
        let dash = || "-".to_owned();
        table.row([
            job.id.clone(),
            job.name.clone(),
            json::state_name(job.state).to_owned(),
            if job.steps > 0 { format!("{}/{}", job.step, job.steps) } else { dash() },
            metrics.map_or_else(dash, |m| text::real(m.loss)),
            metrics.map_or_else(dash, |m| text::rate(m.tokens_per_second)),
            if job.world_size > 0 { job.world_size.to_string() } else { dash() },
            if job.segment_bytes > 0 { text::bytes(job.segment_bytes) } else { dash() },
            text::seconds_between(job.created_unix_ms, now).map_or_else(dash, text::duration),
        ]);
    }
    table.render()
}
