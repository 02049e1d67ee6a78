//! What a trace says at a glance: how busy each row was, what arithmetic stood still for, and what bounds the step.

use crate::{Kind, RankTrace, Row, Span, Wait};
use serde::Serialize;

/// One row of a rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RowSummary {
    /// Its name.
    pub row: &'static str,
    /// Seconds in which it did something.
    pub busy_seconds: f64,
    /// Of the traced time.
    pub busy_share: f64,
    /// Bytes it moved.
    pub bytes: u64,
    /// Its spans.
    pub spans: u64,
}

/// One reason to stand still.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WaitSummary {
    /// For what.
    pub wait: Wait,
    /// How long.
    pub seconds: f64,
    /// Of the traced time.
    pub share: f64,
}

/// One rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RankSummary {
    /// Who.
    pub rank: u32,
    /// On what.
    pub device: String,
    /// Steps recorded whole.
    pub steps: u64,
    /// From the begin of the first of them to the end of the last.
    pub seconds: f64,
    /// Rows that have spans.
    pub rows: Vec<RowSummary>,
    /// What arithmetic stood still for, of each kind.
    pub waits: Vec<WaitSummary>,
    /// In words.
    pub bound_by: String,
    /// Spans left out for want of room.
    pub dropped: u64,
    /// Something the reader should know; empty for nothing.
    pub note: String,
}

/// All ranks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// First step of the trace.
    pub first_step: u64,
    /// By rank.
    pub ranks: Vec<RankSummary>,
}

/// Sums up the ranks' traces. Of what overlaps the first or last step's end, the part inside counts.
pub fn summarize(ranks: &[RankTrace]) -> Summary {
    Summary { first_step: ranks.iter().map(|r| r.first_step).min().unwrap_or(0), ranks: ranks.iter().map(rank).collect() }
}

fn rank(r: &RankTrace) -> RankSummary {
    let steps: Vec<&Span> = r.spans.iter().filter(|s| s.kind == Kind::Step).collect();
    let begin = steps.iter().map(|s| s.begin_ns).min().unwrap_or(0);
    let end = steps.iter().map(|s| s.end_ns).max().unwrap_or(0);
    let seconds = (end - begin) as f64 / 1e9;
    let share = |s: f64| if seconds > 0.0 { s / seconds } else { 0.0 };
    let of = |row: Row| r.spans.iter().filter(move |s| s.row == row);
    let rows: Vec<RowSummary> = Row::ALL
        .into_iter()
        .filter(|row| of(*row).next().is_some())
        .map(|row| {
            let busy = covered(of(row).filter(|s| s.kind.is_busy()), begin, end);
            let inside = of(row).filter(|s| s.kind.is_busy() && s.end_ns > begin && s.begin_ns < end);
            let (bytes, spans) = inside.fold((0, 0), |(b, n), s| (b + s.bytes, n + 1));
            RowSummary { row: row.name(), busy_seconds: busy, busy_share: share(busy), bytes, spans }
        })
        .collect();
    let waits: Vec<WaitSummary> = Wait::ALL
        .into_iter()
        .map(|wait| {
            let seconds = covered(of(Row::Compute).filter(|s| s.kind == Kind::Wait(wait)), begin, end);
            WaitSummary { wait, seconds, share: share(seconds) }
        })
        .collect();
    let bound_by = bound(&rows, &waits, seconds);
    RankSummary {
        rank: r.rank,
        device: r.device.clone(),
        steps: steps.len() as u64,
        seconds,
        rows,
        waits,
        bound_by,
        dropped: r.dropped,
        note: r.note.clone(),
    }
}

/// Seconds of `begin..end` that at least one of the spans covers; they come sorted by begin.
fn covered<'a>(spans: impl Iterator<Item = &'a Span>, begin: u64, end: u64) -> f64 {
    let (mut at, mut sum) = (begin, 0u64);
    for s in spans {
        let (a, b) = (s.begin_ns.max(at), s.end_ns.min(end));
        if b > a {
            sum += b - a;
            at = b;
        }
    }
    sum as f64 / 1e9
}

