//! A followed job on a terminal: what happened scrolls by, a bar with the pace stays below it.

use super::summary;
use super::tracker::{News, Tracker};
use super::view::View;
use crate::json::state_name;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use ramtorch_proto::v1;
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const WITH_STEPS: &str = "{spinner:.cyan} {prefix} {wide_bar:.cyan/dim} {steps}\n  {wide_msg}";
const WITHOUT_STEPS: &str = "{spinner:.cyan} {prefix} {wide_msg}";

/// Whether the standard output can hold a moving bar.
pub(crate) fn is_capable() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Columns of the terminal; 80 where there is none.
pub(crate) fn columns() -> usize {
    console::Term::stdout().size_checked().map_or(80, |(_, columns)| usize::from(columns))
}

/// The bar and everything above it.
pub(crate) struct Terminal {
    bar: ProgressBar,
    total: Option<u64>,
    /// Right of the bar.
    steps: Arc<Mutex<String>>,
}

impl Terminal {
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout_with_hz(10));
        bar.enable_steady_tick(Duration::from_millis(120));
        let mut terminal = Terminal { bar, total: None, steps: Arc::default() };
        terminal.set_total(0);
        terminal
    }

    fn set_total(&mut self, steps: u64) {
        if self.total == Some(steps) {
            return;
        }
        self.total = Some(steps);
        let template = if steps > 0 { WITH_STEPS } else { WITHOUT_STEPS };
        // The templates are constants that a test checks; the default style is as good as an error.
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let shown = self.steps.clone();
        let write_steps = move |_: &ProgressState, out: &mut dyn std::fmt::Write| {
            // A poisoned lock still holds a line of text; a line that cannot be written is not shown.
            let _ = out.write_str(&shown.lock().unwrap_or_else(PoisonError::into_inner));
        };
        self.bar.set_style(style.with_key("steps", write_steps).progress_chars("━╸─"));
        self.bar.set_length(steps.max(1));
    }

    fn refresh(&mut self, tracker: &Tracker) {
        let job = &tracker.job;
        let trains = tracker.metrics.is_some();
        self.set_total(if trains { job.steps } else { 0 });
        self.bar.set_position(tracker.step().min(job.steps.max(1)));
        self.bar.set_prefix(state_name(job.state));
        let left = summary::left(tracker).map(|left| format!("  {left}")).unwrap_or_default();
        *self.steps.lock().unwrap_or_else(PoisonError::into_inner) = format!("{}{left}", summary::steps(tracker));
        self.bar.set_message(match trains {
            true => summary::pace(tracker),
            false => super::text::one_line(&job.message),
        });
    }

    /// Text above the bar.
    fn print(&self, text: &str) -> io::Result<()> {
        self.bar.suspend(|| {
            let mut out = io::stdout().lock();
            writeln!(out, "{text}")?;
            out.flush()
        })
    }
}

impl View for Terminal {
    fn job(&mut self, tracker: &Tracker, before: Option<&v1::Job>) -> io::Result<()> {
        let job = &tracker.job;
        if before.is_none() {
            self.print(&format!("{}", console::style(summary::title(job)).bold()))?;
        }
        if before.is_none_or(|b| b.state != job.state) && !super::follow::has_ended(job.state) {
            self.print(&format!("{} {}", console::style("●").cyan(), summary::state(job)))?;
        }
        self.refresh(tracker);
        Ok(())
    }

    fn metrics(&mut self, tracker: &Tracker, _: &v1::Metrics, _: News) -> io::Result<()> {
        self.refresh(tracker);
        Ok(())
    }

    fn note(&mut self, event: &v1::Event) -> io::Result<()> {
        let line = summary::event(event);
        let styled = match event.level.as_str() {
            "error" => console::style(line).red(),
            "warn" => console::style(line).yellow(),
            _ => console::style(line).dim(),
        };
        self.print(&format!("  {styled}"))
    }

    fn notice(&mut self, text: &str) -> io::Result<()> {
        self.print(&format!("{}", console::style(text).yellow()))
    }

    fn end(&mut self, tracker: &Tracker, _: u8) -> io::Result<()> {
        self.bar.finish_and_clear();
        let mut out = io::stdout().lock();
        out.write_all(summary::end(tracker, columns()).as_bytes())?;
        out.flush()
    }

    fn detached(&mut self, _: &Tracker, _: u8, hint: &str) -> io::Result<()> {
        self.bar.finish_and_clear();
        // To the terminal's own stream of messages, as where the output is no terminal.
        writeln!(io::stderr(), "{hint}")
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Following ended with an error: leave no half-drawn bar above its message.
        if !self.bar.is_finished() {
            self.bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_templates_are_valid() {
        for template in [WITH_STEPS, WITHOUT_STEPS] {
            ProgressStyle::with_template(template).unwrap();
        }
    }
}
