//! Ctrl-C: detaches from a watch, cancels a job that the command owns, ends everything else.

use crate::harness::LIMIT;
use crate::mock::{Mock, Play, Stage, job};
use nix::sys::signal::{Signal, raise};
use ramtorch_client::ui::{FollowOptions, Format, Interrupt, follow};
use ramtorch_client::v1::{self, JobState};
use ramtorch_client::{Client, Endpoint, exit};
use std::process::Stdio;
use std::time::Duration;

fn mock(script: Vec<Play>) -> Mock {
    Mock::start(Stage { jobs: vec![job(JobState::Running)], scripts: [script].into(), ..Stage::default() })
}

#[tokio::test]
async fn an_interrupt_detaches_and_leaves_the_job() {
    let mock = mock(vec![Play::Job(job(JobState::Running)), Play::Silence]);
    let running = mock.start_until(&["watch", "austen"], "running").await;
    running.signal(Signal::SIGINT);
    let ended = running.end().await;
    assert_eq!(ended.code, Some(101), "{ended:?}");
    assert_eq!(ended.err, "detached: the job goes on; `ramtorch watch 7f3a` comes back to it, `ramtorch cancel 7f3a` ends it\n");
    assert_eq!(mock.stage().cancels, 0);
}

#[tokio::test]
async fn detaching_in_json_is_the_last_object() {
    let mock = mock(vec![Play::Silence]);
    let file = mock.folder().join("job.toml");
    std::fs::write(&file, "").unwrap();
    let running = mock.start_until(&["submit", "--watch", file.to_str().unwrap(), "--output", "json"], "job").await;
    running.signal(Signal::SIGINT);
    let ended = running.end().await;
    assert_eq!((ended.code, ended.err.as_str()), (Some(101), ""));
    let last = ended.json().pop().unwrap();
    assert_eq!(
        (last["event"].as_str(), last["exit_code"].as_u64(), last["job"]["id"].as_str()),
        (Some("detached"), Some(101), Some("7f3a"))
    );
}

#[tokio::test]
async fn an_interrupt_works_while_the_daemon_is_away() {
    let mut mock = mock(vec![Play::Job(job(JobState::Running)), Play::Silence]);
    let running = mock.start_until(&["watch", "austen", "--output", "json"], "running").await;
    mock.restart(Duration::ZERO).await;
    mock.stage().mute = true;
    tokio::time::sleep(Duration::from_millis(300)).await;
    running.signal(Signal::SIGINT);
    assert_eq!(running.end().await.code, Some(101));
}

#[tokio::test]
async fn an_interrupt_ends_other_commands_with_130() {
    let mock = Mock::start(Stage { mute: true, ..Stage::default() });
    let child = mock.command(&["generate", "austen", "-p", "x"]).stdin(Stdio::null()).spawn().unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id().unwrap() as i32), Signal::SIGINT).unwrap();
    let ended = tokio::time::timeout(LIMIT, child.wait_with_output()).await.unwrap().unwrap();
    assert_eq!(ended.status.code(), Some(130));
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "ramtorch: interrupted\n");
}

const OWNED: FollowOptions = FollowOptions { output: Format::Human, interrupt: Interrupt::Cancel, quiet: true };

/// Signals reach the whole test process: these cases come one after the other, in one test, and no other test of
/// this binary listens for signals in its own process.
#[tokio::test]
async fn an_owner_cancels_first_and_gives_up_second() {
    // Until the follower listens, a signal would end the tests.
    let _guard = [Signal::SIGINT, Signal::SIGTERM].map(|s| tokio::signal::unix::signal((s as i32).into()).unwrap());

    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let stopping = Play::Job(job(JobState::Stopping));
        let mock = mock(vec![Play::Job(job(JobState::Running)), Play::UntilCancelled, stopping, Play::Job(job(JobState::Cancelled))]);
        let following = follow_in_task(&mock).await;
        raise(signal).unwrap();
        let end = tokio::time::timeout(LIMIT, following).await.unwrap().unwrap();
        assert_eq!((end.exit_code, end.job.state), (exit::CANCELLED, JobState::Cancelled as i32), "{signal}");
        assert_eq!(mock.stage().cancels, 1);
    }

    let mock = mock(vec![Play::Job(job(JobState::Running)), Play::Silence]);
    let following = follow_in_task(&mock).await;
    raise(Signal::SIGINT).unwrap();
    while mock.stage().cancels == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    raise(Signal::SIGINT).unwrap();
    let end = tokio::time::timeout(LIMIT, following).await.unwrap().unwrap();
    assert_eq!(end.exit_code, exit::INTERRUPTED);
}

async fn follow_in_task(mock: &Mock) -> tokio::task::JoinHandle<ramtorch_client::ui::JobEnd> {
    let mut client = Client::connect(Endpoint::unix(mock.socket())).await.unwrap();
    let following = tokio::spawn(async move { follow(&mut client, "austen", OWNED).await.unwrap() });
    while mock.stage().watches == 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    following
}

#[tokio::test]
async fn an_ended_job_is_shown_though_it_has_ended() {
    let ended = v1::Job { ended_unix_ms: 1_795_331_524_000, ..job(JobState::Failed) };
    let mock = Mock::start(Stage { jobs: vec![ended.clone()], scripts: [vec![Play::Job(ended)]].into(), ..Stage::default() });
    let shown = mock.run(&["watch", "austen"]).await;
    assert_eq!(shown.code, Some(100), "{shown:?}");
    assert_eq!(shown.out.matches("failed").count(), 1, "{shown:?}");
}
