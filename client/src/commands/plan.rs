//! `ramtorch plan`

use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::Args;
use ramtorch_client::ui::table::fields;
use ramtorch_client::ui::text as words;
use ramtorch_client::{ClientError, exit, json, v1};
use std::path::PathBuf;

/// Show what a job would need and how it would run, without submitting it
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// Job file; `-` reads the standard input
    #[arg(value_name = "JOB.toml")]
    file: PathBuf,
}

impl Plan {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let request = source::job_file(&self.file, true)?;
        let plan = global.connect().await?.plan(request).await?;
        printer.result(|| json::plan(&plan), || text(&plan))?;
        Ok(exit::OK)
    }
}

/// The plan for people: the daemon's own words, or its numbers where it has none.
pub(super) fn text(plan: &v1::Plan) -> String {
    if !plan.text.trim().is_empty() {
        return format!("{}\n", words::printable(plan.text.trim_end()));
    }
    let measured = |text: String| if plan.step_seconds > 0.0 { text } else { String::new() };
    fields(&[
        ("parameters", words::count(plan.parameters)),
        ("shared memory", words::gib(plan.segment_bytes)),
        ("host memory", words::gib(plan.host_bytes)),
        ("device memory", words::gib(plan.device_bytes)),
        ("time of a step", measured(words::duration(plan.step_seconds))),
        ("bound by", plan.bound_by.clone()),
    ])
}
