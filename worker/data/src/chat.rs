//! Conversations: which tokens of a rendered conversation the assistant wrote.
//!
//! A template with `{% generation %}` blocks says so itself. For the others the text of an assistant's turn is found by
//! rendering growing prefixes of the conversation:
//!
//! ```text
//!  messages[..k]  with generation prompt   <user>Hi<end>\n<assistant>\n
//!  messages[..=k] without                  <user>Hi<end>\n<assistant>\nHello.<end>\n
//!  the whole conversation                  <user>Hi<end>\n<assistant>\nHello.<end>\n<user>Bye<end>\n…
//!                                                                      └─ turn ───┘
//! ```
//! The turn runs from the end of the first to the end of the second; white space after a special token that ends it is
//! left out, since a model that has said its end token is never asked to go on.
//!
//! Some templates write a turn differently once others follow it (they drop the thoughts of earlier turns, or close the
//! conversation), so that a prefix is not the beginning of the whole. There the content of the message is replaced by
//! a placeholder and looked up in the rendered text: what stands around it says where the content is, and what follows
//! it both in the prefix and in the whole is the end of the turn. Where that fails too, the conversation is an error;
//! a mask is never guessed.

use crate::template::ChatTemplate;
use crate::{DataError, Tokenizer};
use serde_json::Value;
use std::ops::Range;

/// Messages, and the tools that they may call.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Conversation {
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Value>,
}

/// Tokens of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Marked {
    pub(crate) ids: Vec<u32>,
    /// Whether the assistant wrote the token.
    pub(crate) assistant: Vec<bool>,
}

impl Conversation {
    /// Checks what every template takes for granted: messages with a role, and something said.
    pub(crate) fn new(messages: Value, tools: Option<Value>) -> Result<Conversation, String> {
        let Value::Array(messages) = messages else {
            return Err("`messages` is not a list of messages".into());
        };
        if messages.is_empty() {
            return Err("`messages` is empty".into());
        }
        for (k, message) in messages.iter().enumerate() {
            let Value::Object(fields) = message else {
                return Err(format!("message {k} is not an object with `role` and `content`"));
            };
            match fields.get("role") {
                Some(Value::String(_)) => {}
                Some(_) => return Err(format!("`role` of message {k} is not a string")),
                None => return Err(format!("message {k} has no `role`")),
            }
            if !fields.contains_key("content") && !fields.contains_key("tool_calls") {
                return Err(format!("message {k} has no `content`"));
            }
        }
        Ok(Conversation { messages, tools: tools.filter(|t| !t.is_null()) })
    }

    fn prefix(&self, length: usize) -> Conversation {
        Conversation { messages: self.messages[..length].to_vec(), tools: self.tools.clone() }
    }

    fn with_content(&self, k: usize, content: &str) -> Conversation {
        let mut changed = self.clone();
        changed.messages[k]["content"] = Value::String(content.into());
        changed
    }
}

/// Renders and tokenises a conversation.
pub(crate) fn encode(tokenizer: &Tokenizer, template: &ChatTemplate, conversation: &Conversation) -> Result<Marked, DataError> {
    let (text, turns) =
        assistant_turns(template, conversation, &|t| tokenizer.ends_with_special(t)).map_err(|reason| DataError::Template { reason })?;
    let (ids, offsets) = tokenizer.encode_with_offsets(&text)?;
    let assistant = mark(&offsets, &turns);
    Ok(Marked { ids, assistant })
}

/// The text of a conversation, and the bytes of it that the assistant wrote, in ascending order.
pub(crate) fn assistant_turns(
    template: &ChatTemplate,
    conversation: &Conversation,
    ends_with_special: &dyn Fn(&str) -> bool,
) -> Result<(String, Vec<Range<usize>>), String> {
    let whole = template.render(conversation, false)?;
    if template.has_generation() {
        return Ok((whole.text, whole.generated));
    }
    let text = whole.text;
    let mut turns: Vec<Range<usize>> = Vec::new();
    for k in 0..conversation.messages.len() {
        if conversation.messages[k]["role"] != "assistant" {
            continue;
        }
        let from = turns.last().map_or(0, |t| t.end);
        let mut turn = turn_by_prefixes(template, conversation, k, &text)?;
        if turn.as_ref().is_none_or(|t| t.start < from) {
            turn = turn_by_placeholder(template, conversation, k, &text, from)?;
        }
        let Some(turn) = turn else {
            return Err(format!(
                "cannot tell which part of the text message {k} became, because the template writes it differently when other messages follow; \
                 mark the assistant's part in the template with {{% generation %}} … {{% endgeneration %}}"
            ));
        };
        let said = text[turn.clone()].trim_end();
        let end = if ends_with_special(said) { turn.start + said.len() } else { turn.end };
        turns.push(turn.start..end);
    }
    Ok((text, turns))
}

