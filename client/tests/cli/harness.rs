//! Runs the real binary against the mock daemon.

use crate::mock::Mock;
use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// No test waits longer than this for anything.
pub const LIMIT: Duration = Duration::from_secs(40);

/// How a command ended and what it wrote.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ended {
    /// The lines of the standard output, each a JSON object.
    pub fn json(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}\n{self:?}"))).collect()
    }

    /// The one JSON object on the standard error.
    pub fn error_json(&self) -> Value {
        serde_json::from_str(&self.err).unwrap_or_else(|e| panic!("{e}\n{self:?}"))
    }

    pub fn succeeded(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }
}

/// The command without a daemon; nothing of the caller's environment names one.
pub fn ramtorch(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramtorch"));
    command.args(arguments).env_remove("RAMTORCH_SOCKET").env_remove("XDG_RUNTIME_DIR").env_remove("NO_COLOR");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

pub async fn end(command: &mut Command) -> Ended {
    let output = tokio::time::timeout(LIMIT, command.output()).await.expect("the command ends").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

impl Mock {
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = ramtorch(arguments);
        command.arg("--socket").arg(self.socket());
        command
    }

    /// Runs the command to its end.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        end(&mut self.command(arguments)).await
    }

    /// Runs the command to its end with this standard input.
    pub async fn run_with_input(&self, arguments: &[&str], input: &str) -> Ended {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        finish(child, String::new(), None).await
    }

    /// Starts the command and reads lines up to one that holds `until`.
    pub async fn start_until(&self, arguments: &[&str], until: &str) -> Running {
        let mut child = self.command(arguments).spawn().unwrap();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        let mut out = String::new();
        let read = async {
            while !out.lines().last().unwrap_or("").contains(until) {
                assert_ne!(reader.read_line(&mut out).await.unwrap(), 0, "ended without {until:?}: {out}");
            }
        };
        tokio::time::timeout(LIMIT, read).await.unwrap_or_else(|_| panic!("no {until:?}"));
        Running { child, reader, out }
    }

    /// Runs the command on a terminal of 80 columns, types `input`, and returns what the terminal got.
    pub async fn run_on_terminal(&self, arguments: &[&str], input: &str) -> (Option<i32>, String) {
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).unwrap();
        let mut command = self.command(arguments);
        let stdio = || Stdio::from(slave.try_clone().unwrap());
        command.env("TERM", "xterm-256color").stdin(stdio()).stdout(stdio()).stderr(stdio());
        let mut child = command.spawn().unwrap();
        // With these gone, the end of the child is the end of the terminal.
        drop((command, slave));
        let mut master = File::from(master);
        master.write_all(input.as_bytes()).unwrap();
        let reader = tokio::task::spawn_blocking(move || {
            let mut shown = Vec::new();
            // Reading from a terminal that nobody holds any more is an error (EIO): its end.
            let _ = master.read_to_end(&mut shown);
            String::from_utf8_lossy(&shown).into_owned()
        });
        let status = tokio::time::timeout(LIMIT, child.wait()).await.expect("the command ends").unwrap();
        (status.code(), reader.await.unwrap())
    }
}

/// A command under way.
pub struct Running {
    child: Child,
    reader: BufReader<ChildStdout>,
    out: String,
}

impl Running {
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap() as i32), signal).unwrap();
    }

    pub async fn end(self) -> Ended {
        finish(self.child, self.out, Some(self.reader)).await
    }
}

async fn finish(mut child: Child, mut out: String, reader: Option<BufReader<ChildStdout>>) -> Ended {
    let mut reader = reader.unwrap_or_else(|| BufReader::new(child.stdout.take().unwrap()));
    let mut stderr = child.stderr.take().unwrap();
    let mut err = String::new();
    let all = async { tokio::join!(reader.read_to_string(&mut out), stderr.read_to_string(&mut err), child.wait()) };
    let (read_out, read_err, status) = tokio::time::timeout(LIMIT, all).await.expect("the command ends");
    read_out.unwrap();
    read_err.unwrap();
    Ended { code: status.unwrap().code(), out, err }
}