fn bound(rows: &[RowSummary], waits: &[WaitSummary], seconds: f64) -> String {
    if seconds <= 0.0 {
        return "no whole step was recorded".into();
    }
    let busy = |row: Row| rows.iter().find(|r| r.row == row.name()).map_or(0.0, |r| r.busy_share);
    let percent = |x: f64| format!("{:.0} %", x * 100.0);
    let compute = busy(Row::Compute);
    let Some(worst) = waits.iter().max_by(|a, b| a.seconds.total_cmp(&b.seconds)) else { return String::new() };
    let idle = (1.0 - compute - waits.iter().map(|w| w.share).sum::<f64>()).max(0.0);
    if compute >= 0.9 || compute >= worst.share.max(idle) && compute >= 0.75 {
        return format!("arithmetic, busy {} of the time", percent(compute));
    }
    if worst.share >= idle {
        let why = match worst.wait {
            Wait::Weights => format!("weights on their way (copies in busy {})", percent(busy(Row::CopyIn))),
            Wait::Pages => {
                let by = [Row::OptimizerCpu, Row::OptimizerIn, Row::OptimizerKernel, Row::OptimizerOut];
                let busiest = by.into_iter().max_by(|a, b| busy(*a).total_cmp(&busy(*b))).unwrap_or(Row::OptimizerCpu);
                format!("the optimizer's pages ({} busy {})", busiest.name(), percent(busy(busiest)))
            }
            Wait::Gradients => format!("gradients on their way out (copies out busy {})", percent(busy(Row::CopyOut))),
        };
        return format!("{why}: arithmetic waits {} of the time", percent(worst.share));
    }
    format!("what is between the sweeps: arithmetic has nothing to do {} of the time (see the step loop)", percent(idle))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // tests
mod tests {
    use super::*;

    fn span(row: Row, kind: Kind, begin: u64, end: u64) -> Span {
        Span {
            row,
            name: "x".into(),
            kind,
            step: 1,
            block: None,
            micro_batch: None,
            page: None,
            bytes: 10,
            begin_ns: begin * 1_000_000,
            end_ns: end * 1_000_000,
        }
    }

    fn of(spans: Vec<Span>) -> RankSummary {
        summarize(&[RankTrace { spans, first_step: 1, ..RankTrace::default() }]).ranks.remove(0)
    }

    #[test]
    fn time_counts_once_and_only_within_the_steps() {
        let r = of(vec![
            span(Row::Loop, Kind::Step, 100, 1100),
            span(Row::Compute, Kind::Work, 0, 300),
            span(Row::Compute, Kind::Work, 200, 250),
            span(Row::Compute, Kind::Wait(Wait::Pages), 300, 900),
            span(Row::Compute, Kind::Work, 900, 2000),
            span(Row::OptimizerCpu, Kind::Work, 0, 900),
        ]);
        let row = |name: &str| r.rows.iter().find(|x| x.row == name).unwrap().busy_share;
        assert!((r.seconds - 1.0).abs() < 1e-9 && r.steps == 1);
        assert!((row("compute") - 0.4).abs() < 1e-9 && (row("optimizer CPU") - 0.8).abs() < 1e-9);
        assert_eq!(r.waits.iter().map(|w| (w.share * 10.0).round() as u32).collect::<Vec<_>>(), [0, 6, 0]);
        assert!(r.bound_by.contains("pages (optimizer CPU busy 80 %)"), "{}", r.bound_by);
    }

    #[test]
    fn the_bound_is_what_takes_the_time() {
        let step = span(Row::Loop, Kind::Step, 0, 1000);
        let with = |more: Vec<Span>| of([vec![step.clone()], more].concat()).bound_by;
        assert!(with(vec![span(Row::Compute, Kind::Work, 0, 950)]).starts_with("arithmetic"));
        assert!(
            with(vec![span(Row::Compute, Kind::Wait(Wait::Weights), 0, 700), span(Row::CopyIn, Kind::Copy, 0, 1000)])
                .contains("busy 100 %")
        );
        assert!(with(vec![span(Row::Compute, Kind::Wait(Wait::Gradients), 0, 700)]).starts_with("gradients"));
        assert!(with(vec![span(Row::Compute, Kind::Work, 0, 300)]).contains("70 %"));
        assert!(of(vec![]).bound_by.contains("no whole step"));
    }
}
