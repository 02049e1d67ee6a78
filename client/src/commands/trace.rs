//! `ramtorch trace`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, trace, v1};
use serde_json::{Map, json};
use std::path::PathBuf;

/// Record a timeline of some steps of a running job, for Perfetto (ui.perfetto.dev) or chrome://tracing
#[derive(Debug, Args)]
pub(crate) struct Trace {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,

    /// Whole steps to record
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=trace::STEPS_MAX))]
    steps: u64,

    /// First step to record [default: the next]
    #[arg(long, value_name = "STEP", default_value_t = 0, hide_default_value = true)]
    from: u64,

    /// File to write
    #[arg(long, value_name = "FILE", default_value = "trace.json")]
    out: PathBuf,

    /// Replace the file if it is there
    #[arg(long)]
    overwrite: bool,
}

impl Trace {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        trace::check_target(&self.out, self.overwrite)?;
        let mut client = global.connect().await?;
        let job = client.get(&self.job).await?;
        let request = v1::TraceRequest { id: job.id.clone(), steps: self.steps, first_step: self.from };
        let ranks = trace::collect(&mut client, request).await?;
        let mut about = Map::new();
        about.insert("job".into(), job.id.as_str().into());
        about.insert("name".into(), job.name.as_str().into());
        trace::save(&self.out, &ranks, &about)?;
        let summary = trace::summarize(&ranks);
        let path = self.out.display().to_string();
        printer.confirmation(
            || json!({ "path": path, "first_step": summary.first_step, "ranks": summary.ranks }),
            || format!("{}written to {}; open it in https://ui.perfetto.dev\n", trace::table(&summary), text::one_line(&path)),
        )?;
        Ok(exit::OK)
    }
}
