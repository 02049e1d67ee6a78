//! Following jobs to their ends: as a command, and as a library call.

use crate::harness::LIMIT;
use crate::mock::{Mock, Play, Stage, job, metrics};
use ramtorch_client::ui::{FollowOptions, Format, Interrupt, follow};
use ramtorch_client::v1::{self, JobState};
use ramtorch_client::{Client, ClientError, Endpoint, exit};
use std::time::Duration;
use tonic::Code;

fn ended(state: JobState) -> v1::Job {
    v1::Job { step: 300, ended_unix_ms: 1_795_331_524_000, workers: vec![], ..job(state) }
}

/// A run from its 1st step to its 300th, with a validation in the middle.
fn run(last: v1::Job) -> Vec<Play> {
    let mut plays = vec![Play::Job(v1::Job { step: 0, ..job(JobState::Running) })];
    let validated = |step| v1::Metrics {
        initial_validation_loss: (step == 1).then_some(5.1),
        validation_loss: (step == 150).then_some(1.5),
        ..metrics(step)
    };
    plays.extend((1..=300).map(|step| Play::Metrics(validated(step))));
    plays.push(Play::Note(v1::Event { level: "warn".into(), text: "slow disk".into(), rank: Some(1), ..Default::default() }));
    plays.push(Play::Unknown);
    plays.push(Play::Job(last));
    plays
}

fn mock(script: Vec<Play>) -> Mock {
    Mock::start(Stage { jobs: vec![v1::Job { step: 0, ..job(JobState::Queued) }], scripts: [script].into(), ..Stage::default() })
}

#[tokio::test]
async fn a_success_ends_with_curve_sample_and_path() {
    let last = v1::Job {
        sample: "It is a truth\nuniversally acknowledged".into(),
        output_path: "/models/austen".into(),
        ..ended(JobState::Succeeded)
    };
    let watched = mock(run(last)).run(&["watch", "austen"]).await.succeeded();
    let out = &watched.out;
    assert!(out.starts_with("austen (7f3a) Llama, 12.3M parameters\nqueued\nrunning on 2 ranks (cpu:0, cpu:1)\n"), "{out}");
    assert!(out.contains("\nstep 1/300  loss 4.9339  validation 5.1000  lr 3.00e-4  15.2k tok/s  1m 15s left\n"), "{out}");
    assert!(out.contains("\nstep 150/300  loss 1.3283  validation 1.5000  "), "{out}");
    assert!(out.contains("\nrank 1: warn: slow disk\n"), "{out}");
    assert!(out.contains("loss (smoothed)   ● validation loss\n") && out.contains("300 steps\n"), "{out}");
    assert!(out.contains("\nsucceeded after 2m 00s: 300 steps, 1.23M tokens\n"), "{out}");
    assert!(out.contains("\n  loss          4.9339 → 1.0270\n  validation    5.1000 → 1.5000\n"), "{out}");
    assert!(out.contains("\n  model folder  /models/austen\n"), "{out}");
    assert!(out.ends_with("\nsample:\n  It is a truth\n  universally acknowledged\n"), "{out}");
    assert!(!out.contains('\x1b'), "no escape sequences in a file\n{out}");
}

#[tokio::test]
async fn a_failure_says_why_and_exits_with_its_code() {
    for (exit_code, expected) in [(0, 100), (1, 100), (11, 11), (12, 12), (13, 13)] {
        let last = v1::Job { exit_code, step: 7, message: "rank 1: a.txt is not UTF-8".into(), ..ended(JobState::Failed) };
        let watched = mock(vec![Play::Job(last)]).run(&["watch", "austen"]).await;
        assert_eq!(watched.code, Some(expected), "{watched:?}");
        assert!(watched.out.contains("failed after 2m 00s at step 7/300: rank 1: a.txt is not UTF-8\n"), "{watched:?}");
        assert_eq!(watched.err, "", "said once");
    }
}

#[tokio::test]
async fn a_cancelled_job_exits_with_103() {
    let watched = mock(vec![Play::Job(ended(JobState::Cancelled))]).run(&["watch", "austen"]).await;
    assert_eq!(watched.code, Some(103), "{watched:?}");
    assert!(watched.out.contains("cancelled after 2m 00s"), "{watched:?}");
}

#[tokio::test]
async fn json_has_an_object_for_everything() {
    let watched = mock(run(ended(JobState::Succeeded))).run(&["watch", "austen", "--output", "json"]).await.succeeded();
    let lines = watched.json();
    let count = |event: &str| lines.iter().filter(|l| l["event"] == event).count();
    assert_eq!((count("job"), count("metrics"), count("note"), count("end")), (3, 300, 1, 1));
    assert_eq!(lines[0]["job"]["state"], "queued");
    let end = &lines[lines.len() - 1];
    assert_eq!((end["event"].as_str(), end["exit_code"].as_u64(), end["job"]["state"].as_str()), (Some("end"), Some(0), Some("succeeded")));
    let quiet = mock(run(ended(JobState::Succeeded))).run(&["watch", "austen", "--output", "json", "--quiet"]).await.succeeded();
    assert_eq!(quiet.json().len(), 1);
}

#[tokio::test]
async fn quiet_says_nothing() {
    let watched = mock(run(ended(JobState::Failed))).run(&["watch", "austen", "-q"]).await;
    assert_eq!((watched.code, watched.out.as_str(), watched.err.as_str()), (Some(100), "", ""));
}

