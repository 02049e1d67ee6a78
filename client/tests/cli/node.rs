//! node, stop, completion, help.

use crate::harness::{end, ramtorch};
use crate::mock::{Mock, Stage};

#[tokio::test]
async fn node_shows_memory_and_devices() {
    let mock = Mock::start(Stage::default());
    let out = mock.run(&["node"]).await.succeeded().out;
    let expected = format!(
        "\
host           node7
daemon         ramtorchd 0.1.0, pid 4242, up 2h 04m
socket         {}
state          /var/lib/ramtorch
cores          2
memory         48.00 GiB free of 64.00 GiB
shared memory  30.00 GiB free of 32.00 GiB
held by jobs   2.00 GiB
jobs           1 under way

DEVICE  MODEL        MEMORY  STATE  JOB
cpu:0   2 threads  4.00 GiB  busy   7f3a
cpu:1   2 threads  4.00 GiB  free
",
        mock.socket().display()
    );
    assert_eq!(out, expected);
    let json = &mock.run(&["node", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!((json["pid"].as_i64(), json["devices"][0]["state"].as_str()), (Some(4242), Some("busy")));
}

#[tokio::test]
async fn stop_waits_for_the_end() {
    let mock = Mock::start(Stage::default());
    assert_eq!(mock.run(&["stop", "--yes"]).await.succeeded().out, "ramtorchd (pid 4242) has stopped\n");
    let again = mock.run(&["stop", "--yes"]).await;
    assert_eq!(again.code, Some(14), "{again:?}");
    assert!(again.err.contains("no daemon listens on it"), "{again:?}");
    let mock = Mock::start(Stage::default());
    let json = &mock.run(&["stop", "-y", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(*json, serde_json::json!({ "stopped": true, "pid": 4242 }));
}

#[tokio::test]
async fn stop_does_not_guess_what_nobody_said() {
    let mock = Mock::start(Stage::default());
    for arguments in [&["stop"][..], &["stop", "--output", "json"]] {
        let ended = mock.run(arguments).await;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.err.contains("--yes"), "{ended:?}");
    }
    mock.run(&["node"]).await.succeeded();
}

#[tokio::test]
async fn stop_asks_on_a_terminal() {
    let mock = Mock::start(Stage::default());
    let (code, shown) = mock.run_on_terminal(&["stop"], "n\n").await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("has 1 job under way, which will be stopped. Stop it? [y/N]") && shown.contains("not stopped"), "{shown}");
    mock.run(&["node"]).await.succeeded();
    let (code, shown) = mock.run_on_terminal(&["stop"], "y\n").await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("ramtorchd (pid 4242) has stopped"), "{shown}");
}

#[tokio::test]
async fn completion_needs_no_daemon() {
    for (shell, mark) in [("bash", "complete -F _ramtorch"), ("zsh", "#compdef ramtorch"), ("fish", "complete -c ramtorch")] {
        let ended = end(&mut ramtorch(&["completion", shell])).await.succeeded();
        assert!(ended.out.contains(mark) && ended.out.contains("checkpoint"), "{shell}");
    }
    assert_eq!(end(&mut ramtorch(&["completion", "tcsh"])).await.code, Some(2));
}

#[tokio::test]
async fn every_command_has_help() {
    let commands = "submit list describe watch logs cancel checkpoint plan inspect export eval generate node stop completion";
    let top = end(&mut ramtorch(&["--help"])).await.succeeded().out;
    for command in commands.split(' ') {
        assert!(top.contains(&format!("  {command} ")), "{command}");
        let help = end(&mut ramtorch(&[command, "--help"])).await.succeeded().out;
        assert!(help.contains(&format!("Usage: ramtorch {command}")) && help.contains("--socket"), "{help}");
    }
    assert!(end(&mut ramtorch(&["--version"])).await.succeeded().out.starts_with("ramtorch "));
}

#[tokio::test]
async fn the_doctor_looks_at_the_machine_with_and_without_a_daemon() {
    let mock = Mock::start(Stage::default());
    let with = mock.run(&["doctor", "--json"]).await.json();
    let checks = with[0]["checks"].as_array().unwrap();
    assert!(checks.len() >= 12 && checks[0]["check"] == "daemon" && checks[0]["status"] == "ok", "{with:?}");
    let without = end(ramtorch(&["doctor"]).env("RAMTORCH_SOCKET", "/no/such/socket")).await;
    assert!(matches!(without.code, Some(0 | 1)), "{without:?}");
    assert!(without.out.contains("warn: daemon") && without.out.contains("systemctl start ramtorchd"), "{without:?}");
}
