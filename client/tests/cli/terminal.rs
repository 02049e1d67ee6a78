//! What a person sees: the same commands on a pseudo-terminal.

use crate::mock::{Mock, Play, Stage, job, metrics};
use ramtorch_client::v1::{self, JobState};

#[tokio::test]
async fn a_watch_has_a_bar_and_leaves_the_summary() {
    let mut script = vec![Play::Job(v1::Job { step: 0, ..job(JobState::Running) })];
    script.extend((1..=300).map(|step| Play::Metrics(metrics(step))));
    script.push(Play::Note(v1::Event { text: "checkpoint written".into(), ..Default::default() }));
    let last = v1::Job { step: 300, ended_unix_ms: 1_795_331_524_000, sample: "evil \x1b]0;title\x07".into(), ..job(JobState::Succeeded) };
    script.push(Play::Job(last));
    let mock =
        Mock::start(Stage { jobs: vec![v1::Job { step: 0, ..job(JobState::Queued) }], scripts: [script].into(), ..Stage::default() });
    let (code, shown) = mock.run_on_terminal(&["watch", "austen"], "").await;
    assert_eq!(code, Some(0), "{shown}");
    for part in [
        "queued",
        "running on 2 ranks (cpu:0, cpu:1)",
        "checkpoint written",
        "300/300",
        " left",
        "15.2k tok/s",
        "succeeded after 2m 00s: 300 steps",
        "┤",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    assert!(!shown.contains("\x1b]0;"), "foreign escape sequences stay out\n{shown}");
    let page = shown.rsplit("loss (smoothed)").next().unwrap_or("");
    assert!(!page.contains('━'), "no bar below the curve\n{shown}");
}

#[tokio::test]
async fn tables_have_no_escape_sequences() {
    let mock = Mock::start(Stage { jobs: vec![v1::Job { name: "a\x1b[31m".into(), ..job(JobState::Running) }], ..Stage::default() });
    let (code, shown) = mock.run_on_terminal(&["list"], "").await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("a\u{fffd}[31m") && !shown.contains('\x1b'), "{shown}");
}
