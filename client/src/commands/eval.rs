//! `ramtorch eval`

use super::{Precision, precision_name};
use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::{Args, ValueEnum};
use ramtorch_client::ui::table::fields;
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};

/// Measure loss and perplexity of a model on data
#[derive(Debug, Args)]
pub(crate) struct Eval {
    /// Model folder or checkpoint, or id or name of a job (`job:NAME` where a folder has the same name)
    source: String,

    /// Files or globs
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    data: Vec<String>,

    /// What the files hold, as in a job file
    #[arg(long, value_enum)]
    format: DataFormat,

    /// Tokens a sequence
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    sequence_length: u32,

    /// Sequences on the device at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    micro_batch_size: u32,

    /// Stop after so many tokens [default: all]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    max_tokens: u64,

    /// Arithmetic [default: the device's own]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DataFormat {
    Text,
    Jsonl,
    Parquet,
    Tokens,
    Tensors,
}

impl DataFormat {
    fn name(self) -> &'static str {
        match self {
            DataFormat::Text => "text",
            DataFormat::Jsonl => "jsonl",
            DataFormat::Parquet => "parquet",
            DataFormat::Tokens => "tokens",
            DataFormat::Tensors => "tensors",
        }
    }
}

impl Eval {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let request = v1::EvalRequest {
            model: Some(source::model_source(&self.source)?),
            data_format: self.format.name().to_owned(),
            files: self.data.iter().map(|file| source::absolute(file)).collect::<Result<_, _>>()?,
            sequence_length: self.sequence_length,
            micro_batch_size: self.micro_batch_size,
            max_tokens: self.max_tokens,
            precision: precision_name(self.precision),
        };
        let answer = global.connect().await?.eval(request).await?;
        printer.result(|| json::evaluation(&answer), || page(&answer))?;
        Ok(exit::OK)
    }
}

fn page(e: &v1::EvalResponse) -> String {
    fields(&[
        ("loss", text::real(e.loss)),
        ("perplexity", text::real(e.perplexity)),
        ("tokens", e.tokens.to_string()),
        ("time", format!("{} ({} tok/s)", text::duration(e.seconds), text::rate(e.tokens as f64 / e.seconds))),
    ])
}
