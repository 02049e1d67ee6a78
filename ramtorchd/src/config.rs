//! Configuration: a TOML file, flags over it, defaults under it. Everything is checked before anything is opened.

use crate::access::config::{AccessConfig, LimitsConfig, MetricsConfig, PathsConfig, TcpConfig};
use crate::devices::{self, Device, DeviceError, DeviceRequest, Host};
use nix::unistd::{AccessFlags, access, geteuid};
use ramtorch_worker::GpuSeen;
use serde::Deserialize;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The configuration file. Unknown keys are refused.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ConfigFile {
    /// Socket for clients.
    pub socket: Option<PathBuf>,
    /// Where jobs, logs and caches are kept.
    pub state_dir: Option<PathBuf>,
    /// As `--devices`.
    pub devices: Option<String>,
    /// As `--gpus`.
    pub gpus: Option<u32>,
    /// As `--device-memory`.
    pub device_memory_bytes: Option<u64>,
    /// As `--threads`.
    pub threads: Option<usize>,
    /// As `--log-format`.
    pub log_format: Option<LogFormat>,
    /// `[supervision]`
    pub supervision: Supervision,
    /// `[jobs]`
    pub jobs: JobLimits,
    /// `[access]`
    pub access: AccessConfig,
    /// `[limits]`
    pub limits: LimitsConfig,
    /// `[tcp]`
    pub tcp: Option<TcpConfig>,
    /// `[paths]`
    pub paths: PathsConfig,
    /// `[metrics]`
    pub metrics: MetricsConfig,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
    /// For journald: a level before each line, and no time. Chosen by itself where the log goes to the journal.
    Journal,
}

/// `stall_timeout_seconds` where it is not set: before a phase is practised, and from then on.
const STALL_SECONDS: f64 = 300.0;
const PRACTISED_STALL_SECONDS: f64 = 30.0;
/// A phase is practised once each rank has completed it so often.
pub const PRACTISED: u32 = 50;

/// `[supervision]`: deadlines and budgets.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Supervision {
    /// A worker that sends no heartbeat for so long counts as hung.
    pub heartbeat_timeout_seconds: f64,
    /// A worker has so long from its start to its first call.
    pub register_timeout_seconds: f64,
    /// Gangs that may be started again without a newly committed step in between.
    pub restart_budget: u32,
    /// Pause before the second restart in a row; twice as long before each further one. The first is immediate.
    pub restart_backoff_seconds: f64,
    /// After a first sign of failure, wait so long for others: the earliest is named as the root cause.
    pub settle_seconds: f64,
    /// A stop (of a job or of the daemon) is complete after so long, by force where need be.
    pub stop_timeout_seconds: f64,
    /// A rank that sends heartbeats but stays in one phase of one step counts as hung after so long, or after
    /// twenty times the longest that its job has taken for that phase, whichever is more. In a phase that the job
    /// has not completed yet, it has twelve times as long. Where it is not set it is 300, and 30 for a phase that the
    /// job has completed often enough ([`PRACTISED`]) to know how long it takes.
    pub stall_timeout_seconds: Option<f64>,
    /// A preparation that tells of no progress for so long counts as hung.
    pub prepare_timeout_seconds: f64,
    /// A process that outlives SIGKILL for so long is given up, its device quarantined.
    pub kill_timeout_seconds: f64,
}

impl Default for Supervision {
    fn default() -> Self {
        Supervision {
            heartbeat_timeout_seconds: 10.0,
            register_timeout_seconds: 30.0,
            restart_budget: 3,
            restart_backoff_seconds: 1.0,
            settle_seconds: 0.25,
            stop_timeout_seconds: 10.0,
            stall_timeout_seconds: None,
            prepare_timeout_seconds: 3600.0,
            kill_timeout_seconds: 30.0,
        }
    }
}

