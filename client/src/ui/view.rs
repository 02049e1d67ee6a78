//! Where a followed job is shown: to nobody, as lines of text, as JSON, or on a terminal (`terminal.rs`).

use super::summary;
use super::tracker::{News, Tracker};
use crate::json;
use ramtorch_proto::v1;
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::{Duration, Instant};

/// Shows a followed job as it goes on. An error means that the output is gone.
pub(crate) trait View: Send {
    /// The job's message or state changed; `before` is `None` at the start.
    fn job(&mut self, tracker: &Tracker, before: Option<&v1::Job>) -> io::Result<()>;
    /// A step was committed.
    fn metrics(&mut self, tracker: &Tracker, metrics: &v1::Metrics, news: News) -> io::Result<()>;
    /// Something happened to the job.
    fn note(&mut self, event: &v1::Event) -> io::Result<()>;
    /// Something happened to the following itself.
    fn notice(&mut self, text: &str) -> io::Result<()>;
    /// The job has ended.
    fn end(&mut self, tracker: &Tracker, exit_code: u8) -> io::Result<()>;
    /// The command leaves, the job goes on.
    fn detached(&mut self, tracker: &Tracker, exit_code: u8, hint: &str) -> io::Result<()>;
}

/// Shows nothing: the exit code says it all.
pub(crate) struct Quiet;

impl View for Quiet {
    fn job(&mut self, _: &Tracker, _: Option<&v1::Job>) -> io::Result<()> {
        Ok(())
    }
    fn metrics(&mut self, _: &Tracker, _: &v1::Metrics, _: News) -> io::Result<()> {
        Ok(())
    }
    fn note(&mut self, _: &v1::Event) -> io::Result<()> {
        Ok(())
    }
    fn notice(&mut self, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn end(&mut self, _: &Tracker, _: u8) -> io::Result<()> {
        Ok(())
    }
    fn detached(&mut self, _: &Tracker, _: u8, _: &str) -> io::Result<()> {
        Ok(())
    }
}

/// One JSON object a line, tagged by `event`: `job`, `metrics`, `note`, `notice`, then `end` or `detached`.
pub(crate) struct Json<W> {
    out: W,
    /// Only the last line is written.
    only_end: bool,
}

impl<W: Write> Json<W> {
    pub fn new(out: W, only_end: bool) -> Self {
        Json { out, only_end }
    }

    fn line(&mut self, value: &Value) -> io::Result<()> {
        // One write a line: a reader never sees half of one, even when others write to the same pipe.
        self.out.write_all(format!("{value}\n").as_bytes())?;
        self.out.flush()
    }

    fn running_line(&mut self, value: &Value) -> io::Result<()> {
        if self.only_end { Ok(()) } else { self.line(value) }
    }
}

impl<W: Write + Send> View for Json<W> {
    fn job(&mut self, tracker: &Tracker, _: Option<&v1::Job>) -> io::Result<()> {
        self.running_line(&json!({ "event": "job", "job": json::job(&tracker.job) }))
    }
    fn metrics(&mut self, _: &Tracker, metrics: &v1::Metrics, _: News) -> io::Result<()> {
        self.running_line(&json!({ "event": "metrics", "metrics": json::metrics(metrics) }))
    }
    fn note(&mut self, event: &v1::Event) -> io::Result<()> {
        self.running_line(&json!({ "event": "note", "note": json::event(event) }))
    }
    fn notice(&mut self, text: &str) -> io::Result<()> {
        self.running_line(&json!({ "event": "notice", "text": text }))
    }
    fn end(&mut self, tracker: &Tracker, exit_code: u8) -> io::Result<()> {
        self.line(&json!({ "event": "end", "exit_code": exit_code, "job": json::job(&tracker.job) }))
    }
    fn detached(&mut self, tracker: &Tracker, exit_code: u8, hint: &str) -> io::Result<()> {
        self.line(&json!({ "event": "detached", "exit_code": exit_code, "text": hint, "job": json::job(&tracker.job) }))
    }
}

/// Between two lines on the pace.
const PACE_EVERY: Duration = Duration::from_secs(5);

/// Lines of text for files and pipes: what changed, and the pace every few seconds.
pub(crate) struct Plain<W, E> {
    out: W,
    /// Notices of the command itself go here.
    err: E,
    columns: usize,
    last_line: Option<Instant>,
}

impl<W: Write, E: Write> Plain<W, E> {
    pub fn new(out: W, err: E, columns: usize) -> Self {
        Plain { out, err, columns, last_line: None }
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        self.out.write_all(format!("{text}\n").as_bytes())?;
        self.out.flush()
    }

