//! `ramtorch submit`

use super::watch;
use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};
use std::path::PathBuf;

/// Submit a job
#[derive(Debug, Args)]
pub(crate) struct Submit {
    /// Job file; `-` reads the standard input. Relative paths in it start at its own folder
    #[arg(value_name = "JOB.toml")]
    file: PathBuf,

    /// Follow the job to its end; Ctrl-C detaches and the job goes on
    #[arg(long, short, conflicts_with = "dry_run")]
    pub watch: bool,

    /// Check and plan the job only; nothing is kept
    #[arg(long)]
    dry_run: bool,
}

impl Submit {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let request = source::job_file(&self.file, self.dry_run)?;
        let mut client = global.connect().await?;
        let job = client.submit(request).await?;
        if self.watch {
            return watch::to_its_end(&mut client, &job.id, printer).await;
        }
        if self.dry_run {
            printer.confirmation(|| json::job(&job), || dry_run_text(&job))?;
        } else if printer.quiet {
            printer.result(|| json::job(&job), || format!("{}\n", job.id))?;
        } else {
            printer.result(|| json::job(&job), || submitted_text(&job))?;
        }
        Ok(exit::OK)
    }
}

fn dry_run_text(job: &v1::Job) -> String {
    let plan = job.plan.as_ref().map(super::plan::text).unwrap_or_default();
    format!("{plan}{} is sound; nothing was submitted\n", text::one_line(&job.name))
}

fn submitted_text(job: &v1::Job) -> String {
    let message = if job.message.is_empty() { String::new() } else { format!(": {}", job.message) };
    let state = text::one_line(&format!("{}{message}", json::state_name(job.state)));
    let id = text::one_line(&job.id);
    format!("submitted {} ({id}), {state}\nfollow it with `ramtorch watch {id}`\n", text::one_line(&job.name))
}
