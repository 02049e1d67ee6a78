//! `ramtorch watch`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::{self, FollowOptions, Interrupt};
use ramtorch_client::{Client, ClientError};

/// Follow a job to its end; Ctrl-C detaches and the job goes on
#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,
}

impl Watch {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        to_its_end(&mut global.connect().await?, &self.job, printer).await
    }
}

/// Follows the job; the exit code is the job's, or says that it goes on.
pub(super) async fn to_its_end(client: &mut Client, id: &str, printer: Printer) -> Result<u8, ClientError> {
    let options = FollowOptions { output: printer.format, interrupt: Interrupt::Detach, quiet: printer.quiet };
    Ok(ui::follow(client, id, options).await?.exit_code)
}
