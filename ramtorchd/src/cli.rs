//! The command line.

use crate::config::{ConfigFile, KeepSegments, LogFormat, Overrides, Settings};
use crate::daemon::Daemon;
use crate::devices::{DeviceRequest, Host, SHARE_GPUS, parse_bytes};
use crate::gpus;
use crate::journal;
use crate::notify::notify;
use crate::run;
use crate::supervisor::outside::LinkedEngine;
use crate::worker;
use clap::{Args, Parser, Subcommand};
use ramtorch_client::exit;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// Trains and runs language models whose parameters live in shared RAM: the daemon.
#[derive(Debug, Parser)]
#[command(name = "ramtorchd", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground, until SIGTERM or Ctrl-C
    Start(Start),
    /// Run one job from start to end, in the foreground, with a private daemon
    Run(Run),
    /// What the daemon starts as its workers
    #[command(hide = true)]
    Worker,
    /// What the daemon asks for the memory of GPUs
    #[command(hide = true)]
    Gpus,
}

/// Devices and log, common to `start` and `run`.
#[derive(Debug, Args)]
struct Common {
    /// Configuration file (TOML); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for jobs, logs and caches
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Use the first N GPUs (0: the CPU)
    #[arg(long, value_name = "N")]
    gpus: Option<u32>,
    /// Devices: `cpu`, `cpu:N` (N ranks that share the cores), or a list such as `cuda:0,cuda:1`
    #[arg(long, value_name = "LIST", conflicts_with = "gpus")]
    devices: Option<String>,
    /// Memory of each device that a plan may use, e.g. 8GiB (CPU devices: by default half of the free memory, shared)
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    device_memory: Option<u64>,
    /// CPU threads for all devices together (default: all cores)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// How log lines are written
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Args)]
struct Start {
    /// Socket for clients
    #[arg(long, value_name = "PATH", env = ramtorch_client::SOCKET_VARIABLE)]
    socket: Option<PathBuf>,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Args)]
struct Run {
    /// Job file (TOML)
    #[arg(value_name = "JOB.toml")]
    job: PathBuf,
    #[command(flatten)]
    common: Common,
    /// Print nothing but errors
    #[arg(short, long)]
    quiet: bool,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// Write a timeline of some steps, for Perfetto (ui.perfetto.dev)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Steps of the timeline, e.g. 4..5 for the fourth and the fifth
    #[arg(long, value_name = "FIRST..LAST", requires = "trace", default_value = "2..3", value_parser = parse_steps)]
    trace_steps: (u64, u64),
}

/// `FIRST..LAST` as the first step and how many.
fn parse_steps(text: &str) -> Result<(u64, u64), String> {
    let number = |s: &str| s.trim().parse::<u64>().ok().filter(|n| *n > 0);
    let (first, last) = match text.split_once("..") {
        Some((a, b)) => (number(a), number(b)),
        None => (number(text), number(text)),
    };
    let most = ramtorch_client::trace::STEPS_MAX;
    match (first, last) {
        (Some(a), Some(b)) if a <= b && b - a < most => Ok((a, b - a + 1)),
        (Some(a), Some(b)) if a <= b => Err(format!("at most {most} steps can be recorded")),
        _ => Err("expected FIRST..LAST, steps from 1 on".into()),
    }
}

/// Signals closer together than this count as one.
const SAME_SIGNAL: Duration = Duration::from_millis(500);

/// Runs the program; the exit codes are explained in docs/exit-codes.md.
pub fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Worker => {
            log(LogFormat::Text, "info");
            worker::main()
        }
        Command::Gpus => gpus::main(),
        Command::Start(start) => finish(start_command(start)),
        Command::Run(run) => finish(run_command(run)),
    }
}

fn finish(result: Result<u8, (u8, String)>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err((code, text)) => {
            eprintln!("ramtorchd: {text}");
            ExitCode::from(code)
        }
    }
}

impl Common {
    fn file(&self) -> Result<ConfigFile, (u8, String)> {
        match &self.config {
            Some(path) => ConfigFile::read(path).map_err(|e| (exit::USAGE, e.to_string())),
            None => Ok(ConfigFile::default()),
        }
    }

    fn resolve(self, file: ConfigFile, socket: Option<PathBuf>) -> Result<Settings, (u8, String)> {
        let share_gpus = std::env::var_os(SHARE_GPUS).is_some_and(|v| v == "1");
        let devices =
            DeviceRequest { devices: self.devices, gpus: self.gpus, memory_bytes: self.device_memory, threads: self.threads, share_gpus };
        let flags = Overrides { socket, state_dir: self.state_dir, devices };
        file.resolve(flags, &Host::probe(), gpus::seen).map_err(|e| (e.exit_code(), e.to_string()))
    }
}

