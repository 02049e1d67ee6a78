//! Results on the standard output, errors on the standard error.

use ramtorch_client::ui::Format;
use ramtorch_client::{ClientError, exit};
use serde_json::{Value, json};
use std::io::{self, Write};

/// Writes what a command has to say, in the form that was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    pub format: Format,
    pub quiet: bool,
}

impl Printer {
    pub fn new(format: Format, quiet: bool) -> Self {
        Printer { format, quiet }
    }

    pub fn is_json(self) -> bool {
        self.format == Format::Json
    }

    /// A result: `human` is made only where people read it, and holds its own newlines.
    pub fn result(self, json: impl FnOnce() -> Value, human: impl FnOnce() -> String) -> Result<(), ClientError> {
        match self.format {
            Format::Json => self.raw(format!("{}\n", json()).as_bytes()),
            Format::Human => self.raw(human().as_bytes()),
        }
    }

    /// A confirmation: as a result, but `--quiet` leaves the human form out.
    pub fn confirmation(self, json: impl FnOnce() -> Value, human: impl FnOnce() -> String) -> Result<(), ClientError> {
        if self.quiet && !self.is_json() { Ok(()) } else { self.result(json, human) }
    }

    /// A remark beside the result, for people only.
    pub fn remark(self, text: &str) {
        if !self.quiet && !self.is_json() {
            // A remark that cannot be made changes nothing.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    /// Bytes as they are.
    pub fn raw(self, bytes: &[u8]) -> Result<(), ClientError> {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(ClientError::Output)
    }
}

/// One message on the standard error: `ramtorch: …`, or an object with `code`, `kind` and `message`.
pub(crate) fn print_error(format: Format, code: u8, message: &str) {
    let line = match format {
        Format::Json => json!({ "code": code, "kind": exit::kind(code), "message": message }).to_string(),
        Format::Human => format!("ramtorch: {}", ramtorch_client::ui::text::printable(message)),
    };
    // Nobody is left to tell when this fails.
    let _ = writeln!(io::stderr(), "{line}");
}
