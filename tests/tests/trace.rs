//! `ramtorch trace` and `ramtorchd run --trace`: what a timeline holds, and that taking it changes nothing.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{Binary, Fixture, JobFile, Sandbox, bits, exit, read_metrics};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(180);

fn job() -> JobFile {
    Fixture::load("llama").job("trace").set("train.steps", 8).set("train.batch_size", 6).set("train.micro_batch_size", 1)
}

struct Span {
    rank: u64,
    row: u64,
    name: String,
    category: String,
    step: u64,
    begin: f64,
    end: f64,
}

/// The spans of a trace, and the names of each rank's rows.
fn read(path: &Path) -> (Vec<Span>, BTreeSet<(u64, String)>) {
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let events = file["traceEvents"].as_array().unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    let rows = events.iter().filter(|e| e["name"] == "thread_name").map(|e| (e["pid"].as_u64().unwrap(), text(&e["args"]["name"])));
    let span = |e: &Value| {
        let begin = e["ts"].as_f64().unwrap();
        Span {
            rank: e["pid"].as_u64().unwrap(),
            row: e["tid"].as_u64().unwrap(),
            name: text(&e["name"]),
            category: text(&e["cat"]),
            step: e["args"]["step"].as_u64().unwrap(),
            begin,
            end: begin + e["dur"].as_f64().unwrap(),
        }
    };
    (events.iter().filter(|e| e["ph"] == "X").map(span).collect(), rows.collect())
}

/// Microseconds; times are written with three decimals.
const ROUNDING: f64 = 0.01;

fn check(spans: &[Span], rows: &BTreeSet<(u64, String)>, first: u64, last: u64) {
    for rank in 0..2 {
        for row in ["step loop", "compute", "copy in", "copy out", "peers", "optimizer", "optimizer CPU"] {
            assert!(rows.contains(&(rank, row.to_owned())), "rank {rank} has no row {row}: {rows:?}");
        }
        let mine: Vec<&Span> = spans.iter().filter(|s| s.rank == rank).collect();
        let whole: Vec<&&Span> = mine.iter().filter(|s| s.category == "step").collect();
        assert_eq!(whole.iter().map(|s| s.step).collect::<Vec<_>>(), (first..=last).collect::<Vec<_>>());
        assert!(whole.windows(2).all(|w| w[0].end <= w[1].begin + ROUNDING));
        for step in &whole {
            // What arithmetic does in a step lies within it, and takes no longer than it does.
            let compute: Vec<&&Span> = mine.iter().filter(|s| s.row == 1 && s.step == step.step).collect();
            assert!(compute.iter().all(|s| s.begin >= step.begin - ROUNDING && s.end <= step.end + ROUNDING), "step {}", step.step);
            let busy: f64 = compute.iter().map(|s| s.end - s.begin).sum();
            assert!(busy > 0.0 && busy <= step.end - step.begin + ROUNDING);
            // Llama's fixture: an embedding, its layers, and a head; each forward and backward, each micro-batch.
            let count = |what: &str| compute.iter().filter(|s| s.name.starts_with(what)).count();
            assert!(count("forward") > 0 && count("forward") == count("backward"), "{} and {}", count("forward"), count("backward"));
            assert_eq!(count("head"), 3, "micro-batches of a rank");
            let copies =
                |row: u64, what: &str| mine.iter().filter(|s| s.row == row && s.step == step.step && s.name.starts_with(what)).count();
            assert!(copies(2, "load weights") > 0 && copies(3, "store gradients") > 0 && copies(4, "reduce gradients") > 0);
        }
        // The optimizer of the step before, which works beside the first step, and that of the last one.
        let updated: BTreeSet<u64> = mine.iter().filter(|s| s.name.starts_with("adamw")).map(|s| s.step).collect();
        assert_eq!(updated, (first - 1..=last).filter(|s| *s > 0).collect(), "rank {rank}");
    }
    // Of one row, spans lie beside or within one another.
    for (i, a) in spans.iter().enumerate() {
        for b in spans[i + 1..].iter().filter(|b| (b.rank, b.row) == (a.rank, a.row)) {
            let beside = a.end <= b.begin + ROUNDING || b.end <= a.begin + ROUNDING;
            let within = (b.begin >= a.begin - ROUNDING && b.end <= a.end + ROUNDING)
                || (a.begin >= b.begin - ROUNDING && a.end <= b.end + ROUNDING);
            assert!(beside || within, "{} {}..{} and {} {}..{}", a.name, a.begin, a.end, b.name, b.begin, b.end);
        }
    }
}

