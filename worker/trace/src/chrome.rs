//! The JSON Trace Event Format, which Perfetto and chrome://tracing read: a process a rank, a thread a row.

use crate::{RankTrace, Row, Span};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::io::{self, Write};

/// Writes the ranks' traces as one file. Times begin with the earliest span.
///
/// # Errors
/// Those of `out`.
pub fn write_chrome(out: &mut dyn Write, ranks: &[RankTrace], about: &Map<String, Value>) -> io::Result<()> {
    let origin = ranks.iter().flat_map(|r| &r.spans).map(|s| s.begin_ns).min().unwrap_or(0);
    write!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{},\"traceEvents\":[", Value::Object(about.clone()))?;
    let mut first = true;
    let mut event = |out: &mut dyn Write, v: Value| -> io::Result<()> {
        out.write_all(if std::mem::take(&mut first) { b"\n" } else { b",\n" })?;
        write!(out, "{v}")
    };
    for r in ranks {
        let pid = r.rank;
        let name = format!("rank {pid} ({})", r.device);
        event(out, json!({"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}))?;
        event(out, json!({"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}))?;
        let mut labels: Vec<String> = Vec::new();
        if !r.note.is_empty() {
            labels.push(r.note.clone());
        }
        if r.dropped > 0 {
            labels.push(format!("{} spans left out: the trace was full", r.dropped));
        }
        if !labels.is_empty() {
            event(out, json!({"ph": "M", "name": "process_labels", "pid": pid, "args": {"labels": labels.join("; ")}}))?;
        }
        let rows: BTreeSet<u32> = r.spans.iter().map(|s| s.row.number()).collect();
        for tid in rows {
            let name = Row::from_number(tid).map_or("", Row::name);
            event(out, json!({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}))?;
            event(out, json!({"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}))?;
        }
        for s in &r.spans {
            event(out, span(s, pid, origin))?;
        }
    }
    out.write_all(b"\n]}\n")
}

fn span(s: &Span, pid: u32, origin: u64) -> Value {
    let micros = |ns: u64| ns as f64 / 1e3;
    let mut args = Map::new();
    args.insert("step".into(), s.step.into());
    let mut put = |key: &str, v: Option<u64>| v.map(|v| args.insert(key.into(), v.into()));
    put("block", s.block.map(u64::from));
    put("micro_batch", s.micro_batch.map(u64::from));
    put("page", s.page.map(u64::from));
    if s.bytes > 0 {
        put("bytes", Some(s.bytes));
        let seconds = (s.end_ns - s.begin_ns) as f64 / 1e9;
        if seconds > 0.0 {
            args.insert("GB/s".into(), ((s.bytes as f64 / seconds / 1e7).round() / 100.0).into());
        }
    }
    let number = match s.kind {
        crate::Kind::Step => Some(s.step),
        _ => s.block.or(s.page).map(u64::from),
    };
    let name = number.map_or_else(|| s.name.to_string(), |n| format!("{} {n}", s.name));
    json!({
        "ph": "X", "name": name, "cat": s.kind.category(), "pid": pid, "tid": s.row.number(),
        "ts": micros(s.begin_ns - origin), "dur": micros(s.end_ns - s.begin_ns), "args": args,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // tests
mod tests {
    use super::*;
    use crate::{Kind, Wait};

    fn rank(rank: u32) -> RankTrace {
        let span = |row, name: &'static str, kind, begin_ns, end_ns| Span {
            row,
            name: name.into(),
            kind,
            step: 4,
            block: Some(2),
            micro_batch: None,
            page: None,
            bytes: 0,
            begin_ns,
            end_ns,
        };
        RankTrace {
            rank,
            device: "cpu:\"0\"".into(),
            first_step: 4,
            steps: 1,
            dropped: u64::from(rank),
            note: String::new(),
            spans: vec![
                span(Row::Loop, "step", Kind::Step, 1_000_000, 2_000_000),
                span(Row::Compute, "forward", Kind::Work, 1_000_500, 1_250_000),
                span(Row::Compute, Wait::Weights.name(), Kind::Wait(Wait::Weights), 1_250_000, 1_250_000),
                Span { bytes: 1_000_000, ..span(Row::CopyIn, "load weights", Kind::Copy, 1_000_000, 1_500_000) },
            ],
        }
    }

    #[test]
    fn the_file_is_json_with_names_and_microseconds() {
        let mut text = Vec::new();
        let about = json!({"job": "x"}).as_object().unwrap().clone();
        write_chrome(&mut text, &[rank(0), rank(1)], &about).unwrap();
        let v: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(v["otherData"]["job"], "x");
        let events = v["traceEvents"].as_array().unwrap();
        let spans: Vec<&Value> = events.iter().filter(|e| e["ph"] == "X").collect();
        assert_eq!(spans.len(), 8);
        assert_eq!((&spans[0]["name"], &spans[0]["ts"], &spans[0]["dur"]), (&json!("step 4"), &json!(0.0), &json!(1000.0)));
        assert_eq!((&spans[1]["name"], &spans[1]["ts"], &spans[1]["dur"]), (&json!("forward 2"), &json!(0.5), &json!(249.5)));
        assert_eq!(spans[3]["args"], json!({"step": 4, "block": 2, "bytes": 1_000_000, "GB/s": 2.0}));
        let names: Vec<&str> = events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["step loop", "compute", "copy in", "step loop", "compute", "copy in"]);
        assert_eq!(events.iter().filter(|e| e["name"] == "process_labels").count(), 1, "rank 1 has left something out");
        assert!(events.iter().any(|e| e["args"]["name"] == "rank 1 (cpu:\"0\")"));
    }

    #[test]
    fn nothing_recorded_is_a_file_too() {
        let mut text = Vec::new();
        write_chrome(&mut text, &[], &Map::new()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&text).unwrap()["traceEvents"], json!([]));
    }
}
