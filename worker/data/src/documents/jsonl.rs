//! JSON Lines: each line is an object with `text`, or with `messages`.

use super::{Batch, BatchSize, Document, Reader, Unit};
use crate::DataError;
use crate::chat::Conversation;
use serde::Deserialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Longest line that is read.
const LINE_MAX_BYTES: u64 = 1 << 30;

pub(crate) struct JsonLines {
    path: PathBuf,
    input: BufReader<File>,
    size: BatchSize,
    line: u64,
}

impl JsonLines {
    pub(crate) fn open(path: &Path, size: BatchSize) -> Result<JsonLines, DataError> {
        let file = File::open(path).map_err(DataError::read(path))?;
        Ok(JsonLines { path: path.to_path_buf(), input: BufReader::with_capacity(1 << 20, file), size, line: 0 })
    }
}

impl Reader for JsonLines {
    fn next_batch(&mut self) -> Result<Option<Batch>, DataError> {
        let mut units = Vec::new();
        let mut bytes = 0u64;
        while bytes < self.size.bytes as u64 {
            let mut json = Vec::new();
            let n = (&mut self.input).take(LINE_MAX_BYTES).read_until(b'\n', &mut json).map_err(DataError::read(&self.path))?;
            if n == 0 {
                break;
            }
            self.line += 1;
            bytes += n as u64;
            if n as u64 == LINE_MAX_BYTES && json.last() != Some(&b'\n') {
                let reason = format!("the line is longer than {LINE_MAX_BYTES} bytes; each line must be one JSON object");
                return Err(DataError::Line { path: self.path.clone(), line: self.line, reason });
            }
            if self.line == 1 && json.starts_with(b"\xEF\xBB\xBF") {
                json.drain(..3);
            }
            if !json.iter().all(u8::is_ascii_whitespace) {
                units.push(Unit::Line { json, line: self.line });
            }
        }
        Ok((bytes > 0).then_some(Batch { units, bytes }))
    }
}

#[derive(Deserialize)]
struct Line {
    text: Option<Value>,
    messages: Option<Value>,
    tools: Option<Value>,
}

/// The document in a line.
pub(crate) fn parse_line(path: &Path, json: &[u8], line: u64) -> Result<Document, DataError> {
    let bad = |reason: String| DataError::Line { path: path.to_path_buf(), line, reason };
    let text = std::str::from_utf8(json).map_err(|e| bad(format!("not UTF-8 at byte {} of the line", e.valid_up_to())))?;
    let text = text.trim();
    if !text.starts_with('{') {
        return Err(bad(format!(
            "not a JSON object (it begins with {:?}); each line must be one, with `text` or `messages`",
            text.chars().next().unwrap_or(' ')
        )));
    }
    let Line { text, messages, tools } = serde_json::from_str(text).map_err(|e| {
        // serde_json counts lines of its own input, which is a single one.
        let message = e.to_string();
        let what = message.rsplit_once(" at line ").map_or(message.as_str(), |(what, _)| what);
        bad(format!("not valid JSON at column {}: {what}", e.column()))
    })?;
    match (text, messages) {
        (Some(Value::String(text)), _) => Ok(Document::Text(text)),
        (Some(other), _) => Err(bad(format!("`text` is {}, not a string", kind(&other)))),
        (None, Some(messages)) => Conversation::new(&messages, tools.as_ref()).map(Document::Chat).map_err(bad),
        (None, None) => Err(bad("has neither `text` nor `messages`".into())),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
