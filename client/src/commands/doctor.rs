//! `ramtorch doctor`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::doctor::{self, Daemon, Facts, Finding, Status};
use ramtorch_client::ui::Format;
use ramtorch_client::ui::table::{Align, Table};
use ramtorch_client::{Client, ClientError, Endpoint, exit};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Look this machine over: what ramtorch needs of it, what is wrong, what to do
///
/// Works with and without a daemon. Ends with code 1 if something fails; warnings alone are no failure.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// The same as --output json
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let printer = if self.json { Printer { format: Format::Json, ..printer } } else { printer };
        let daemon = match ask(global).await {
            Ok(daemon) => daemon,
            // A wrong command line is one with a doctor, too.
            Err(e @ (ClientError::Usage(_) | ClientError::Read { .. })) => return Err(e),
            Err(e) => Daemon::Down(e.to_string()),
        };
        // Files alone, and nothing else runs here meanwhile.
        let findings = doctor::examine(&Facts::gather(daemon));
        let worst = doctor::worst(&findings);
        printer.result(|| to_json(&findings, worst), || page(&findings, worst))?;
        Ok(if worst == Status::Fail { exit::INTERNAL } else { exit::OK })
    }
}

async fn ask(global: &Global) -> Result<Daemon, ClientError> {
    let mut client: Client = global.connect().await?;
    let info = client.info().await?;
    let jobs = client.list(true).await?;
    // Others' jobs are shown without their stores.
    let whole = jobs.iter().all(|j| j.segment_bytes == 0 || !j.segment.is_empty());
    let segments = jobs.iter().filter(|j| !j.segment.is_empty()).map(|j| j.segment.trim_start_matches('/').to_owned()).collect();
    let socket = match global.endpoint()? {
        Endpoint::Unix(_) => Some(client.socket().to_path_buf()),
        Endpoint::Tcp(_) => None,
    };
    Ok(Daemon::Up {
        pid: info.pid,
        state_dir: PathBuf::from(info.state_dir),
        socket,
        segments: whole.then_some(segments),
        started_unix_ms: info.started_unix_ms,
    })
}

fn to_json(findings: &[Finding], worst: Status) -> Value {
    let one = |f: &Finding| json!({ "check": f.check, "status": f.status.name(), "found": f.found, "advice": f.advice });
    json!({ "status": worst.name(), "checks": findings.iter().map(one).collect::<Vec<_>>() })
}

fn page(findings: &[Finding], worst: Status) -> String {
    let mut table = Table::new(&[("CHECK", Align::Left), ("", Align::Left), ("FOUND", Align::Left)]);
    for f in findings {
        table.row([f.check.to_owned(), f.status.name().to_owned(), f.found.clone()]);
    }
    let mut out = table.render();
    for f in findings.iter().filter(|f| f.status != Status::Ok) {
        out.push_str(&format!("\n{}: {}\n  {}\n", f.status.name(), f.check, f.advice));
    }
    if worst == Status::Ok {
        out.push_str("\nnothing is wrong\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_stands_below_the_table_and_in_the_json() {
        let finding = |check, status, advice: &str| Finding { check, status, found: "this".into(), advice: advice.into() };
        let findings = [finding("a", Status::Ok, ""), finding("b", Status::Fail, "do that")];
        let text = page(&findings, Status::Fail);
        assert!(text.contains("\nfail: b\n  do that\n") && !text.contains("nothing is wrong"), "{text}");
        let json = to_json(&findings, Status::Fail);
        assert_eq!((json["status"].as_str(), json["checks"][1]["advice"].as_str()), (Some("fail"), Some("do that")));
    }
}