    fn is_due(&self) -> bool {
        self.last_line.is_none_or(|at| at.elapsed() >= PACE_EVERY)
    }
}

impl<W: Write + Send, E: Write + Send> View for Plain<W, E> {
    fn job(&mut self, tracker: &Tracker, before: Option<&v1::Job>) -> io::Result<()> {
        let job = &tracker.job;
        match before {
            None => self.line(&summary::title(job))?,
            Some(b) if b.state != job.state => {}
            // Progress within a state, such as a share of the data read.
            Some(b) if b.message != job.message && self.is_due() => {}
            Some(_) => return Ok(()),
        }
        if super::follow::has_ended(job.state) {
            // The page at the end says it.
            return Ok(());
        }
        self.last_line = Some(Instant::now());
        self.line(&summary::state(job))
    }

    fn metrics(&mut self, tracker: &Tracker, metrics: &v1::Metrics, news: News) -> io::Result<()> {
        let is_last = metrics.step == tracker.job.steps;
        let is_first = !tracker.train.is_curve();
        let worth_it = is_first || is_last || metrics.validation_loss.is_some() || self.is_due();
        if news != News::Live || !worth_it {
            return Ok(());
        }
        self.last_line = Some(Instant::now());
        let parts = [Some(format!("step {}", summary::steps(tracker))), Some(summary::pace(tracker)), summary::left(tracker)];
        self.line(&parts.into_iter().flatten().collect::<Vec<_>>().join("  "))
    }

    fn note(&mut self, event: &v1::Event) -> io::Result<()> {
        self.line(&summary::event(event))
    }

    fn notice(&mut self, text: &str) -> io::Result<()> {
        self.err.write_all(format!("{text}\n").as_bytes())
    }

    fn end(&mut self, tracker: &Tracker, _: u8) -> io::Result<()> {
        self.out.write_all(summary::end(tracker, self.columns).as_bytes())?;
        self.out.flush()
    }

    fn detached(&mut self, _: &Tracker, _: u8, hint: &str) -> io::Result<()> {
        self.notice(hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> v1::Metrics {
        v1::Metrics { step, loss: 2.0, lr: 1e-3, tokens_per_second: 100.0, ..Default::default() }
    }

    /// A job of `steps` steps shown from its start to its end.
    fn show(view: &mut dyn View, steps: u64) {
        let running = v1::Job { name: "tiny".into(), id: "1".into(), state: v1::JobState::Running as i32, steps, ..Default::default() };
        let mut tracker = Tracker::new(running.clone());
        view.job(&tracker, None).unwrap();
        for step in 1..=steps {
            let m = metrics(step);
            let news = tracker.on_metrics(&m);
            view.metrics(&tracker, &m, news).unwrap();
        }
        view.note(&v1::Event { text: "checkpoint written".into(), ..Default::default() }).unwrap();
        let before = tracker.on_job(v1::Job { state: v1::JobState::Succeeded as i32, ..running });
        view.job(&tracker, Some(&before)).unwrap();
        view.end(&tracker, 0).unwrap();
    }

    #[test]
    fn plain_lines_are_few() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        show(&mut Plain::new(&mut out, &mut err, 80), 1000);
        let text = String::from_utf8(out).unwrap();
        let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("step ")).collect();
        assert_eq!(lines.len(), 2, "the first and the last step, in less than five seconds\n{text}");
        assert!(lines[0].starts_with("step 1/1000  loss 2.0000  lr 1.00e-3  100 tok/s"), "{text}");
        assert!(text.starts_with("tiny (1)\nrunning\n") && text.contains("\nsucceeded: 1000 steps\n"), "{text}");
        assert!(err.is_empty());
    }

    #[test]
    fn json_is_an_object_a_line() {
        let mut out = Vec::new();
        show(&mut Json::new(&mut out, false), 3);
        let lines: Vec<Value> = out.split(|b| *b == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect();
        let events: Vec<&str> = lines.iter().map(|l| l["event"].as_str().unwrap()).collect();
        assert_eq!(events, ["job", "metrics", "metrics", "metrics", "note", "job", "end"]);
        assert_eq!(lines[6]["exit_code"], 0);
    }

    #[test]
    fn quiet_json_has_the_end_alone() {
        let mut out = Vec::new();
        show(&mut Json::new(&mut out, true), 3);
        assert_eq!(out.iter().filter(|b| **b == b'\n').count(), 1);
        assert!(out.starts_with(br#"{"event":"end""#));
    }
}
