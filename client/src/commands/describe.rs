//! `ramtorch describe`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::ui::table::{Align, Table, fields};
use ramtorch_client::ui::text;
use ramtorch_client::{ClientError, exit, json, v1};

/// Show everything about a job
#[derive(Debug, Args)]
pub(crate) struct Describe {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,
}

impl Describe {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let job = global.connect().await?.get(&self.job).await?;
        printer.result(|| json::job(&job), || page(&job))?;
        Ok(exit::OK)
    }
}

fn page(job: &v1::Job) -> String {
    let mut out = overview(job);
    if let Some(metrics) = &job.last_metrics {
        out.push_str(&format!("\nlast step\n{}", text::indent(&last_step(metrics), "  ")));
        out.push('\n');
    }
    if !job.workers.is_empty() {
        out.push_str(&format!("\nworkers\n{}\n", text::indent(&workers(&job.workers), "  ")));
    }
    if let Some(plan) = &job.plan {
        out.push_str(&format!("\nplan\n{}\n", text::indent(&super::plan::text(plan), "  ")));
    }
    if !job.sample.is_empty() {
        out.push_str(&format!("\nsample\n{}\n", text::indent(&text::printable(&job.sample), "  ")));
    }
    out
}

fn overview(job: &v1::Job) -> String {
    let ended = ramtorch_client::ui::has_ended(job.state);
    let exit_code = if ended {
        format!("{} ({})", job.exit_code, exit::kind(u8::try_from(job.exit_code).unwrap_or(exit::INTERNAL)))
    } else {
        String::new()
    };
    let steps = match job.steps {
        0 => String::new(),
        total => format!("{} of {total} ({:.0} %)", job.step, 100.0 * job.step as f64 / total as f64),
    };
    let time = |unix_ms: i64| if unix_ms > 0 { text::timestamp(unix_ms) } else { String::new() };
    let until = if job.ended_unix_ms > 0 { job.ended_unix_ms } else { text::now_unix_ms() };
    let segment = if job.segment.is_empty() { String::new() } else { format!("{} ({})", job.segment, text::bytes(job.segment_bytes)) };
    let number = |n: u32| if n > 0 { n.to_string() } else { String::new() };
    fields(&[
        ("name", job.name.clone()),
        ("id", job.id.clone()),
        ("state", json::state_name(job.state).to_owned()),
        ("message", job.message.clone()),
        ("exit code", exit_code),
        ("model", job.model.clone()),
        ("step", steps),
        ("ranks", number(job.world_size)),
        ("restarts", number(job.restarts)),
        ("created", time(job.created_unix_ms)),
        ("started", time(job.started_unix_ms)),
        ("ended", time(job.ended_unix_ms)),
        ("run time", text::seconds_between(job.started_unix_ms, until).map(text::duration).unwrap_or_default()),
        ("user id", job.uid.to_string()),
        ("segment", segment),
        ("model folder", job.output_path.clone()),
        ("metrics", job.metrics_path.clone()),
    ])
}

fn last_step(m: &v1::Metrics) -> String {
    let tflops = if m.tflops > 0.0 { format!("{:.3}", m.tflops) } else { String::new() };
    fields(&[
        ("step", m.step.to_string()),
        ("loss", text::real(m.loss)),
        ("validation loss", m.validation_loss.map(text::real).unwrap_or_default()),
        ("gradient norm", text::real(m.grad_norm)),
        ("learning rate", format!("{:.3e}", m.lr)),
        ("epoch", format!("{:.3}", m.epoch)),
        ("tokens", format!("{} ({} in all)", text::count(m.tokens), text::count(m.tokens_total))),
        ("tokens/s", text::rate(m.tokens_per_second)),
        ("TFLOP/s", tflops),
        ("time", text::duration(m.step_seconds)),
        ("copied", format!("{} to devices, {} from devices", text::bytes(m.bytes_to_device), text::bytes(m.bytes_from_device))),
        ("copy wait", text::duration(m.copy_wait_seconds)),
        ("optimizer wait", text::duration(m.optimizer_wait_seconds)),
    ])
}

fn workers(workers: &[v1::WorkerInfo]) -> String {
    use Align::{Left, Right};
    let mut table = Table::new(&[
        ("RANK", Right),
        ("DEVICE", Left),
        ("PID", Right),
        ("PHASE", Left),
        ("STEP", Right),
        ("HEARTBEAT", Right),
        ("LOG", Left),
    ]);
    let now = text::now_unix_ms();
    for w in workers {
        let heartbeat =
            text::seconds_between(w.heartbeat_unix_ms, now).map_or_else(|| "-".to_owned(), |s| format!("{} ago", text::duration(s)));
        table.row([
            w.rank.to_string(),
            w.device.clone(),
            w.pid.to_string(),
            w.phase.clone(),
            w.step.to_string(),
            heartbeat,
            w.log_path.clone(),
        ]);
    }
    table.render()
}
