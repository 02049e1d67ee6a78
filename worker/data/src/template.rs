//! Chat templates: Jinja as transformers renders it.
//!
//! `{% generation %}` blocks mark what the assistant writes. They are no Jinja of their own; as in transformers they
//! become a call block. Here the tags are rewritten to `{% call generation_block() %}`, and the function puts marks
//! around its body, which are taken out again after rendering.

use crate::chat::Conversation;
use crate::python;
use crate::special::Specials;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind, State};
use std::ops::Range;

/// What `strftime_now` returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// The time of rendering.
    Now,
    /// Always the same day, so that a token cache does not depend on the day it was made. It is 26 July 2024, the
    /// date that the Llama 3 templates fall back to.
    Fixed,
}

impl Clock {
    fn unix_seconds(self) -> i64 {
        match self {
            Clock::Fixed => 1_721_952_000,
            Clock::Now => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX / 2)),
        }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    has_generation: bool,
    specials: Vec<(String, String)>,
}

/// A rendered conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rendered {
    pub(crate) text: String,
    /// Bytes of `text` inside of generation blocks, in order.
    pub(crate) generated: Vec<Range<usize>>,
}

const NAME: &str = "chat_template";
/// Marks around generated text: Unicode noncharacters, which no text has, with a name for the unlikely case.
const BEGIN: &str = "\u{FDD0}ramtorch-generation-begin\u{FDD1}";
const END: &str = "\u{FDD0}ramtorch-generation-end\u{FDD1}";
/// Instructions after which a template is taken to be stuck; a long conversation needs some ten thousand.
const FUEL: u64 = 200_000_000;

impl ChatTemplate {
    /// Compiles `source`.
    pub(crate) fn new(source: &str, specials: &Specials, clock: Clock) -> Result<ChatTemplate, String> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_formatter(python::format_value);
        environment.add_filter("tojson", python::tojson);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", move |format: String| python::strftime(&format, clock.unix_seconds()));
        environment.add_function("generation_block", |state: &State, kwargs: Kwargs| -> Result<Value, Error> {
            let body: Value = kwargs.get("caller")?;
            let body = body.call(state, &[])?;
            Ok(Value::from_safe_string(format!("{BEGIN}{body}{END}")))
        });
        let (source, has_generation) = rewrite_generation(source);
        environment.add_template_owned(NAME, source).map_err(|e| describe(&e))?;

        let mut names = specials.others.clone();
        names.extend(specials.bos.iter().map(|(text, _)| ("bos_token".to_string(), text.clone())));
        names.extend(specials.eos.iter().map(|(text, _)| ("eos_token".to_string(), text.clone())));
        Ok(ChatTemplate { environment, has_generation, specials: names })
    }

    /// Whether the template itself says what the assistant writes.
    pub(crate) fn has_generation(&self) -> bool {
        self.has_generation
    }

    /// Renders a conversation; the error is the template's message with its line.
    pub(crate) fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<Rendered, String> {
        let mut context: Vec<(String, Value)> = self.specials.iter().map(|(k, v)| (k.clone(), Value::from(v.as_str()))).collect();
        // transformers passes these even where there are none, so that `tools is defined` holds.
        context.push(("tools".into(), Value::from_serialize(&conversation.tools)));
        context.push(("documents".into(), Value::from(())));
        context.push(("messages".into(), Value::from_serialize(&conversation.messages)));
        context.push(("add_generation_prompt".into(), Value::from(add_generation_prompt)));
        let template = self.environment.get_template(NAME).map_err(|e| describe(&e))?;
        let marked = template.render(context.into_iter().collect::<Value>()).map_err(|e| describe(&e))?;
        if !self.has_generation {
            return Ok(Rendered { text: marked, generated: Vec::new() });
        }
        unmark(&marked).ok_or_else(|| "its generation blocks are nested or were taken apart by the template".to_string())
    }
}

/// Takes the marks out of rendered text.
fn unmark(mut rest: &str) -> Option<Rendered> {
    let mut text = String::with_capacity(rest.len());
    let mut generated = Vec::new();
    while let Some((before, after)) = rest.split_once(BEGIN) {
        let (body, after) = after.split_once(END)?;
        if before.contains(END) || body.contains(BEGIN) {
            return None;
        }
        text.push_str(before);
        generated.push(text.len()..text.len() + body.len());
        text.push_str(body);
        rest = after;
    }
    text.push_str(rest);
    (!rest.contains(END)).then_some(Rendered { text, generated })
}

/// Replaces the tags `generation` and `endgeneration` by a call block; says whether there were any. Comments, raw
/// blocks and strings in other tags are left as they are.
fn rewrite_generation(source: &str) -> (String, bool) {
    let mut out = String::with_capacity(source.len() + 64);
    let mut found = false;
    let mut rest = source;
    let mut raw = false;
    while let Some(at) = rest.find("{%").into_iter().chain(rest.find("{{").filter(|_| !raw)).chain(rest.find("{#").filter(|_| !raw)).min() {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("{#") { rest.find("#}").map(|e| e + 2) } else { tag_length(rest) }.unwrap_or(rest.len());
        let (tag, after) = rest.split_at(length);
        rest = after;
        let inner = tag.strip_prefix("{%").and_then(|t| t.strip_suffix("%}")).unwrap_or("");
        let (open, inner) = inner.strip_prefix(['-', '+']).map_or(("", inner), |i| (&tag[2..3], i));
        let (close, inner) = inner.strip_suffix(['-', '+']).map_or(("", inner), |i| (&tag[tag.len() - 3..tag.len() - 2], i));
        let call = match inner.trim() {
            "endraw" => {
                raw = false;
                None
            }
            _ if raw => None,
            "raw" => {
                raw = true;
                None
            }
            "generation" => Some("call generation_block()"),
            "endgeneration" => Some("endcall"),
            _ => None,
        };
        match call {
            Some(call) => {
                found = true;
                out.push_str(&format!("{{%{open} {call} {close}%}}"));
            }
            None => out.push_str(tag),
        }
    }
    out.push_str(rest);
    (out, found)
}

/// Length of the `{% … %}` or `{{ … }}` at the start of `text`; its end inside of a string literal does not count.
fn tag_length(text: &str) -> Option<usize> {
    let end = if text.starts_with("{{") { "}}" } else { "%}" };
    let bytes = text.as_bytes();
    let mut quote = None;
    let mut i = 2;
    while i < bytes.len() {
        match (quote, bytes[i]) {
            (Some(_), b'\\') => i += 1,
            (Some(q), c) if c == q => quote = None,
            (None, c @ (b'"' | b'\'')) => quote = Some(c),
            (None, _) if bytes[i..].starts_with(end.as_bytes()) => return Some(i + 2),
            _ => {}
        }
        i += 1;
    }
    None
}

/// The message of an error with the template's line.
fn describe(e: &Error) -> String {
    let message = e.detail().map_or_else(
        || e.kind().to_string(),
        |d| if e.kind() == ErrorKind::InvalidOperation { d.to_string() } else { format!("{}: {d}", e.kind()) },
    );
    match e.line() {
        Some(line) => format!("{message} (line {line} of the template)"),
        None => message,
    }
}
