//! `ramtorch logs`

use crate::cli::Global;
use crate::output::Printer;
use clap::Args;
use ramtorch_client::{ClientError, exit, v1};
use serde_json::json;
use std::collections::BTreeMap;

/// A line longer than this is written in parts, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;

/// Print the logs of a job's workers
#[derive(Debug, Args)]
pub(crate) struct Logs {
    /// Id, unique prefix of it, or name of the newest job so named
    job: String,

    /// Go on with what is added, until the job has ended
    #[arg(long, short)]
    follow: bool,

    /// One rank only
    #[arg(long, short, value_name = "N")]
    rank: Option<u32>,

    /// Start so many lines before the end of each log [default: at its beginning]
    #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tail: Option<u32>,
}

impl Logs {
    pub async fn run(&self, global: &Global, printer: Printer) -> Result<u8, ClientError> {
        let mut client = global.connect().await?;
        let job = client.get(&self.job).await?;
        let request = v1::LogsRequest { id: job.id.clone(), rank: self.rank, follow: self.follow, tail_lines: self.tail.unwrap_or(0) };
        let mut chunks = client.logs(request).await?;
        let form = match (printer.is_json(), self.rank.is_none() && job.world_size > 1) {
            (true, _) => Form::Json,
            (false, true) => Form::Prefixed,
            (false, false) => {
                // One log: bytes pass as they are.
                while let Some(chunk) = chunks.next().await? {
                    printer.raw(&chunk.data)?;
                }
                return Ok(exit::OK);
            }
        };
        let mut lines = Lines::new(form);
        while let Some(chunk) = chunks.next().await? {
            printer.raw(&lines.take(chunk.rank, &chunk.data))?;
        }
        printer.raw(&lines.rest())?;
        Ok(exit::OK)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// `[rank] line`
    Prefixed,
    /// `{"rank":…,"line":"…"}`
    Json,
}

/// Puts the chunks of several logs together into whole lines.
struct Lines {
    form: Form,
    unfinished: BTreeMap<u32, Vec<u8>>,
}

impl Lines {
    fn new(form: Form) -> Self {
        Lines { form, unfinished: BTreeMap::new() }
    }

    /// The lines that this chunk completes, as they are to be written.
    fn take(&mut self, rank: u32, data: &[u8]) -> Vec<u8> {
        let form = self.form;
        let mut buffer = self.unfinished.remove(&rank).unwrap_or_default();
        buffer.extend_from_slice(data);
        let mut out = Vec::new();
        let mut rest = buffer.as_slice();
        loop {
            let newline = rest.iter().take(LINE_BYTES_MAX + 1).position(|b| *b == b'\n');
            let (end, next) = match newline {
                Some(at) => (at, at + 1),
                None if rest.len() >= LINE_BYTES_MAX => (LINE_BYTES_MAX, LINE_BYTES_MAX),
                None => break,
            };
            write_line(&mut out, form, rank, &rest[..end]);
            rest = &rest[next..];
        }
        if !rest.is_empty() {
            self.unfinished.insert(rank, rest.to_vec());
        }
        out
    }

    /// What the logs hold after their last newlines.
    fn rest(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        for (rank, line) in std::mem::take(&mut self.unfinished) {
            write_line(&mut out, self.form, rank, &line);
        }
        out
    }
}

fn write_line(out: &mut Vec<u8>, form: Form, rank: u32, line: &[u8]) {
    match form {
        Form::Prefixed => {
            out.extend_from_slice(format!("[{rank}] ").as_bytes());
            out.extend_from_slice(line);
        }
        Form::Json => out.extend_from_slice(json!({ "rank": rank, "line": String::from_utf8_lossy(line) }).to_string().as_bytes()),
    }
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lines_of_several_ranks_do_not_mix() {
        let mut lines = Lines::new(Form::Prefixed);
        assert_eq!(text(lines.take(0, b"a\nhal")), "[0] a\n");
        assert_eq!(text(lines.take(1, b"b\n\n")), "[1] b\n[1] \n");
        assert_eq!(text(lines.take(0, b"f\nlast")), "[0] half\n");
        assert_eq!(text(lines.rest()), "[0] last\n");
        assert!(lines.rest().is_empty());
    }

    #[test]
    fn json_holds_any_bytes() {
        let mut lines = Lines::new(Form::Json);
        assert_eq!(text(lines.take(2, b"\xff\"x\"\n")), "{\"rank\":2,\"line\":\"\u{fffd}\\\"x\\\"\"}\n");
    }

    #[test]
    fn a_line_without_end_is_not_kept_for_ever() {
        let mut lines = Lines::new(Form::Prefixed);
        let out = lines.take(0, &vec![b'x'; 3 * LINE_BYTES_MAX + 5]);
        assert_eq!(out.len(), 3 * (LINE_BYTES_MAX + "[0] \n".len()));
        assert_eq!(text(lines.rest()), "[0] xxxxx\n");
    }

    proptest! {
        #[test]
        fn chunking_changes_nothing(content in "[ab\n]{0,200}", cuts in proptest::collection::vec(0usize..200, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(content.len())).chain([0, content.len()]).collect();
            cuts.sort_unstable();
            let mut lines = Lines::new(Form::Prefixed);
            let mut out = Vec::new();
            for pair in cuts.windows(2) {
                out.extend(lines.take(0, &content.as_bytes()[pair[0]..pair[1]]));
            }
            out.extend(lines.rest());
            let expected: String = content.lines().map(|l| format!("[0] {l}\n")).collect();
            prop_assert_eq!(text(out), expected);
        }
    }
}
