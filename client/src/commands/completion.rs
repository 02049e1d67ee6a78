//! `ramtorch completion`

use crate::cli::Cli;
use crate::output::Printer;
use clap::{Args, CommandFactory, ValueEnum};
use clap_complete::{Shell, generate};
use ramtorch_client::{ClientError, exit};

/// Print a shell's completion script
#[derive(Debug, Args)]
pub(crate) struct Completion {
    #[arg(value_enum)]
    shell: Supported,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Supported {
    Bash,
    Zsh,
    Fish,
}

impl Completion {
    pub fn run(&self, printer: Printer) -> Result<u8, ClientError> {
        let shell = match self.shell {
            Supported::Bash => Shell::Bash,
            Supported::Zsh => Shell::Zsh,
            Supported::Fish => Shell::Fish,
        };
        // Into memory first: the generator panics where its output cannot be written.
        let mut script = Vec::new();
        generate(shell, &mut Cli::command(), "ramtorch", &mut script);
        printer.raw(&script)?;
        Ok(exit::OK)
    }
}
