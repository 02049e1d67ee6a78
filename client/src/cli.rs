//! The command line.

use crate::commands::Command;
use clap::{Args, Parser, ValueEnum};
use ramtorch_client::ui::Format;
use ramtorch_client::{Client, ClientError, Deadlines, Endpoint, TcpEndpoint};
use std::path::PathBuf;
use std::time::Duration;

const EXIT_CODES: &str = "\
Exit codes:
  0    done                          100  the job failed
  1    internal error                101  the job is not finished (detached)
  2    wrong usage                   102  no such job
  10   job file wrong                103  the job was cancelled
  11   model or data wrong           130  interrupted
  12   not enough memory or devices
  13   output cannot be written
  14   daemon not reachable

A failed job's own code, 10 to 13, stands in for 100 where it is known.";

/// Train and run language models that do not fit in GPU memory.
#[derive(Debug, Parser)]
#[command(name = "ramtorch", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command takes.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Socket of ramtorchd [default: $RAMTORCH_SOCKET, else $XDG_RUNTIME_DIR/ramtorch/ramtorchd.sock, else the same below /run and /var/lib]
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    socket: Option<PathBuf>,

    /// Daemon on another machine, as HOST:PORT; needs the three files below
    #[arg(long, global = true, value_name = "HOST:PORT", env = ramtorch_client::ADDRESS_VARIABLE, conflicts_with = "socket", help_heading = "Global options")]
    address: Option<String>,

    /// Certificates (PEM) of those who issue the daemon's certificate
    #[arg(long, global = true, value_name = "FILE", env = "RAMTORCH_TLS_CA", help_heading = "Global options")]
    tls_ca: Option<PathBuf>,

    /// Certificate to show (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "RAMTORCH_TLS_CERT", help_heading = "Global options")]
    tls_cert: Option<PathBuf>,

    /// Its key (PEM)
    #[arg(long, global = true, value_name = "FILE", env = "RAMTORCH_TLS_KEY", help_heading = "Global options")]
    tls_key: Option<PathBuf>,

    /// Name in the daemon's certificate [default: HOST]
    #[arg(long, global = true, value_name = "NAME", env = "RAMTORCH_TLS_NAME", help_heading = "Global options")]
    tls_name: Option<String>,

    /// How results are written; `json` is one object a line
    #[arg(long, global = true, value_name = "FORMAT", value_enum, default_value_t = OutputFormat::Human, help_heading = "Global options")]
    output: OutputFormat,

    /// No progress and no confirmations; `submit` and `list` print ids alone
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub quiet: bool,

    /// Seconds to wait for answers that need no computing
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400), help_heading = "Global options")]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OutputFormat {
    Human,
    Json,
}

impl Global {
    pub fn format(&self) -> Format {
        match self.output {
            OutputFormat::Human => Format::Human,
            OutputFormat::Json => Format::Json,
        }
    }

    /// The daemon that the options name.
    pub fn endpoint(&self) -> Result<Endpoint, ClientError> {
        if let Some(path) = &self.socket {
            return Ok(Endpoint::unix(path.clone()));
        }
        let Some(address) = self.address.clone().filter(|a| !a.is_empty()) else { return Ok(Endpoint::default()) };
        let file = |value: &Option<PathBuf>, flag: &str| {
            let missing = || ClientError::Usage(format!("--address needs {flag}: both sides of a connection show certificates"));
            value.clone().ok_or_else(missing)
        };
        let ca = file(&self.tls_ca, "--tls-ca FILE")?;
        let (certificate, key) = (file(&self.tls_cert, "--tls-cert FILE")?, file(&self.tls_key, "--tls-key FILE")?);
        Ok(Endpoint::Tcp(TcpEndpoint { address, ca, certificate, key, server_name: self.tls_name.clone() }))
    }

    /// Connects to the daemon that the options name.
    pub async fn connect(&self) -> Result<Client, ClientError> {
        let endpoint = self.endpoint()?;
        let deadlines = Deadlines { quick: Duration::from_secs(self.timeout), ..Deadlines::default() };
        Ok(Client::connect(endpoint).await?.with_deadlines(deadlines))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_stand_before_and_after_the_command() {
        for line in ["ramtorch --output json -q list --all", "ramtorch list --all --output json -q"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.format(), Format::Json);
            assert!(cli.global.quiet);
        }
    }

    #[test]
    fn an_address_needs_certificates() {
        let endpoint = |line: &str| Cli::try_parse_from(line.split(' ')).unwrap().global.endpoint();
        let error = endpoint("ramtorch --address h:1 --tls-ca a --tls-cert c list").unwrap_err().to_string();
        assert!(error.contains("--tls-key"), "{error}");
        let Endpoint::Tcp(tcp) = endpoint("ramtorch list --address h:1 --tls-ca a --tls-cert c --tls-key k").unwrap() else { panic!() };
        assert_eq!((tcp.address.as_str(), tcp.server_name), ("h:1", None));
        assert!(Cli::try_parse_from("ramtorch --address h:1 --socket s list".split(' ')).is_err());
    }
}
