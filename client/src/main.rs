//! The command `ramtorch`: submits jobs to ramtorchd and shows what becomes of them.
#![forbid(unsafe_code)]

mod cli;
mod commands;
mod output;
mod source;

use clap::Parser;
use cli::Cli;
use output::Printer;
use ramtorch_client::ui::Format;
use ramtorch_client::{ClientError, exit};
use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(usage(&error, asks_for_json(&arguments))),
    };
    let printer = Printer::new(cli.global.format(), cli.global.quiet);
    let code = match run(cli, printer) {
        Ok(code) => code,
        Err(error) => {
            if !error.is_broken_pipe() {
                output::print_error(printer.format, error.exit_code(), &error.to_string());
            }
            error.exit_code()
        }
    };
    ExitCode::from(code)
}

fn run(cli: Cli, printer: Printer) -> Result<u8, ClientError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|source| ClientError::System { what: "start", source })?;
    let result = runtime.block_on(async {
        if cli.command.minds_interrupts() {
            return cli.command.run(&cli.global, printer).await;
        }
        tokio::select! {
            result = cli.command.run(&cli.global, printer) => result,
            _ = tokio::signal::ctrl_c() => Err(ClientError::Interrupted),
        }
    });
    // A thread may still wait for the keyboard: it ends with the process.
    runtime.shutdown_background();
    result
}

/// Shows clap's own message: help and version on the standard output, mistakes on the standard error.
fn usage(error: &clap::Error, json: bool) -> u8 {
    let is_mistake = error.use_stderr();
    if is_mistake && json {
        let message = error.to_string();
        output::print_error(Format::Json, exit::USAGE, message.trim_start_matches("error: ").trim());
    } else {
        // Nobody is left to tell when this fails.
        let _ = error.print();
    }
    if is_mistake { exit::USAGE } else { exit::OK }
}

/// Whether a command line that could not be understood asked for JSON.
fn asks_for_json(arguments: &[OsString]) -> bool {
    arguments.iter().any(|a| a == "--output=json") || arguments.windows(2).any(|w| w[0] == "--output" && w[1] == "json")
}