fn start_command(start: Start) -> Result<u8, (u8, String)> {
    let file = start.common.file()?;
    log(start.common.log_format.or(file.log_format).unwrap_or_else(journal::format_of_stderr), "info");
    let socket = start.socket.filter(|s| !s.as_os_str().is_empty());
    let settings = start.common.resolve(file, socket)?;
    runtime()?.block_on(async {
        // Before anything is made: a signal from here on is heard, and nothing is left behind.
        let failed = |e: std::io::Error| (exit::INTERNAL, format!("cannot watch for signals: {e}"));
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(failed)?;
        // To be followed by another daemon, of a newer version say.
        let mut upgrade = signal(SignalKind::user_defined2()).map_err(failed)?;
        run::sweep_private();
        let daemon = Daemon::start(settings, Arc::new(LinkedEngine)).await.map_err(|e| (e.exit_code(), e.to_string()))?;
        let stopper = daemon.stopper();
        notify("READY=1");
        let mut finished = std::pin::pin!(daemon.finish());
        let mut last: Option<Instant> = None;
        loop {
            tokio::select! {
                left = &mut finished => {
                    left.iter().for_each(|l| tracing::error!("{l}"));
                    tracing::info!("stopped");
                    return Ok(if left.is_empty() { exit::OK } else { exit::INTERNAL });
                }
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
                _ = hangup.recv() => {}
                _ = upgrade.recv() => {
                    notify("STOPPING=1");
                    stopper.stop_keeping().await;
                    last = Some(Instant::now());
                    continue;
                }
            }
            // timeout(1) and terminals signal a process and its group: that is one signal, not an impatient second.
            if last.replace(Instant::now()).is_none_or(|at| at.elapsed() > SAME_SIGNAL) {
                notify("STOPPING=1");
                stopper.stop().await;
            }
        }
    })
}

fn run_command(run: Run) -> Result<u8, (u8, String)> {
    let file = run.common.file()?;
    // The progress of the job is on the terminal; the daemon says only what is wrong.
    log(run.common.log_format.or(file.log_format).unwrap_or_default(), "warn");
    let keep = run.common.state_dir.clone();
    let passing = keep.is_none();
    let private = run::PrivateDir::new(keep).map_err(|e| (exit::OUTPUT, e.to_string()))?;
    let mut common = run.common;
    common.state_dir = Some(private.state_dir().to_path_buf());
    let mut settings = common.resolve(file, Some(private.socket()))?;
    settings.cache_dir = private.cache_dir(&settings.cache_dir);
    if passing {
        // Nobody comes after this daemon in a folder that goes with it.
        settings.jobs.keep_segments_on_stop = KeepSegments::Never;
    }
    let (first_step, steps) = run.trace_steps;
    let trace = run.trace.map(|path| run::TraceOptions { path, first_step, steps });
    if let Some(t) = &trace {
        // Told before anything is computed.
        ramtorch_client::trace::check_target(&t.path, true).map_err(|e| (e.exit_code(), e.to_string()))?;
    }
    let options = run::Options { job: run.job, quiet: run.quiet, json: run.json, trace };
    let runtime = runtime()?;
    let result = runtime.block_on(run::run(settings, options, Arc::new(LinkedEngine)));
    // Whatever still blocks (an unlink, a read) does not hold up the end.
    runtime.shutdown_timeout(Duration::from_secs(1));
    drop(private);
    result
}

fn runtime() -> Result<tokio::runtime::Runtime, (u8, String)> {
    let built = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    built.map_err(|e| (exit::INTERNAL, format!("cannot start the runtime: {e}")))
}

/// Log lines go to stderr; RAMTORCH_LOG chooses what is told, as in `RAMTORCH_LOG=ramtorchd=debug`.
fn log(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_env("RAMTORCH_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
    // A subscriber that is there already (in a test) is as good.
    let _ = match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Journal => builder.with_ansi(false).event_format(journal::Lines).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        assert!(Cli::try_parse_from(["ramtorchd", "start", "--gpus", "2", "--devices", "cpu"]).is_err());
        assert!(Cli::try_parse_from(["ramtorchd", "run"]).is_err());
        let Command::Start(start) = Cli::try_parse_from(["ramtorchd", "start", "--device-memory", "2GiB"]).unwrap().command else {
            panic!()
        };
        assert_eq!(start.common.device_memory, Some(2 << 30));
        let Command::Run(run) = Cli::try_parse_from(["ramtorchd", "run", "j", "--trace", "t", "--trace-steps", "4..5"]).unwrap().command
        else {
            panic!()
        };
        assert_eq!(run.trace_steps, (4, 2));
    }

    #[test]
    fn steps_of_a_trace_are_checked() {
        assert_eq!((parse_steps("4..5"), parse_steps("7"), parse_steps("1..20")), (Ok((4, 2)), Ok((7, 1)), Ok((1, 20))));
        for wrong in ["", "0..1", "5..4", "1..21", "a..b", "1..", "..", "-1..2"] {
            assert!(parse_steps(wrong).is_err(), "{wrong}");
        }
    }
}