#[tokio::test]
async fn submit_can_watch() {
    let mock = mock(run(ended(JobState::Succeeded)));
    let file = mock.folder().join("job.toml");
    std::fs::write(&file, "").unwrap();
    let watched = mock.run(&["submit", file.to_str().unwrap(), "--watch"]).await.succeeded();
    assert!(watched.out.contains("succeeded after 2m 00s: 300 steps"), "{watched:?}");
}

#[tokio::test]
async fn a_stream_that_stays_open_after_the_end_is_left() {
    let script = vec![Play::Job(ended(JobState::Succeeded)), Play::Silence];
    mock(script).run(&["watch", "austen"]).await.succeeded();
}

#[tokio::test]
async fn a_broken_stream_is_taken_up_again_without_repeating_anything() {
    let first = vec![
        Play::Job(v1::Job { step: 0, ..job(JobState::Running) }),
        Play::Metrics(metrics(1)),
        Play::Metrics(metrics(2)),
        Play::Refuse(Code::Unavailable, "shutting down"),
    ];
    let then = vec![
        Play::Job(v1::Job { step: 3, ..job(JobState::Running) }),
        Play::Metrics(metrics(1)),
        Play::Metrics(metrics(2)),
        Play::Metrics(metrics(3)),
        Play::Metrics(metrics(4)),
        Play::Job(ended(JobState::Succeeded)),
    ];
    let mock = mock(vec![]);
    mock.stage().scripts = [first, then].into();
    let watched = mock.run(&["watch", "austen", "--output", "json"]).await.succeeded();
    let lines = watched.json();
    let steps: Vec<u64> = lines.iter().filter_map(|l| l["metrics"]["step"].as_u64()).collect();
    assert_eq!(steps, [1, 2, 3, 4]);
    assert_eq!(lines.iter().filter(|l| l["event"] == "notice").count(), 1);
    assert_eq!(mock.stage().watches, 2);
}

#[tokio::test]
async fn a_reader_that_fell_behind_catches_up() {
    let first = vec![
        Play::Job(v1::Job { step: 0, ..job(JobState::Running) }),
        Play::Metrics(metrics(1)),
        Play::Refuse(Code::ResourceExhausted, "this watcher is 99 events behind and was dropped"),
    ];
    let mut then = run(ended(JobState::Succeeded));
    then[0] = Play::Job(v1::Job { step: 200, ..job(JobState::Running) });
    let mock = mock(vec![]);
    mock.stage().scripts = [first, then].into();
    let watched = mock.run(&["watch", "austen", "--output", "json"]).await.succeeded();
    let steps: Vec<u64> = watched.json().iter().filter_map(|l| l["metrics"]["step"].as_u64()).collect();
    assert_eq!(steps, (1..=300).collect::<Vec<_>>());
    assert!(!watched.out.contains("\"notice\""), "nothing was lost");
}

#[tokio::test]
async fn a_daemon_that_is_restarted_is_waited_for() {
    let mut mock = mock(vec![Play::Job(job(JobState::Running)), Play::Silence]);
    let running = mock.start_until(&["watch", "austen"], "running").await;
    mock.stage().scripts = [vec![Play::Job(ended(JobState::Succeeded))]].into();
    mock.restart(Duration::from_millis(500)).await;
    let watched = running.end().await.succeeded();
    assert!(watched.out.contains("succeeded") && watched.err.contains("lost the connection"), "{watched:?}");
}

#[tokio::test]
async fn a_daemon_that_never_comes_back_is_given_up() {
    let mock = mock(vec![Play::Job(job(JobState::Running)), Play::Silence]);
    let running = mock.start_until(&["watch", "austen"], "running").await;
    drop(mock);
    let watched = running.end().await;
    assert_eq!(watched.code, Some(14), "{watched:?}");
    assert!(watched.err.lines().last().unwrap_or("").contains("`ramtorch node`"), "{watched:?}");
}

#[tokio::test]
async fn a_refusal_in_the_middle_ends_the_watch() {
    let watched = mock(vec![Play::Refuse(Code::NotFound, "the job was removed")]).run(&["watch", "austen"]).await;
    assert_eq!((watched.code, watched.err.as_str()), (Some(102), "ramtorch: the job was removed\n"));
}

#[tokio::test]
async fn the_reader_may_go_away() {
    let mock = mock(run(ended(JobState::Succeeded)));
    let mut child = mock.command(&["watch", "austen"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
}

async fn client(mock: &Mock) -> Client {
    Client::connect(Endpoint::unix(mock.socket())).await.unwrap()
}

const QUIET: FollowOptions = FollowOptions { output: Format::Human, interrupt: Interrupt::Cancel, quiet: true };

#[tokio::test]
async fn the_library_follows_to_every_kind_of_end() {
    let ends = [(JobState::Succeeded, exit::OK), (JobState::Failed, exit::JOB_FAILED), (JobState::Cancelled, exit::CANCELLED)];
    for (state, exit_code) in ends {
        let mock = mock(run(ended(state)));
        // A task needs a future that is Send.
        let mut client = client(&mock).await;
        let end = tokio::spawn(async move { follow(&mut client, "austen", QUIET).await }).await.unwrap().unwrap();
        assert_eq!((end.exit_code, end.job.state, end.job.step), (exit_code, state as i32, 300));
    }
}

#[tokio::test]
async fn the_library_reports_a_job_that_is_not_there() {
    let mock = Mock::start(Stage::default());
    let error = follow(&mut client(&mock).await, "austen", QUIET).await.unwrap_err();
    assert!(matches!(&error, ClientError::Refused { code: Code::NotFound, .. }), "{error:?}");
    assert_eq!(error.exit_code(), exit::NOT_FOUND);
}
