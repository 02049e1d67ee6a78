//! The worker process: what the daemon starts, one for each device of a gang, and for every other piece of work that
//! opens a user's file.
//!
//! ```text
//!  main thread     arm PDEATHSIG ─ connect ─ register ─ assignment ─ wait for the engine ─ result, flushed ─ exit
//!  link thread     heartbeats every 0.5 s, reports up, commands down          (`link`)
//!  engine thread   the work; panics become errors
//! ```

mod link;
mod outputs;

pub use link::{Link, LinkError};

use crate::process;
use ramtorch_failpoint::{Point, hit};
use ramtorch_worker::{Assignment, Control, EngineError, Task, TrainOutcome};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Stack of the engine's thread. Only what is touched takes memory.
const STACK_BYTES: usize = 256 << 20;
/// The last words may take so long.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

/// What a worker does: [`ramtorch_worker::run`], or a stand-in in tests.
pub type Engine = fn(&Assignment, &dyn Control) -> Result<serde_json::Value, EngineError>;

/// Place and text of the last panic, for the report.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Runs a worker process with the engine that is linked in.
pub fn main() -> ExitCode {
    // May start the program again, in this very process; so it comes before everything else.
    if let Err(e) = ramtorch_worker::prepare_process() {
        eprintln!("ramtorchd worker: {e}");
        return ExitCode::from(e.kind.exit_code());
    }
    // Before there are threads: the confinement is inherited, not spread.
    if let Err(e) = crate::access::sandbox::enter_from_environment() {
        eprintln!("ramtorchd worker: {e}");
        return ExitCode::from(ramtorch_client::exit::INTERNAL);
    }
    run(ramtorch_worker::run)
}

/// Runs a worker process.
pub fn run(engine: Engine) -> ExitCode {
    match serve(engine) {
        Ok(code) => ExitCode::from(code),
        Err(text) => {
            eprintln!("ramtorchd worker: {text}");
            ExitCode::from(ramtorch_client::exit::INTERNAL)
        }
    }
}

fn serve(engine: Engine) -> Result<u8, String> {
    die_with_parent()?;
    offer_to_the_oom_killer();
    hit(Point::RankBorn);
    let socket = PathBuf::from(variable(process::SOCKET_VARIABLE)?);
    let (link, assignment) = Link::connect(socket, variable(process::TOKEN_VARIABLE)?).map_err(|e| e.to_string())?;
    keep_panics();
    let rank_of_gang = matches!(assignment.task, Task::Train { .. });
    if rank_of_gang {
        hit(Point::RankRegistered);
    }
    let mut assignment = assignment;
    let settled = outputs::settle(&mut assignment.task, &link.control());
    let Assignment { job_id, generation, rank, world_size, device, task } = &assignment;
    tracing::info!("{} for job {job_id}: rank {rank} of {world_size} on {device}, generation {generation}", task_name(task));
    let begun = Instant::now();
    let result = settled.and_then(|()| work(engine, assignment, &link));
    tracing::info!("{} after {:.1} s", if result.is_ok() { "done" } else { "failed" }, begun.elapsed().as_secs_f64());
    let code = match &result {
        Ok(_) => 0,
        Err(e) => {
            eprintln!("{e}");
            e.kind.exit_code()
        }
    };
    if !link.finish(result, FLUSH_LIMIT) {
        eprintln!("ramtorchd worker: the daemon did not take the result within {} s", FLUSH_LIMIT.as_secs());
    }
    if rank_of_gang {
        hit(Point::RankDone);
    }
    Ok(code)
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|_| format!("{name} is not set; this command is started by ramtorchd, not by hand"))
}

/// Has the kernel kill this process when the thread that started it dies, however it dies.
pub(crate) fn die_with_parent() -> Result<(), String> {
    let parent: i32 = variable(process::PARENT_VARIABLE)?.parse().map_err(|_| format!("{} is no pid", process::PARENT_VARIABLE))?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(|e| format!("prctl(PR_SET_PDEATHSIG): {e}"))?;
    // It may have died before: then this process belongs to somebody else by now.
    let now = nix::unistd::getppid().as_raw();
    if now != parent { Err(format!("started by {parent}, but the parent is {now}: the daemon is gone")) } else { Ok(()) }
}

/// When memory runs out, the kernel should end a worker, which is started again, rather than the daemon. A service may have
/// been made unlikely to be chosen; a worker gives that up, which needs no privilege.
fn offer_to_the_oom_killer() {
    const SCORE: &str = "/proc/self/oom_score_adj";
    let inherited = std::fs::read_to_string(SCORE).ok().and_then(|t| t.trim().parse::<i32>().ok());
    if inherited.is_some_and(|score| score < 0) {
        if let Err(e) = std::fs::write(SCORE, "0") {
            tracing::warn!("cannot raise {SCORE}: {e}");
        }
    }
}

/// Runs the engine on a thread of its own and waits for it.
fn work(engine: Engine, assignment: Assignment, link: &Link) -> Result<serde_json::Value, EngineError> {
    std::thread::scope(|scope| {
        let control = link.control();
        let thread = std::thread::Builder::new().name("engine".into()).stack_size(STACK_BYTES);
        let started = thread.spawn_scoped(scope, move || engine(&assignment, &control));
        match started.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => {
                let text = PANIC.lock().unwrap_or_else(PoisonError::into_inner).clone();
                Err(EngineError::internal(format!("a defect in ramtorch: {text}")))
            }
            Err(e) => Err(EngineError::internal(format!("cannot start the engine's thread: {e}"))),
        }
    })
}

/// Remembers the text of panics, besides printing it.
fn keep_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let text = info.payload_as_str().unwrap_or("panic");
        let place = info.location().map(|l| format!(" at {}:{}", l.file(), l.line())).unwrap_or_default();
        *PANIC.lock().unwrap_or_else(PoisonError::into_inner) = format!("{text}{place}");
        print(info);
    }));
}

/// Whether a result says that the work ended early, by command.
fn was_stopped(result: &serde_json::Value) -> bool {
    serde_json::from_value::<TrainOutcome>(result.clone()).is_ok_and(|o| o.stopped)
}

/// Name of a task, for logs.
pub fn task_name(task: &Task) -> &'static str {
    match task {
        Task::Prepare { .. } => "prepare",
        Task::Train { .. } => "train",
        Task::Generate { .. } => "generate",
        Task::Eval { .. } => "eval",
        Task::Export { .. } => "export",
        Task::Inspect { .. } => "inspect",
    }
}