#[test]
fn a_run_writes_the_steps_that_were_asked_for_and_computes_the_same() {
    let plain = Sandbox::new();
    plain.run_job("trace", &job(), "cpu:2").expect_success();
    let traced = Sandbox::new();
    let file = traced.write_job("trace", &job());
    let mut command = traced.command(Binary::Daemon);
    command.arg("run").arg(file).args(["--devices", "cpu:2", "--trace", "t.json", "--trace-steps", "4..5"]);
    let ended = traced.start(command).wait(LIMIT).expect_success();
    traced.assert_clean();
    assert!(ended.stderr.contains("bound by") && ended.stderr.contains("t.json"), "{}", ended.stderr);
    let metrics = |s: &Sandbox| bits(&read_metrics(&s.path("metrics.jsonl")));
    assert_eq!(metrics(&plain), metrics(&traced));
    let (spans, rows) = read(&traced.path("t.json"));
    check(&spans, &rows, 4, 5);
}

#[test]
fn the_first_and_the_last_step_can_be_traced() {
    let sandbox = Sandbox::new();
    let file = sandbox.write_job("trace", &job().set("train.steps", 3).set("schedule.warmup_steps", 1));
    let mut command = sandbox.command(Binary::Daemon);
    // More steps than the job has: what there is.
    command.arg("run").arg(file).args(["--devices", "cpu:2", "--quiet", "--trace", "t.json", "--trace-steps", "2..9"]);
    let ended = sandbox.start(command).wait(LIMIT).expect_success();
    assert_eq!(ended.stderr, "");
    let (spans, rows) = read(&sandbox.path("t.json"));
    check(&spans, &rows, 2, 3);
}

#[test]
fn a_running_job_is_traced_by_its_client_and_bad_requests_are_refused() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let refused = |arguments: &[&str], code: i32, words: &str| {
        let ended = daemon.client(arguments);
        assert_eq!(ended.code, code, "{arguments:?}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{arguments:?}: {}", ended.stderr);
    };
    refused(&["trace", "nobody"], exit::NOT_FOUND, "nobody");
    let id = daemon.submit("trace", &job().set("train.steps", 1_000_000).unset("output.path"));
    // The job may not have begun: the trace waits for it.
    let answer = daemon.ask(["trace", &id, "--steps", "2", "--from", "3", "--out", "t.json"]);
    assert_eq!((&answer["first_step"], answer["ranks"].as_array().unwrap().len()), (&Value::from(3), 2), "{answer}");
    for rank in answer["ranks"].as_array().unwrap() {
        let compute = rank["rows"].as_array().unwrap().iter().find(|r| r["row"] == "compute").unwrap();
        let share = compute["busy_share"].as_f64().unwrap();
        assert!(share > 0.0 && share <= 1.0 && rank["steps"] == 2, "{rank}");
    }
    let (spans, rows) = read(&sandbox.path("t.json"));
    check(&spans, &rows, 3, 4);
    refused(&["trace", &id, "--out", "t.json"], exit::USAGE, "--overwrite");
    refused(&["trace", &id, "--out", "no/such/folder/t.json"], exit::USAGE, "no folder");
    refused(&["trace", &id, "--steps", "0"], exit::USAGE, "0");
    refused(&["trace", &id, "--steps", "21"], exit::USAGE, "21");
    refused(&["trace", &id, "--from", "2000000", "--out", "u.json"], exit::USAGE, "1000000 steps");
    // Another one later, of the steps that come next; people get a table.
    let again = daemon.client(["trace", &id, "--out", "t.json", "--overwrite"]).expect_success();
    assert!(again.stdout.contains("bound by") && again.stdout.contains("optimizer CPU"), "{}", again.stdout);
    // One that waits for steps that never come ends with the job.
    let waiting = daemon.start_client(["trace", &id, "--from", "900000", "--out", "late.json"]);
    std::thread::sleep(Duration::from_millis(500));
    refused(&["trace", &id, "--out", "u.json"], exit::RESOURCES, "being recorded already");
    daemon.ask(["cancel", &id]);
    let waited = waiting.wait(LIMIT);
    assert!(waited.code == exit::OK && waited.stdout.contains("ended before") || waited.code == exit::USAGE, "{waited:?}");
    daemon.wait_for_state(&id, "cancelled");
    refused(&["trace", &id, "--out", "u.json"], exit::USAGE, "has ended");
    daemon.stop();
}
