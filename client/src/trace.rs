//! Timelines of jobs: from the daemon's parts to a file that Perfetto opens, and a table.

use crate::client::Client;
use crate::error::ClientError;
use crate::ui::table::{Align, Table};
use crate::ui::text;
use ramtorch_proto::v1;
use ramtorch_trace::{Kind, Row, SPANS_MAX, Span};
pub use ramtorch_trace::{RankTrace, STEPS_MAX, Summary, summarize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// Spans of one message.
const PART_SPANS: usize = 4096;
/// Ranks that a job may have, more than enough.
const RANKS_MAX: usize = 1024;

/// A rank's trace in messages of bounded size.
pub fn parts(trace: RankTrace) -> impl Iterator<Item = v1::TracePart> {
    let RankTrace { rank, device, first_step, steps, dropped, note, spans } = trace;
    let mut spans = spans.into_iter().peekable();
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let some = spans.by_ref().take(PART_SPANS).map(span_to_pb).collect();
        done = spans.peek().is_none();
        Some(v1::TracePart { rank, device: device.clone(), first_step, steps, dropped, note: note.clone(), spans: some, last: done })
    })
}

fn span_to_pb(s: Span) -> v1::TraceSpan {
    v1::TraceSpan {
        row: s.row.number(),
        name: s.name.into_owned(),
        kind: s.kind.number(),
        step: s.step,
        block: s.block,
        micro_batch: s.micro_batch,
        page: s.page,
        bytes: s.bytes,
        begin_ns: s.begin_ns,
        duration_ns: s.end_ns.saturating_sub(s.begin_ns),
    }
}

/// `None`: of a kind that this version does not know.
fn span_of_pb(s: v1::TraceSpan) -> Option<Span> {
    Some(Span {
        row: Row::from_number(s.row)?,
        name: s.name.into(),
        kind: Kind::from_number(s.kind)?,
        step: s.step,
        block: s.block,
        micro_batch: s.micro_batch,
        page: s.page,
        bytes: s.bytes,
        begin_ns: s.begin_ns,
        end_ns: s.begin_ns.checked_add(s.duration_ns)?,
    })
}

/// The ranks' traces in the making.
#[derive(Debug, Default)]
pub struct Assembly {
    ranks: BTreeMap<u32, RankTrace>,
}

impl Assembly {
    /// Takes a part.
    ///
    /// # Errors
    /// More than a daemon of this version would ever send.
    pub fn take(&mut self, part: v1::TracePart) -> Result<(), ClientError> {
        let v1::TracePart { rank, device, first_step, steps, dropped, note, spans, last: _ } = part;
        if self.ranks.len() >= RANKS_MAX && !self.ranks.contains_key(&rank) {
            return Err(ClientError::Protocol(format!("a trace of more than {RANKS_MAX} ranks")));
        }
        let trace =
            self.ranks.entry(rank).or_insert_with(|| RankTrace { rank, device, first_step, steps, dropped, note, spans: Vec::new() });
        // Steps are kept beside the limit.
        if trace.spans.len() + spans.len() > SPANS_MAX + STEPS_MAX as usize {
            return Err(ClientError::Protocol(format!("more than {SPANS_MAX} spans of rank {rank}")));
        }
        trace.spans.extend(spans.into_iter().filter_map(span_of_pb));
        Ok(())
    }

    /// By rank.
    pub fn finish(self) -> Vec<RankTrace> {
        self.ranks.into_values().collect()
    }
}

/// Asks for a trace and waits for all of it.
///
/// # Errors
/// The daemon's refusal, or why there is no trace.
pub async fn collect(client: &mut Client, request: v1::TraceRequest) -> Result<Vec<RankTrace>, ClientError> {
    let mut parts = client.trace(request).await?;
    let mut assembly = Assembly::default();
    while let Some(part) = parts.next().await? {
        assembly.take(part)?;
    }
    Ok(assembly.finish())
}

/// Refuses a file that is there, unless it may be replaced; a folder that is not there, in any case.
///
/// # Errors
/// With what to do.
pub fn check_target(path: &Path, overwrite: bool) -> Result<(), ClientError> {
    if path.is_dir() {
        return Err(ClientError::Usage(format!("{} is a folder; name a file", path.display())));
    }
    if !overwrite && path.exists() {
        return Err(ClientError::Usage(format!(
            "{} is there already; name another file with --out, or replace it with --overwrite",
            path.display()
        )));
    }
    match path.parent().filter(|p| !p.as_os_str().is_empty() && !p.is_dir()) {
        Some(parent) => Err(ClientError::Usage(format!("there is no folder {} for the trace", parent.display()))),
        None => Ok(()),
    }
}

