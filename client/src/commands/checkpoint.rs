//! `ramtorch checkpoint`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json};

/// Write a checkpoint of a running job now, and wait until it is durable
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,
}

impl Checkpoint {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let written = global.connect().await?.checkpoint(&self.job).await?;
        printer.confirmation(
            || json::checkpoint(&written),
            || format!("checkpoint of step {} in {}\n", written.step, text::one_line(&written.path)),
        )?;
        Ok(exit::OK)
    }
}
