//! `ramtorch cancel`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::{self, text};
use ramtorch_client::{ClientError, exit, json};

/// Stop a job at its next step
#[derive(Debug, Args)]
pub(crate) struct Cancel {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,
}

impl Cancel {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let job = global.connect().await?.cancel(&self.job).await?;
        let name = text::one_line(&format!("{} ({})", job.name, job.id));
        let human = || match ui::has_ended(job.state) {
            true => format!("{name} has ended: {}\n", json::state_name(job.state)),
            false => format!("{name} is being stopped\n"),
        };
        printer.confirmation(|| json::job(&job), human)?;
        Ok(exit::OK)
    }
}
