//! `ramtorch inspect`

use crate::cli::Global;
use crate::output::Printer;
use crate::source;
use clap::Args;
use ramtorch_client::ui::table::{Align, Table};
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};

/// Describe the tensors of a model folder, a checkpoint or a live job
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Model folder or checkpoint, or id or name of a job (`job:NAME` where a folder has the same name)
    source: String,

    /// Tensors to show; `*` and `?` stand for any characters [default: all]
    #[arg(value_name = "NAME-GLOB")]
    names: Vec<String>,

    /// Show so many values of each tensor too
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    values: u32,
}

impl Inspect {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let request =
            v1::InspectRequest { model: Some(source::model_source(&self.source)?), names: self.names.clone(), values: self.values };
        let answer = global.connect().await?.inspect(request).await?;
        printer.result(|| json::inspected(&answer), || page(&answer))?;
        Ok(exit::OK)
    }
}

fn page(answer: &v1::InspectResponse) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("NAME", Left),
        ("SHAPE", Left),
        ("DTYPE", Left),
        ("BLOCK", Left),
        ("PARAMETERS", Right),
        ("MEAN", Right),
        ("STD", Right),
        ("MIN", Right),
        ("MAX", Right),
        ("NOT FINITE", Right),
    ]);
    for t in &answer.tensors {
        let shape: Vec<String> = t.shape.iter().map(u64::to_string).collect();
        let not_finite = if t.nonfinite > 0 { t.nonfinite.to_string() } else { "-".to_owned() };
        let statistics = [t.mean, t.std, t.min, t.max].map(statistic);
        let cells = [t.name.clone(), shape.join("×"), t.dtype.clone(), t.block.clone(), t.parameters.to_string()];
        table.row(cells.into_iter().chain(statistics).chain([not_finite]));
    }
    let parameters = answer.tensors.iter().fold(0u64, |sum, t| sum.saturating_add(t.parameters));
    let step = if answer.step > 0 { format!(", step {}", answer.step) } else { String::new() };
    let mut out = table.render();
    for t in answer.tensors.iter().filter(|t| !t.values.is_empty()) {
        let values: Vec<String> = t.values.iter().map(|v| format!("{v:e}")).collect();
        let more = if t.parameters > t.values.len() as u64 { " …" } else { "" };
        out.push_str(&format!("\n{}\n  {}{more}\n", text::one_line(&t.name), values.join(" ")));
    }
    out.push_str(&format!("\n{}, {} parameters{step}\n", text::plural(answer.tensors.len() as u64, "tensor"), text::count(parameters)));
    out
}

/// Statistics of weights are small: three digits and an exponent line up best.
fn statistic(x: f64) -> String {
    if x == 0.0 { "0".to_owned() } else { format!("{x:.2e}") }
}