/// `[jobs]`: limits.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobLimits {
    /// Jobs that may wait or run at once.
    pub active_max: usize,
    /// Those of one user; half of them where it is not set.
    pub active_max_per_user: Option<usize>,
    /// Ended jobs that are remembered; the oldest are forgotten with their logs.
    pub ended_max: usize,
    /// Steps of metrics kept in memory for each active job.
    pub metrics_history: usize,
    /// Generate, eval, export, inspect and plan calls at once.
    pub one_off_max: usize,
    /// Those of one user; half of them where it is not set.
    pub one_off_max_per_user: Option<usize>,
    /// Which parameter stores of unfinished jobs stay in memory when the daemon is stopped.
    pub keep_segments_on_stop: KeepSegments,
}

/// `keep_segments_on_stop`: which parameter stores the next daemon finds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "KeepWord")]
pub enum KeepSegments {
    /// `true`: all of them.
    Always,
    /// `"unsaved"`: those that hold steps which no checkpoint has; a job whose checkpoint is of its last step goes on from
    /// that.
    #[default]
    Unsaved,
    /// `false`: none; steps since the last checkpoint are lost, and the log says which.
    Never,
}

/// As it is written.
#[derive(Deserialize)]
#[serde(untagged)]
enum KeepWord {
    Flag(bool),
    Word(String),
}

impl TryFrom<KeepWord> for KeepSegments {
    type Error = String;
    fn try_from(word: KeepWord) -> Result<KeepSegments, String> {
        match word {
            KeepWord::Flag(true) => Ok(KeepSegments::Always),
            KeepWord::Flag(false) => Ok(KeepSegments::Never),
            KeepWord::Word(word) if word == "unsaved" => Ok(KeepSegments::Unsaved),
            KeepWord::Word(word) => Err(format!("keep_segments_on_stop is true, false or \"unsaved\", not {word:?}")),
        }
    }
}

impl Default for JobLimits {
    fn default() -> Self {
        JobLimits {
            active_max: 1000,
            active_max_per_user: None,
            ended_max: 1000,
            metrics_history: 10_000,
            one_off_max: 8,
            one_off_max_per_user: None,
            keep_segments_on_stop: KeepSegments::default(),
        }
    }
}

impl JobLimits {
    /// Jobs of one user who is no administrator that may wait or run at once.
    pub fn active_share(&self) -> usize {
        self.active_max_per_user.unwrap_or(self.active_max.div_ceil(2))
    }

    /// Calls that one such user may have served in processes of their own at once.
    pub fn one_off_share(&self) -> usize {
        self.one_off_max_per_user.unwrap_or(self.one_off_max.div_ceil(2))
    }
}

/// Flags of the command line; each one set overrides the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Overrides {
    /// `--socket` or RAMTORCH_SOCKET.
    pub socket: Option<PathBuf>,
    /// `--state-dir`
    pub state_dir: Option<PathBuf>,
    /// `--devices`, `--gpus`, `--device-memory`, `--threads`.
    pub devices: DeviceRequest,
}

/// What a daemon runs with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Socket for clients.
    pub socket: PathBuf,
    /// State folder.
    pub state_dir: PathBuf,
    /// Folder of token caches.
    pub cache_dir: PathBuf,
    /// Devices, at least one.
    pub devices: Vec<Device>,
    /// One line about them.
    pub devices_note: String,
    /// What is started as a worker.
    pub worker: WorkerCommand,
    /// Deadlines.
    pub supervision: Supervision,
    /// Limits.
    pub jobs: JobLimits,
    /// Who may call, and how much.
    pub service: Service,
}

/// Ways in, and what may be done there.
#[derive(Debug, Clone, Default)]
pub struct Service {
    /// Users.
    pub access: AccessConfig,
    /// What one of them may ask for.
    pub limits: LimitsConfig,
    /// TCP, if any.
    pub tcp: Option<TcpConfig>,
    /// Folders.
    pub paths: PathsConfig,
    /// Prometheus.
    pub metrics: MetricsConfig,
}

/// The program that is started as a worker process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerCommand {
    /// Executable.
    pub exe: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

impl Default for WorkerCommand {
    /// This program itself: no version skew, and nothing to find on a path, even after an upgrade replaced the file.
    fn default() -> Self {
        WorkerCommand { exe: "/proc/self/exe".into(), args: vec!["worker".into()] }
    }
}

