//! The subcommands, one a file.

mod cancel;
mod checkpoint;
mod completion;
mod describe;
mod doctor;
mod eval;
mod export;
mod generate;
mod inspect;
mod list;
mod logs;
mod node;
mod plan;
mod stop;
mod submit;
mod trace;
mod watch;

use crate::cli::Global;
use crate::output::Printer;
use clap::{Subcommand, ValueEnum};
use ramtorch_client::ClientError;

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Submit(submit::Submit),
    List(list::List),
    Describe(describe::Describe),
    Watch(watch::Watch),
    Logs(logs::Logs),
    Cancel(cancel::Cancel),
    Checkpoint(checkpoint::Checkpoint),
    Trace(trace::Trace),
    Plan(plan::Plan),
    Inspect(inspect::Inspect),
    Export(export::Export),
    Eval(eval::Eval),
    Generate(generate::Generate),
    Node(node::Node),
    Doctor(doctor::Doctor),
    Stop(stop::Stop),
    Completion(completion::Completion),
}

impl Command {
    /// Whether the command itself acts on Ctrl-C.
    pub fn minds_interrupts(&self) -> bool {
        matches!(self, Command::Watch(_)) || matches!(self, Command::Submit(submit) if submit.watch)
    }

    /// Runs the command to its exit code.
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        match self {
            Command::Submit(command) => command.run(global, printer).await,
            Command::List(command) => command.run(global, printer).await,
            Command::Describe(command) => command.run(global, printer).await,
            Command::Watch(command) => command.run(global, printer).await,
            Command::Logs(command) => command.run(global, printer).await,
            Command::Cancel(command) => command.run(global, printer).await,
            Command::Checkpoint(command) => command.run(global, printer).await,
            Command::Trace(command) => command.run(global, printer).await,
            Command::Plan(command) => command.run(global, printer).await,
            Command::Inspect(command) => command.run(global, printer).await,
            Command::Export(command) => command.run(global, printer).await,
            Command::Eval(command) => command.run(global, printer).await,
            Command::Generate(command) => command.run(global, printer).await,
            Command::Node(command) => command.run(global, printer).await,
            Command::Doctor(command) => command.run(global, printer).await,
            Command::Stop(command) => command.run(global, printer).await,
            Command::Completion(command) => command.run(printer),
        }
    }
}

/// Number format of arithmetic or storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    Fp32,
    Bf16,
}

/// Its name in the protocol; empty where the daemon chooses.
fn precision_name(precision: Option<Precision>) -> String {
    match precision {
        None => "",
        Some(Precision::Fp32) => "fp32",
        Some(Precision::Bf16) => "bf16",
    }
    .to_owned()
}