/// Writes the file that Perfetto and chrome://tracing open, whole or not at all.
///
/// # Errors
/// It cannot be written.
pub fn save(path: &Path, ranks: &[RankTrace], about: &Map<String, Value>) -> Result<(), ClientError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let write = || -> std::io::Result<()> {
        let mut out = std::io::BufWriter::new(std::fs::File::create(&partial)?);
        ramtorch_trace::write_chrome(&mut out, ranks, about)?;
        out.flush()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|source| {
        let _ = std::fs::remove_file(&partial);
        ClientError::Write { path: path.to_owned(), source }
    })
}

/// What the trace says at a glance, for people.
pub fn table(summary: &Summary) -> String {
    let mut out = String::new();
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    for r in &summary.ranks {
        let steps = match r.steps {
            0 => "no whole step".to_owned(),
            1 => format!("step {}", summary.first_step),
            n => format!("steps {} to {}", summary.first_step, summary.first_step + n - 1),
        };
        out += &format!("rank {} ({}): {steps}, {}\n", r.rank, text::one_line(&r.device), text::duration(r.seconds));
        let mut table = Table::new(&[("ROW", Align::Left), ("BUSY", Align::Right), ("TIME", Align::Right), ("BYTES", Align::Right)]);
        let bytes = |n: u64| if n > 0 { text::bytes(n) } else { String::new() };
        for row in r.rows.iter().filter(|row| row.spans > 0) {
            table.row([row.row.to_owned(), percent(row.busy_share), text::duration(row.busy_seconds), bytes(row.bytes)]);
        }
        for w in r.waits.iter().filter(|w| w.seconds > 0.0) {
            table.row([format!("compute: {}", w.wait.name()), percent(w.share), text::duration(w.seconds), String::new()]);
        }
        out.extend(table.render().lines().flat_map(|line| ["  ", line, "\n"]));
        out += &format!("  bound by {}\n", r.bound_by);
        if r.dropped > 0 {
            out += &format!("  {} spans were left out: the trace was full\n", r.dropped);
        }
        if !r.note.is_empty() {
            out += &format!("  note: {}\n", text::one_line(&r.note));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_trace::Wait;

    fn trace(rank: u32, n: u64) -> RankTrace {
        let span = |i: u64| Span {
            row: if i == 0 { Row::Loop } else { Row::Compute },
            name: "x".into(),
            kind: if i == 0 { Kind::Step } else { Kind::Wait(Wait::Pages) },
            step: 4,
            block: i.is_multiple_of(2).then_some(7),
            micro_batch: None,
            page: Some(1),
            bytes: i,
            begin_ns: 1000 + i,
            end_ns: 2000 + i,
        };
        RankTrace { rank, device: "cpu:0".into(), first_step: 4, steps: 1, dropped: 3, note: "n".into(), spans: (0..n).map(span).collect() }
    }

    #[test]
    fn parts_make_the_trace_again() {
        for n in [0, 1, PART_SPANS as u64, PART_SPANS as u64 * 2 + 1] {
            let all: Vec<_> = parts(trace(1, n)).collect();
            assert!(all.iter().all(|p| p.spans.len() <= PART_SPANS));
            assert_eq!(all.iter().map(|p| p.last).collect::<Vec<_>>(), (1..=all.len()).map(|i| i == all.len()).collect::<Vec<_>>());
            let mut a = Assembly::default();
            // Another rank's parts come in between.
            for (mine, theirs) in all.into_iter().zip(parts(trace(0, n))) {
                a.take(mine).unwrap();
                a.take(theirs).unwrap();
            }
            assert_eq!(a.finish(), [trace(0, n), trace(1, n)]);
        }
    }

    #[test]
    fn what_a_strange_daemon_sends_is_bounded_and_what_is_unknown_is_left_out() {
        let mut a = Assembly::default();
        let strange = |row, kind, duration_ns| v1::TraceSpan { row, kind, begin_ns: 9, duration_ns, ..Default::default() };
        let spans = vec![strange(99, 0, 1), strange(0, 99, 1), strange(0, 0, u64::MAX), strange(0, 0, 1)];
        a.take(v1::TracePart { spans, ..Default::default() }).unwrap();
        assert_eq!(a.ranks[&0].spans.len(), 1);
        let many = vec![strange(0, 0, 1); SPANS_MAX + 100];
        assert!(matches!(a.take(v1::TracePart { spans: many, ..Default::default() }), Err(ClientError::Protocol(_))));
        for rank in 1..RANKS_MAX as u32 {
            a.take(v1::TracePart { rank, ..Default::default() }).unwrap();
        }
        assert!(a.take(v1::TracePart { rank: u32::MAX, ..Default::default() }).is_err());
    }
}
