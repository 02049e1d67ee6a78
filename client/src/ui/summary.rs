//! What is said in words of a followed job: one line while it runs, a page at its end.

use super::plot::{self, Size};
use super::series::Series;
use super::table;
use super::text;
use super::tracker::Tracker;
use crate::json::state_name;
use ramtorch_proto::v1;

/// Rows of the loss curve.
const CURVE_ROWS: usize = 10;
/// Widest curve: beyond it a curve says no more.
const CURVE_COLUMNS: usize = 100;

/// Loss, validation loss, learning rate and pace; parts that are not known are left out.
pub(crate) fn pace(tracker: &Tracker) -> String {
    let Some(m) = &tracker.metrics else { return String::new() };
    let mut parts = vec![format!("loss {}", text::real(m.loss))];
    if let Some(loss) = tracker.validation.last() {
        parts.push(format!("validation {}", text::real(loss)));
    }
    parts.push(format!("lr {:.2e}", m.lr));
    parts.push(format!("{} tok/s", text::rate(m.tokens_per_second)));
    parts.join("  ")
}

/// The time left, where it is known: `1m 15s left`.
pub(crate) fn left(tracker: &Tracker) -> Option<String> {
    tracker.seconds_left().map(|s| format!("{} left", text::duration(s)))
}

/// `120/300`, or `120` while the total is not known.
pub(crate) fn steps(tracker: &Tracker) -> String {
    match tracker.job.steps {
        0 => tracker.step().to_string(),
        total => format!("{}/{total}", tracker.step()),
    }
}

/// The state, and why: `running on 2 ranks (cpu:0, cpu:1)`, `queued: waits for memory`.
pub(crate) fn state(job: &v1::Job) -> String {
    let mut line = state_name(job.state).to_owned();
    if job.state == v1::JobState::Running as i32 && job.world_size > 0 {
        line.push_str(&format!(" on {}", text::plural(job.world_size.into(), "rank")));
        let devices: Vec<&str> = job.workers.iter().map(|w| w.device.as_str()).filter(|d| !d.is_empty()).collect();
        if !devices.is_empty() {
            line.push_str(&format!(" ({})", devices.join(", ")));
        }
    }
    if !job.message.is_empty() {
        line.push_str(&format!(": {}", job.message));
    }
    text::one_line(&line)
}

/// An event on one line: `rank 1: warn: …`.
pub(crate) fn event(event: &v1::Event) -> String {
    let rank = event.rank.map(|r| format!("rank {r}: ")).unwrap_or_default();
    let level = match event.level.as_str() {
        "" | "info" => String::new(),
        level => format!("{level}: "),
    };
    format!("{rank}{level}{}", text::one_line(&event.text))
}

/// The job in one line, as it is introduced.
pub(crate) fn title(job: &v1::Job) -> String {
    text::one_line(&format!("{} ({}) {}", job.name, job.id, job.model))
}

/// Everything that a user wants to know at the end: the curve, how it went, the sample, where the results are.
pub(crate) fn end(tracker: &Tracker, columns: usize) -> String {
    let job = &tracker.job;
    let size = Size { columns: columns.saturating_sub(1).min(CURVE_COLUMNS), rows: CURVE_ROWS };
    let mut out = String::new();
    if let Some(curve) = plot::loss_curve(&tracker.train, &tracker.validation, size) {
        out.push_str(&format!("\n{curve}\n"));
    }
    out.push_str(&format!("{}\n", outcome(tracker)));
    out.push_str(&text::indent(&results(tracker), "  "));
    if !out.ends_with('\n') {
        out.push('\n');
    }
    if !job.sample.is_empty() {
        out.push_str(&format!("\nsample:\n{}\n", text::indent(&text::printable(&job.sample), "  ")));
    }
    out
}

fn outcome(tracker: &Tracker) -> String {
    let job = &tracker.job;
    let ended = state_name(job.state);
    let time = tracker.seconds_elapsed().map(|s| format!(" after {}", text::duration(s))).unwrap_or_default();
    if job.state == v1::JobState::Succeeded as i32 {
        let tokens = tracker.metrics.as_ref().map_or(0, |m| m.tokens_total);
        let tokens = if tokens > 0 { format!(", {} tokens", text::count(tokens)) } else { String::new() };
        return format!("{ended}{time}: {}{tokens}", text::plural(tracker.step(), "step"));
    }
    let at = if job.steps > 0 { format!(" at step {}", steps(tracker)) } else { String::new() };
    let why = if job.message.is_empty() { String::new() } else { format!(": {}", text::printable(&job.message)) };
    format!("{ended}{time}{at}{why}")
}