/// What is wrong with the configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {}: {source}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown key, a wrong type.
    #[error("{}: {detail}", .path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// The parser's message, with line and column.
        detail: String,
    },
    /// A value that cannot work.
    #[error("configuration: `{key}`: {detail}")]
    Value {
        /// Dotted key.
        key: &'static str,
        /// What is wrong.
        detail: String,
    },
    /// Devices.
    #[error(transparent)]
    Devices(#[from] DeviceError),
    /// Nowhere to keep state.
    #[error("give --state-dir: neither XDG_STATE_HOME nor HOME is set")]
    NoHome,
    /// The current folder is gone.
    #[error("cannot find the current folder: {0}")]
    CurrentDir(std::io::Error),
}

impl ConfigError {
    /// Exit code of a daemon that ends with this.
    pub fn exit_code(&self) -> u8 {
        match self {
            ConfigError::Devices(e) if e.is_shortage() => ramtorch_client::exit::RESOURCES,
            _ => ramtorch_client::exit::USAGE,
        }
    }
}

impl ConfigFile {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// The file is unreadable, malformed, or has a key or value that is not allowed.
    pub fn read(path: &Path) -> Result<ConfigFile, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.into(), source })?;
        let file: ConfigFile =
            toml::from_str(&text).map_err(|e| ConfigError::Parse { path: path.into(), detail: e.to_string().trim_end().into() })?;
        file.check()?;
        Ok(file)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let s = &self.supervision;
        // Workers send a heartbeat every half second; a limit close to that would kill healthy ones.
        let ranges = [
            ("supervision.heartbeat_timeout_seconds", s.heartbeat_timeout_seconds, 2.0),
            ("supervision.register_timeout_seconds", s.register_timeout_seconds, 1.0),
            ("supervision.restart_backoff_seconds", s.restart_backoff_seconds, 0.0),
            ("supervision.settle_seconds", s.settle_seconds, 0.0),
            ("supervision.stop_timeout_seconds", s.stop_timeout_seconds, 1.0),
            ("supervision.stall_timeout_seconds", s.stall_timeout_seconds.unwrap_or(STALL_SECONDS), 1.0),
            ("supervision.prepare_timeout_seconds", s.prepare_timeout_seconds, 1.0),
            ("supervision.kill_timeout_seconds", s.kill_timeout_seconds, 1.0),
        ];
        for (key, value, least) in ranges {
            if !(value >= least && value <= 86_400.0) {
                return Err(ConfigError::Value { key, detail: format!("{value} is not between {least} and 86400 seconds") });
            }
        }
        let j = &self.jobs;
        let counts = [
            ("jobs.active_max", j.active_max),
            ("jobs.active_max_per_user", j.active_share()),
            ("jobs.metrics_history", j.metrics_history),
            ("jobs.one_off_max", j.one_off_max),
            ("jobs.one_off_max_per_user", j.one_off_share()),
        ];
        for (key, value) in counts {
            if value == 0 {
                return Err(ConfigError::Value { key, detail: "must be at least 1".into() });
            }
        }
        if self.device_memory_bytes == Some(0) {
            return Err(ConfigError::Value { key: "device_memory_bytes", detail: "must be more than 0".into() });
        }
        self.limits.check()?;
        self.paths.check()?;
        self.tcp.as_ref().map_or(Ok(()), TcpConfig::check)
    }

    /// Puts flags over the file and defaults under it.
    ///
    /// # Errors
    /// Devices that this machine does not have, or no place for the state.
    pub fn resolve(
        self,
        flags: Overrides,
        host: &Host,
        ask_gpus: impl FnOnce() -> Result<Vec<GpuSeen>, String>,
    ) -> Result<Settings, ConfigError> {
        let chosen_by_flag = flags.devices.devices.is_some() || flags.devices.gpus.is_some();
        let request = DeviceRequest {
            devices: flags.devices.devices.or(if chosen_by_flag { None } else { self.devices }),
            gpus: flags.devices.gpus.or(if chosen_by_flag { None } else { self.gpus }),
            memory_bytes: flags.devices.memory_bytes.or(self.device_memory_bytes),
            threads: flags.devices.threads.or(self.threads),
            share_gpus: flags.devices.share_gpus,
        };
        let inventory = devices::choose(&request, host, ask_gpus)?;
        let absolute = |p: PathBuf| std::path::absolute(p).map_err(ConfigError::CurrentDir);
        let state_dir = absolute(match flags.state_dir.or(self.state_dir) {
            Some(dir) => dir,
            None => default_state_dir().ok_or(ConfigError::NoHome)?,
        })?;
        let socket = absolute(flags.socket.or(self.socket).unwrap_or_else(|| default_socket(&state_dir)))?;
        Ok(Settings {
            socket,
            cache_dir: state_dir.join("cache"),
            state_dir,
            devices: inventory.devices,
            devices_note: inventory.note,
            worker: WorkerCommand::default(),
            supervision: self.supervision,
            jobs: self.jobs,
            service: Service { access: self.access, limits: self.limits, tcp: self.tcp, paths: self.paths, metrics: self.metrics },
        })
    }
}

