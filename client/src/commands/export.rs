//! `ramtorch export`

use super::{Precision, precision_name};
use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::Args;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};

/// Write a Hugging Face folder that transformers and vLLM load
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Checkpoint or model folder, or id or name of a job (`job:NAME` where a folder has the same name)
    source: String,

    /// Folder to write
    path: String,

    /// Number format of the weights [default: that of the source]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,

    /// Replace the folder if it is there
    #[arg(long)]
    overwrite: bool,
}

impl Export {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let request = v1::ExportRequest {
            model: Some(source::model_source(&self.source)?),
            path: source::absolute(&self.path)?,
            dtype: precision_name(self.dtype),
            overwrite: self.overwrite,
        };
        let written = global.connect().await?.export(request).await?;
        let step = if written.step > 0 { format!("step {} ", written.step) } else { String::new() };
        printer.confirmation(
            || json::exported(&written),
            || format!("exported {step}to {}, {}\n", text::one_line(&written.path), text::bytes(written.bytes)),
        )?;
        Ok(exit::OK)
    }
}