fn results(tracker: &Tracker) -> String {
    let job = &tracker.job;
    let course = |series: &Series| match (series.first(), series.last()) {
        (Some(first), Some(last)) if series.is_curve() => format!("{} → {}", text::real(first), text::real(last)),
        (_, last) => last.map(text::real).unwrap_or_default(),
    };
    let not_finite = match tracker.train.not_finite() {
        0 => String::new(),
        n => format!("not finite at {}", text::plural(n, "step")),
    };
    let restarts = if job.restarts > 0 { format!("{} (no step was lost)", job.restarts) } else { String::new() };
    table::fields(&[
        ("loss", course(&tracker.train)),
        ("validation", course(&tracker.validation)),
        ("warning", not_finite),
        ("restarts", restarts),
        ("model folder", job.output_path.clone()),
        ("metrics", job.metrics_path.clone()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(job: v1::Job) -> Tracker {
        let mut tracker = Tracker::new(v1::Job { step: 0, ..job.clone() });
        for step in 1..=job.step {
            tracker.on_metrics(&v1::Metrics {
                step,
                loss: 5.0 / step as f64,
                lr: 1e-3,
                tokens_per_second: 15_234.0,
                step_seconds: 0.5,
                tokens_total: step * 4096,
                validation_loss: (step == job.step).then_some(1.25),
                ..Default::default()
            });
        }
        tracker.on_job(job);
        tracker
    }

    fn job(state: v1::JobState) -> v1::Job {
        let (id, name) = ("7f3a".to_owned(), "austen".to_owned());
        v1::Job {
            id,
            name,
            state: state as i32,
            step: 100,
            steps: 300,
            started_unix_ms: 1_000,
            ended_unix_ms: 186_000,
            ..Default::default()
        }
    }

    #[test]
    fn a_running_job_in_a_line() {
        let tracker = tracker(job(v1::JobState::Running));
        assert_eq!(pace(&tracker), "loss 0.0500  validation 1.2500  lr 1.00e-3  15.2k tok/s");
        assert_eq!(left(&tracker).as_deref(), Some("1m 40s left"));
        assert_eq!(steps(&tracker), "100/300");
    }

    #[test]
    fn a_success_names_the_way_the_text_and_the_place() {
        let mut job = job(v1::JobState::Succeeded);
        job.output_path = "/models/austen".into();
        job.sample = "It is a truth\n\x1b[31muniversally".into();
        let page = end(&tracker(job), 80);
        assert!(page.contains("succeeded after 3m 05s: 100 steps, 410k tokens\n"), "{page}");
        assert!(page.contains("  loss          5.0000 → 0.0500\n"), "{page}");
        assert!(page.contains("  validation    1.2500\n"), "a single value has no way\n{page}");
        assert!(page.contains("  model folder  /models/austen\n"), "{page}");
        assert!(page.ends_with("\nsample:\n  It is a truth\n  \u{fffd}[31muniversally\n"), "{page}");
        assert!(page.contains('┤') && page.contains("100 steps"), "{page}");
    }

    #[test]
    fn a_failure_says_why() {
        let mut job = job(v1::JobState::Failed);
        job.message = "rank 1 was killed by signal 9\nlog: …".into();
        job.restarts = 3;
        let page = end(&tracker(job), 10);
        assert!(page.starts_with("failed after 3m 05s at step 100/300: rank 1 was killed by signal 9\nlog: …\n"), "{page}");
        assert!(page.contains("restarts"), "{page}");
    }

    #[test]
    fn a_job_that_never_ran_has_no_curve() {
        let mut job = job(v1::JobState::Cancelled);
        (job.step, job.steps, job.started_unix_ms) = (0, 0, 0);
        assert_eq!(end(&tracker(job), 80), "cancelled\n");
    }

    #[test]
    fn states_and_events_are_single_lines() {
        let mut job = job(v1::JobState::Running);
        job.world_size = 2;
        job.workers = vec![v1::WorkerInfo { device: "cpu:0".into(), ..Default::default() }];
        assert_eq!(state(&job), "running on 2 ranks (cpu:0)");
        let e = v1::Event { level: "warn".into(), text: "slow\ndisk".into(), rank: Some(1), ..Default::default() };
        assert_eq!(event(&e), "rank 1: warn: slow disk");
    }
}