/// /var/lib/ramtorch for root, else $XDG_STATE_HOME/ramtorch or ~/.local/state/ramtorch.
pub fn default_state_dir() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some("/var/lib/ramtorch".into());
    }
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let base = absolute("XDG_STATE_HOME").or_else(|| absolute("HOME").map(|h| h.join(".local/state")))?;
    Some(base.join("ramtorch"))
}

/// /run/ramtorch for root where /run can be written, $XDG_RUNTIME_DIR/ramtorch for others, else the state folder.
fn default_socket(state_dir: &Path) -> PathBuf {
    let runtime = match geteuid().is_root() {
        true => Some(PathBuf::from("/run")).filter(|p| access(p.as_path(), AccessFlags::W_OK).is_ok()),
        false => std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|p| p.is_absolute()),
    };
    match runtime {
        Some(dir) => dir.join("ramtorch/ramtorchd.sock"),
        None => state_dir.join("ramtorchd.sock"),
    }
}

impl Supervision {
    /// `heartbeat_timeout_seconds`
    pub fn heartbeat_timeout(&self) -> Duration {
        seconds(self.heartbeat_timeout_seconds)
    }
    /// `register_timeout_seconds`
    pub fn register_timeout(&self) -> Duration {
        seconds(self.register_timeout_seconds)
    }
    /// `settle_seconds`
    pub fn settle(&self) -> Duration {
        seconds(self.settle_seconds)
    }
    /// `stop_timeout_seconds`
    pub fn stop_timeout(&self) -> Duration {
        seconds(self.stop_timeout_seconds)
    }
    /// `kill_timeout_seconds`
    pub fn kill_timeout(&self) -> Duration {
        seconds(self.kill_timeout_seconds)
    }
    /// `prepare_timeout_seconds`
    pub fn prepare_timeout(&self) -> Duration {
        seconds(self.prepare_timeout_seconds)
    }
    /// How long a rank may stay in a phase that took `longest` at most, if it was ever completed. `practised`: it was, at least
    /// [`PRACTISED`] times by each rank.
    pub fn stall_timeout(&self, longest: Option<Duration>, practised: bool) -> Duration {
        let default = if practised { PRACTISED_STALL_SECONDS } else { STALL_SECONDS };
        let floor = seconds(self.stall_timeout_seconds.unwrap_or(default));
        longest.map_or(floor.saturating_mul(12), |longest| floor.max(longest.saturating_mul(20)))
    }
    /// Pause before restart number `attempt` (from 1) in a row.
    pub fn backoff(&self, attempt: u32) -> Duration {
        match attempt {
            0 | 1 => Duration::ZERO,
            n => seconds((self.restart_backoff_seconds * f64::from(1u32 << (n - 2).min(10))).min(300.0)),
        }
    }
}

fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ConfigFile, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        ConfigFile::read(file.path())
    }

    fn host() -> Host {
        Host { gpus: vec![], cores: 4, memory_available: 8 << 30 }
    }

    #[test]
    fn flags_override_the_file() {
        let file = read("state_dir = \"/s\"\ndevices = \"cpu:4\"\nthreads = 2\n[supervision]\nrestart_budget = 7\n").unwrap();
        let s = file.clone().resolve(Overrides::default(), &host(), || Err("no GPU".into())).unwrap();
        assert_eq!((s.devices.len(), s.state_dir.as_path(), s.supervision.restart_budget), (4, Path::new("/s"), 7));
        let flags = Overrides {
            socket: Some("/x/y.sock".into()),
            devices: DeviceRequest { gpus: Some(0), ..Default::default() },
            ..Default::default()
        };
        let s = file.resolve(flags, &host(), || Err("no GPU".into())).unwrap();
        assert_eq!((s.devices.len(), s.devices[0].spec.threads, s.socket.as_path()), (1, 2, Path::new("/x/y.sock")));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_refused() {
        for (text, what) in [
            ("sokcet = \"/a\"", "sokcet"),
            ("[supervision]\nheartbeat = 1", "heartbeat"),
            ("[supervision]\nheartbeat_timeout_seconds = 0.1", "supervision.heartbeat_timeout_seconds"),
            ("[supervision]\nstop_timeout_seconds = nan", "supervision.stop_timeout_seconds"),
            ("[jobs]\nactive_max = 0", "jobs.active_max"),
            ("[jobs]\nactive_max_per_user = 0", "jobs.active_max_per_user"),
            ("[jobs]\none_off_max_per_user = 0", "jobs.one_off_max_per_user"),
            ("threads = \"two\"", "threads"),
        ] {
            let e = read(text).unwrap_err().to_string();
            assert!(e.contains(what), "{text}: {e}");
        }
        assert!(matches!(ConfigFile::read(Path::new("/no/such/file")), Err(ConfigError::Read { .. })));
    }

    #[test]
    fn a_phase_may_take_as_long_as_it_has_before_and_some() {
        let limits = |s: &Supervision, practised| {
            [None, Some(1), Some(5), Some(60)].map(|t| s.stall_timeout(t.map(Duration::from_secs), practised).as_secs())
        };
        let set = Supervision { stall_timeout_seconds: Some(100.0), ..Default::default() };
        assert_eq!([false, true].map(|p| limits(&set, p)), [[1200, 100, 100, 1200]; 2], "what the user set is the least");
        let unset = Supervision::default();
        assert_eq!(limits(&unset, false), [3600, 300, 300, 1200]);
        assert_eq!(limits(&unset, true)[1..], [30, 100, 1200], "a phase that was completed often is known");
    }

    #[test]
    fn a_user_has_half_unless_it_says_otherwise() {
        let shares = |text: &str| read(text).map(|f| (f.jobs.active_share(), f.jobs.one_off_share())).unwrap();
        assert_eq!(shares(""), (500, 4));
        assert_eq!(shares("[jobs]\nactive_max = 1\none_off_max = 3"), (1, 2));
        assert_eq!(shares("[jobs]\nactive_max_per_user = 7\none_off_max_per_user = 1"), (7, 1));
    }

    #[test]
    fn which_stores_are_kept_is_a_flag_or_a_word() {
        let keep = |value: &str| read(&format!("[jobs]\nkeep_segments_on_stop = {value}\n")).map(|f| f.jobs.keep_segments_on_stop);
        assert_eq!(keep("true").unwrap(), KeepSegments::Always);
        assert_eq!(keep("false").unwrap(), KeepSegments::Never);
        assert_eq!(keep("\"unsaved\"").unwrap(), KeepSegments::Unsaved);
        assert_eq!(read("").unwrap().jobs.keep_segments_on_stop, KeepSegments::Unsaved);
        assert!(keep("\"some\"").unwrap_err().to_string().contains("unsaved"));
    }

    #[test]
    fn pauses_between_restarts_grow_and_stay_bounded() {
        let s = Supervision { restart_backoff_seconds: 1.0, ..Default::default() };
        let pauses: Vec<u64> = (1..=4).map(|n| s.backoff(n).as_secs()).collect();
        assert_eq!(pauses, [0, 1, 2, 4]);
        assert_eq!(s.backoff(u32::MAX).as_secs(), 300);
    }
}