/// Message `k` in `text`, where the conversation's prefixes are rendered as in the whole.
fn turn_by_prefixes(template: &ChatTemplate, conversation: &Conversation, k: usize, text: &str) -> Result<Option<Range<usize>>, String> {
    // Templates may refuse a prefix (an empty one, or one that ends in the middle of a tool call).
    let Ok(before) = template.render(&conversation.prefix(k), true) else { return Ok(None) };
    let last = k + 1 == conversation.messages.len();
    let end = if last {
        text.len()
    } else {
        match template.render(&conversation.prefix(k + 1), false) {
            Ok(with) if text.starts_with(&with.text) => with.text.len(),
            _ => return Ok(None),
        }
    };
    let start = before.text.len();
    Ok((text.starts_with(&before.text) && start <= end).then_some(start..end))
}

/// Message `k` in `text`, by the place of its content; `from` is where the turn before it ends.
fn turn_by_placeholder(
    template: &ChatTemplate,
    conversation: &Conversation,
    k: usize,
    text: &str,
    from: usize,
) -> Result<Option<Range<usize>>, String> {
    let Some(content) = conversation.messages[k]["content"].as_str() else { return Ok(None) };
    // A word that is nowhere in the conversation, of letters only, so that no template takes it apart.
    let mut placeholder = String::from("Xplaceholderx");
    while text.contains(&placeholder) {
        placeholder.push('x');
    }
    if content.trim().is_empty() {
        return Ok(None);
    }
    let marked = template.render(&conversation.with_content(k, &placeholder), false)?.text;
    let Some((head, tail)) = split_once_only(&marked, &placeholder) else { return Ok(None) };
    if !text.starts_with(head) || !text.ends_with(tail) || head.len() + tail.len() > text.len() || head.len() < from {
        return Ok(None);
    }
    let said = head.len()..text.len() - tail.len();
    // What is left must be the content, as far as the template shows it.
    if !content.contains(text[said.clone()].trim()) {
        return Ok(None);
    }
    let prefix = template.render(&conversation.prefix(k + 1).with_content(k, &placeholder), false)?.text;
    let Some((_, prefix_tail)) = split_once_only(&prefix, &placeholder) else { return Ok(None) };
    let end = said.end + common_prefix(tail, prefix_tail);
    let start = header_end(template, conversation, k, text).filter(|s| (from..=said.start).contains(s)).unwrap_or(said.start);
    Ok(Some(start..end))
}

/// Where the header of message `k` ends and what the model says begins: as far as the generation prompt is written in
/// the whole text. `None` where the template writes none or the messages before differ, so that only the content is
/// certain.
fn header_end(template: &ChatTemplate, conversation: &Conversation, k: usize, text: &str) -> Option<usize> {
    let before = template.render(&conversation.prefix(k), false).ok()?.text;
    let prompt = template.render(&conversation.prefix(k), true).ok()?.text;
    let shared = common_prefix(text, &prompt);
    (text.starts_with(&before) && shared > before.len()).then_some(shared)
}

fn split_once_only<'t>(text: &'t str, needle: &str) -> Option<(&'t str, &'t str)> {
    text.split_once(needle).filter(|(_, tail)| !tail.contains(needle))
}

/// Bytes that two texts have in common at their start, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((i, _), _)| i)
}

/// Marks each token that has a byte inside of one of `spans` (ascending, apart from each other).
pub(crate) fn mark(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<bool> {
    let mut span = 0;
    offsets
        .iter()
        .map(|&(start, end)| {
            while spans.get(span).is_some_and(|s| s.end <= start) {
                span += 1;
            }
            spans.get(span).is_some_and(|s| start.max(s.start) < end.min(s.end))
        })
        .collect()
}
