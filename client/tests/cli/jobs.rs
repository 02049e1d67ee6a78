//! submit, list, describe, logs, cancel, checkpoint, plan.

use crate::mock::{Mock, Stage, job};
use ramtorch_client::v1::{self, JobState};

fn with_job(state: JobState) -> Mock {
    Mock::start(Stage { jobs: vec![job(state)], ..Stage::default() })
}

fn job_file(mock: &Mock) -> String {
    let path = mock.folder().join("austen.toml");
    std::fs::write(&path, "name = \"austen\"\n").unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn submit_sends_the_text_and_its_folder() {
    let mock = with_job(JobState::Queued);
    let file = job_file(&mock);
    let ended = mock.run(&["submit", &file]).await.succeeded();
    assert_eq!(ended.out, "submitted austen (7f3a), queued\nfollow it with `ramtorch watch 7f3a`\n");
    assert_eq!(ended.err, "");
    let sent = mock.stage().submitted[0].clone();
    assert_eq!(sent.job_toml, "name = \"austen\"\n");
    assert_eq!(sent.base_dir, mock.folder().to_str().unwrap());
    assert_eq!((sent.file_name, sent.dry_run), (file, false));
}

#[tokio::test]
async fn submit_resolves_a_relative_file_and_reads_the_standard_input() {
    let mock = with_job(JobState::Queued);
    job_file(&mock);
    let mut command = mock.command(&["submit", "austen.toml", "-q"]);
    let ended = crate::harness::end(command.current_dir(mock.folder())).await.succeeded();
    assert_eq!(ended.out, "7f3a\n");
    assert_eq!(mock.stage().submitted[0].base_dir, mock.folder().to_str().unwrap());

    mock.run_with_input(&["submit", "-"], "name = \"piped\"").await.succeeded();
    let sent = mock.stage().submitted[1].clone();
    assert_eq!((sent.job_toml.as_str(), sent.file_name.as_str()), ("name = \"piped\"", "<stdin>"));
    assert_eq!(sent.base_dir, std::env::current_dir().unwrap().to_str().unwrap());
}

#[tokio::test]
async fn submit_in_json_is_the_job() {
    let mock = with_job(JobState::Queued);
    let ended = mock.run(&["submit", &job_file(&mock), "--output", "json"]).await.succeeded();
    let job = &ended.json()[0];
    assert_eq!((job["id"].as_str(), job["state"].as_str()), (Some("7f3a"), Some("queued")));
    assert_eq!(job["plan"]["json"]["groups"], 1);
}

#[tokio::test]
async fn a_dry_run_shows_the_plan() {
    let mock = with_job(JobState::Queued);
    let ended = mock.run(&["submit", &job_file(&mock), "--dry-run"]).await.succeeded();
    assert_eq!(ended.out, "segment   1.00 GiB\nstep      250ms, bound by matrix products\nausten is sound; nothing was submitted\n");
    assert!(mock.stage().submitted[0].dry_run);
    let both = mock.run(&["submit", &job_file(&mock), "--dry-run", "--watch"]).await;
    assert_eq!(both.code, Some(2));
}

#[tokio::test]
async fn plan_prints_the_daemons_words_or_its_numbers() {
    let mock = with_job(JobState::Queued);
    let file = job_file(&mock);
    let ended = mock.run(&["plan", &file]).await.succeeded();
    assert_eq!(ended.out, "segment   1.00 GiB\nstep      250ms, bound by matrix products\n");
    let json = &mock.run(&["plan", &file, "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(json["segment_bytes"], 1u64 << 30);
    assert_eq!(json["json"]["groups"], 1);
}

#[tokio::test]
async fn list_is_a_table_the_newest_first() {
    let older = v1::Job {
        id: "01".into(),
        name: "older".into(),
        created_unix_ms: 1,
        steps: 0,
        world_size: 0,
        segment_bytes: 0,
        last_metrics: None,
        ..job(JobState::Queued)
    };
    let ended_job = v1::Job { id: "02".into(), ..job(JobState::Failed) };
    let mock = Mock::start(Stage { jobs: vec![older, job(JobState::Running), ended_job], ..Stage::default() });
    let out = mock.run(&["list"]).await.succeeded().out;
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("ID    NAME    STATE       STEP    LOSS  TOK/S  RANKS    MEMORY  "), "{out}");
    assert!(lines[0].ends_with("AGE"), "{out}");
    assert!(lines[1].starts_with("7f3a  austen  running  120/300  1.5413  15.2k      2  1.00 GiB  "), "{out}");
    assert!(lines[2].starts_with("01    older   queued         -       -      -      -         -  "), "{out}");
    assert_eq!(lines.len(), 3);
    assert_eq!(mock.run(&["list", "--all", "--quiet"]).await.succeeded().out, "7f3a\n02\n01\n");
    let json = &mock.run(&["--output", "json", "list", "-a"]).await.succeeded().json()[0];
    let ids: Vec<&str> = json["jobs"].as_array().unwrap().iter().map(|j| j["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["7f3a", "02", "01"]);
}

#[tokio::test]
async fn an_empty_list_says_where_ended_jobs_are() {
    let mock = Mock::start(Stage::default());
    let ended = mock.run(&["list"]).await.succeeded();
    assert_eq!(ended.out, "");
    assert!(ended.err.contains("`ramtorch list --all`"), "{ended:?}");
    assert_eq!(mock.run(&["list", "--output=json"]).await.succeeded().out, "{\"jobs\":[]}\n");
}

#[tokio::test]
async fn describe_tells_everything() {
    let mock = with_job(JobState::Running);
    let out = mock.run(&["describe", "austen"]).await.succeeded().out;
    let expected = [
        "name      austen\n",
        "state     running\n",
        "model     Llama, 12.3M parameters\n",
        "step      120 of 300 (40 %)\n",
        "created   2026-11-22 07:10:03 UTC\n",
        "segment   /ramtorch-7f3a-1 (1.00 GiB)\n",
        "\nlast step\n  step            120\n  loss            1.5413\n",
        "  tokens          4.10k (492k in all)\n",
        "\nworkers\n  RANK  DEVICE   PID  PHASE    STEP  HEARTBEAT  LOG\n     0  cpu:0   4300  forward   121          -\n",
        "\nplan\n  segment   1.00 GiB\n",
    ];
    for part in expected {
        assert!(out.contains(part), "{part:?} is not in\n{out}");
    }
    let json = &mock.run(&["describe", "7f3a", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(json["workers"][1]["device"], "cpu:1");
    assert_eq!(json["last_metrics"]["json"]["step"], 120);
    assert!(json["last_metrics"]["validation_loss"].is_null());
}

#[tokio::test]
async fn describe_shows_how_a_job_ended() {
    let failed = v1::Job { exit_code: 12, message: "no\nmemory".into(), ended_unix_ms: 1_795_331_464_000, ..job(JobState::Failed) };
    let mock = Mock::start(Stage { jobs: vec![failed], ..Stage::default() });
    let out = mock.run(&["describe", "7f3a"]).await.succeeded().out;
    for part in ["message    no memory\n", "exit code  12 (resources)\n", "run time   1m 00s\n"] {
        assert!(out.contains(part), "{part:?} is not in\n{out}");
    }
}

#[tokio::test]
async fn logs_of_one_rank_pass_as_they_are() {
    let chunk = |rank, data: &[u8]| v1::LogChunk { rank, data: data.to_vec() };
    let logs = vec![chunk(0, b"zero: hal"), chunk(1, b"one\n"), chunk(0, b"f\nlast")];
    let mock = Mock::start(Stage { jobs: vec![job(JobState::Running)], logs, ..Stage::default() });
    let one = mock.run(&["logs", "austen", "--rank", "0", "--tail", "5", "-f"]).await.succeeded();
    assert_eq!(one.out, "zero: half\nlast");
    let asked = mock.stage().logs_asked[0].clone();
    assert_eq!((asked.id.as_str(), asked.rank, asked.tail_lines, asked.follow), ("7f3a", Some(0), 5, true));

    let all = mock.run(&["logs", "austen"]).await.succeeded();
    assert_eq!(all.out, "[1] one\n[0] zero: half\n[0] last\n");
    let json = mock.run(&["logs", "austen", "--output", "json"]).await.succeeded().json();
    assert_eq!(json[1], serde_json::json!({ "rank": 0, "line": "zero: half" }));
}

#[tokio::test]
async fn cancel_tells_a_running_job_from_an_ended_one() {
    let mock = with_job(JobState::Running);
    assert_eq!(mock.run(&["cancel", "austen"]).await.succeeded().out, "austen (7f3a) is being stopped\n");
    assert_eq!(mock.run(&["cancel", "austen", "--quiet"]).await.succeeded().out, "");
    assert_eq!(mock.run(&["cancel", "austen", "--output", "json"]).await.succeeded().json()[0]["state"], "stopping");
    assert_eq!(mock.stage().cancels, 3);
    let mock = with_job(JobState::Succeeded);
    assert_eq!(mock.run(&["cancel", "austen"]).await.succeeded().out, "austen (7f3a) has ended: succeeded\n");
}

#[tokio::test]
async fn checkpoint_names_the_folder() {
    let mock = with_job(JobState::Running);
    assert_eq!(mock.run(&["checkpoint", "austen"]).await.succeeded().out, "checkpoint of step 120 in /checkpoints/step-00000120\n");
    let json = &mock.run(&["checkpoint", "austen", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(*json, serde_json::json!({ "path": "/checkpoints/step-00000120", "step": 120 }));
}

fn trace_parts() -> Vec<v1::TracePart> {
    let span = |row, name: &str, kind, begin_ms: u64, end_ms: u64| v1::TraceSpan {
        row,
        name: name.into(),
        kind,
        step: 121,
        block: Some(3),
        begin_ns: begin_ms * 1_000_000,
        duration_ns: (end_ms - begin_ms) * 1_000_000,
        ..Default::default()
    };
    let part = |rank, spans, last| v1::TracePart {
        rank,
        device: format!("cpu:{rank}"),
        first_step: 121,
        steps: 1,
        dropped: u64::from(rank) * 7,
        spans,
        last,
        ..Default::default()
    };
    vec![
        part(1, vec![span(0, "step", 7, 1000, 2000)], true),
        part(0, vec![span(0, "step", 7, 1000, 2000)], false),
        part(0, vec![span(1, "forward", 0, 1100, 1500), span(1, "wait for pages", 4, 1500, 2000)], true),
    ]
}

#[tokio::test]
async fn trace_writes_a_file_and_sums_it_up() {
    let mock = Mock::start(Stage { jobs: vec![job(JobState::Running)], trace: trace_parts(), ..Stage::default() });
    let path = mock.folder().join("t.json");
    let out = path.to_str().unwrap();
    let ended = mock.run(&["trace", "austen", "--out", out, "--from", "121", "--steps", "1"]).await.succeeded();
    for words in
        ["rank 0 (cpu:0): step 121, 1s", "compute: wait for pages  50.0 %", "bound by the optimizer's pages", "7 spans were left out"]
    {
        assert!(ended.out.contains(words), "{words}: {}", ended.out);
    }
    let asked = mock.stage().trace_asked[0].clone();
    assert_eq!((asked.id.as_str(), asked.steps, asked.first_step), ("7f3a", 1, 121));
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(file["otherData"]["name"], "austen");
    let spans: Vec<&serde_json::Value> = file["traceEvents"].as_array().unwrap().iter().filter(|e| e["ph"] == "X").collect();
    assert_eq!(spans.len(), 4);
    assert!(spans.iter().any(|s| s["name"] == "forward 3" && s["ts"] == 100_000.0 && s["dur"] == 400_000.0 && s["pid"] == 0));

    let again = mock.run(&["trace", "austen", "--out", out]).await;
    assert_eq!((again.code, again.err.contains("--overwrite")), (Some(2), true), "{again:?}");
    assert_eq!(mock.stage().trace_asked.len(), 1, "nothing is recorded for a file that cannot be written");
    let json = &mock.run(&["trace", "austen", "--out", out, "--overwrite", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!((&json["first_step"], &json["ranks"][1]["dropped"]), (&121.into(), &7.into()));
    assert_eq!(
        std::fs::read_dir(mock.folder()).unwrap().filter(|e| e.as_ref().unwrap().path().extension() == Some("partial".as_ref())).count(),
        0
    );
}
