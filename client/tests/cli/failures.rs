//! What goes wrong: no daemon, refusals, silence, closed pipes.

use crate::harness::{end, ramtorch};
use crate::mock::{Mock, Stage, job};
use ramtorch_client::v1::JobState;
use std::process::Stdio;
use tonic::Code;

#[tokio::test]
async fn an_unreachable_daemon_is_told_with_every_path_that_was_tried() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = ramtorch(&["list"]);
    let ended = end(command.env("XDG_RUNTIME_DIR", folder.path())).await;
    assert_eq!(ended.code, Some(14), "{ended:?}");
    let first = format!("\n  {}/ramtorch/ramtorchd.sock: no such socket\n", folder.path().display());
    assert!(ended.err.starts_with("ramtorch: cannot reach ramtorchd; tried:\n") && ended.err.contains(&first), "{ended:?}");
    assert!(ended.err.contains("  /run/ramtorch/ramtorchd.sock: ") && ended.err.contains("`ramtorchd start`"), "{ended:?}");
}

#[tokio::test]
async fn the_variable_and_the_option_name_one_socket() {
    let folder = tempfile::tempdir().unwrap();
    let dead = folder.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let mut command = ramtorch(&["node", "--output", "json"]);
    let ended = end(command.env("RAMTORCH_SOCKET", &dead)).await;
    assert_eq!(ended.code, Some(14), "{ended:?}");
    let error = ended.error_json();
    assert_eq!((error["code"].as_u64(), error["kind"].as_str()), (Some(14), Some("unreachable")));
    let message = error["message"].as_str().unwrap();
    assert!(
        message.starts_with(&format!("cannot reach ramtorchd on {}: the socket is there, but no daemon listens on it", dead.display())),
        "{message}"
    );

    let mock = Mock::start(Stage::default());
    end(mock.command(&["node"]).env("RAMTORCH_SOCKET", &dead)).await.succeeded();
    end(ramtorch(&["node"]).env("RAMTORCH_SOCKET", mock.socket())).await.succeeded();
}

#[tokio::test]
async fn what_is_no_socket_and_what_speaks_no_grpc_is_unreachable() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let ended = end(&mut ramtorch(&["node", "--socket", file.to_str().unwrap()])).await;
    assert_eq!(ended.code, Some(14), "{ended:?}");

    let other = folder.path().join("other.sock");
    let listener = std::os::unix::net::UnixListener::bind(&other).unwrap();
    let server = std::thread::spawn(move || {
        use std::io::Write;
        let (mut stream, _) = listener.accept().unwrap();
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n");
    });
    let ended = end(&mut ramtorch(&["node", "--socket", other.to_str().unwrap()])).await;
    assert_eq!(ended.code, Some(14), "{ended:?}");
    server.join().unwrap();
}

#[tokio::test]
async fn no_such_job() {
    let mock = Mock::start(Stage::default());
    for command in ["describe", "watch", "logs", "cancel", "checkpoint"] {
        let ended = mock.run(&[command, "nobody"]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(102), ""), "{command} {ended:?}");
        assert_eq!(ended.err, "ramtorch: no job \"nobody\"; `ramtorch list --all` shows all of them\n");
        let json = mock.run(&[command, "nobody", "--output", "json"]).await.error_json();
        assert_eq!((json["code"].as_u64(), json["kind"].as_str()), (Some(102), Some("not_found")), "{command}");
    }
}

#[tokio::test]
async fn refusals_become_exit_codes() {
    let mock = Mock::start(Stage { jobs: vec![job(JobState::Running)], ..Stage::default() });
    let file = mock.folder().join("job.toml");
    std::fs::write(&file, "").unwrap();
    let submit = ["submit", file.to_str().unwrap()];
    let cases: [(&[&str], Code, Option<u8>, i32); 10] = [
        (&submit, Code::InvalidArgument, None, 10),
        (&submit, Code::InvalidArgument, Some(11), 11),
        (&submit, Code::FailedPrecondition, None, 11),
        (&submit, Code::ResourceExhausted, None, 12),
        (&submit, Code::PermissionDenied, Some(13), 13),
        (&["plan", file.to_str().unwrap()], Code::ResourceExhausted, None, 12),
        (&["export", "austen", "/x"], Code::AlreadyExists, None, 13),
        (&["inspect", "/x"], Code::InvalidArgument, None, 11),
        (&["checkpoint", "austen"], Code::FailedPrecondition, None, 2),
        (&["list"], Code::Internal, None, 1),
    ];
    for (arguments, code, given, expected) in cases {
        mock.stage().refusal = Some((code, "line 3: key \"stesp\" is not known", given));
        let ended = mock.run(arguments).await;
        assert_eq!(ended.code, Some(expected), "{arguments:?} {code:?} {ended:?}");
        assert_eq!((ended.out.as_str(), ended.err.as_str()), ("", "ramtorch: line 3: key \"stesp\" is not known\n"));
    }
}

#[tokio::test]
async fn a_missing_job_file_is_told_before_the_daemon_is_asked() {
    let ended = end(&mut ramtorch(&["submit", "/no/such.toml", "--socket", "/none"])).await;
    assert_eq!(
        (ended.code, ended.err.as_str()),
        (Some(10), "ramtorch: cannot read job file /no/such.toml: No such file or directory (os error 2)\n")
    );
}

#[tokio::test]
async fn a_daemon_that_does_not_answer_is_not_waited_for_for_ever() {
    let mock = Mock::start(Stage { mute: true, ..Stage::default() });
    for command in [&["list"][..], &["node"], &["watch", "x"]] {
        let ended = mock.run(&[command, &["--timeout", "1"]].concat()).await;
        assert_eq!(ended.code, Some(14), "{ended:?}");
        assert!(ended.err.contains("within 1 s"), "{ended:?}");
    }
}

#[tokio::test]
async fn a_closed_pipe_is_no_failure() {
    let mock = Mock::start(Stage { jobs: vec![job(JobState::Running); 2000], ..Stage::default() });
    for arguments in [&["list"][..], &["list", "--output", "json"], &["completion", "bash"], &["--help"]] {
        let mut child = mock.command(arguments).stdout(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let ended = child.wait_with_output().await.unwrap();
        assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""), "{arguments:?}");
    }
}

#[tokio::test]
async fn a_full_disk_is_a_failure() {
    let mock = Mock::start(Stage { jobs: vec![job(JobState::Running)], ..Stage::default() });
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let child = mock.command(&["list"]).stdout(Stdio::from(full)).spawn().unwrap();
    let ended = child.wait_with_output().await.unwrap();
    assert_eq!(ended.status.code(), Some(13));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("cannot write to the standard output"));
}

#[tokio::test]
async fn usage_errors_keep_to_the_form_that_was_asked_for() {
    let human = end(&mut ramtorch(&["watch"])).await;
    assert_eq!(human.code, Some(2));
    assert!(human.err.contains("<JOB>"), "{human:?}");
    let json = end(&mut ramtorch(&["generate", "x", "--top-p", "2", "--output", "json"])).await;
    assert_eq!((json.code, json.error_json()["kind"].as_str()), (Some(2), Some("usage")));
    assert!(json.error_json()["message"].as_str().unwrap().contains("above 0 and up to 1"), "{json:?}");
}
