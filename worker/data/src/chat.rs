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
//! The turn runs from the end of the first to the end of the second, with its end token and the white space that the
//! template writes after it: what `{% generation %}` blocks commonly hold, too.
//!
//! Some templates write a turn differently once others follow it (they drop the thoughts of earlier turns, or close the
//! conversation), so that a prefix is not the beginning of the whole. Then
//! - the content of the message is replaced by a placeholder and looked up in the rendered text: what stands around it
//!   says where the content is, and what follows it both in the prefix and in the whole is the end of the turn;
//! - where there is no content to replace (a call of a tool), the prefix may have something that the whole leaves out: the
//!   turn ends where the rest of the prefix does.
//!
//! Where that fails too, the conversation is an error; a mask is never guessed.

use crate::template::ChatTemplate;
use crate::{DataError, Tokenizer};
use minijinja::Value;
use serde_json::Value as Json;
use std::borrow::Cow;
use std::ops::Range;

/// Messages, and the tools that they may call. The messages are values of the template engine, which are cheap to
/// share: a conversation is rendered many times.
#[derive(Debug, Clone, Default)]
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
    pub(crate) fn new(messages: &Json, tools: Option<&Json>) -> Result<Conversation, String> {
        let Json::Array(messages) = messages else {
            return Err("`messages` is not a list of messages".into());
        };
        if messages.is_empty() {
            return Err("`messages` is empty".into());
        }
        for (k, message) in messages.iter().enumerate() {
            let Json::Object(fields) = message else {
                return Err(format!("message {k} is not an object with `role` and `content`"));
            };
            match fields.get("role") {
                Some(Json::String(_)) => {}
                Some(_) => return Err(format!("`role` of message {k} is not a string")),
                None => return Err(format!("message {k} has no `role`")),
            }
            if !fields.contains_key("content") && !fields.contains_key("tool_calls") {
                return Err(format!("message {k} has no `content`"));
            }
        }
        let messages = messages.iter().map(Value::from_serialize).collect();
        Ok(Conversation { messages, tools: tools.filter(|t| !t.is_null()).map(Value::from_serialize) })
    }

    /// The first messages.
    fn prefix(&self, length: usize) -> Conversation {
        Conversation { messages: self.messages[..length].to_vec(), tools: self.tools.clone() }
    }

    /// The same with another content of message `k`.
    fn with_content(&self, k: usize, content: &str) -> Conversation {
        let mut changed = self.clone();
        let message = &self.messages[k];
        let fields = message.try_iter().into_iter().flatten().map(|key| {
            let value = if key.as_str() == Some("content") { Value::from(content) } else { message.get_item(&key).unwrap_or_default() };
            (key, value)
        });
        changed.messages[k] = fields.collect();
        changed
    }

    fn field(&self, k: usize, name: &str) -> Value {
        self.messages[k].get_attr(name).unwrap_or_default()
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
        if conversation.field(k, "role").as_str() != Some("assistant") {
            continue;
        }
        let from = turns.last().map_or(0, |t| t.end);
        let search = Search { template, conversation, k, text: &text, ends_with_special };
        match search.turn()? {
            Some(turn) if from <= turn.start && turn.start <= turn.end => turns.push(turn),
            _ => {
                return Err(format!(
                    "cannot tell which part of the text message {k} became, because the template writes it differently when other messages follow; \
                     mark the assistant's part in the template with {{% generation %}} … {{% endgeneration %}}"
                ));
            }
        }
    }
    Ok((text, turns))
}

/// The search for message `k` in the text of the whole conversation.
struct Search<'a> {
    template: &'a ChatTemplate,
    conversation: &'a Conversation,
    k: usize,
    text: &'a str,
    ends_with_special: &'a dyn Fn(&str) -> bool,
}

/// Where the content of a message is, and where its turn ends.
struct Placed {
    content: usize,
    end: usize,
}

impl Search<'_> {
    fn turn(&self) -> Result<Option<Range<usize>>, String> {
        let prefix = self.conversation.prefix(self.k + 1);
        let last = prefix.messages.len() == self.conversation.messages.len();
        // Templates may refuse a prefix: an empty one, or one that ends in the middle of a call of a tool.
        let rendered = |messages: &Conversation, prompt| self.template.render(messages, prompt).map_or(String::new(), |r| r.text);
        let with = if last { Cow::Borrowed(self.text) } else { Cow::Owned(rendered(&prefix, false)) };
        let prompt = rendered(&self.conversation.prefix(self.k), true);
        let whole_prompt = !prompt.is_empty() && self.text.starts_with(&prompt);
        let whole_turn = !with.is_empty() && self.text.starts_with(&*with);
        if whole_prompt && whole_turn {
            return Ok(Some(prompt.len()..with.len()));
        }
        let placed = self.by_placeholder()?;
        let end = if whole_turn { Some(with.len()) } else { placed.as_ref().map(|p| p.end).or_else(|| self.end_by_omission(&with)) };
        let start = if whole_prompt { Some(prompt.len()) } else { self.part_of_prompt(&prompt).or(placed.as_ref().map(|p| p.content)) };
        // A prompt that goes on like the content does not reach into it.
        let start = start.map(|s| placed.as_ref().map_or(s, |p| s.min(p.content)));
        Ok(start.zip(end).map(|(start, end)| start..end))
    }

    /// Finds the content by a placeholder in its place.
    fn by_placeholder(&self) -> Result<Option<Placed>, String> {
        let content = self.conversation.field(self.k, "content");
        let Some(content) = content.as_str().filter(|c| !c.trim().is_empty()) else { return Ok(None) };
        // A word that is nowhere in the conversation, of letters only, so that no template takes it apart.
        let mut placeholder = String::from("Xplaceholderx");
        while self.text.contains(&placeholder) {
            placeholder.push('x');
        }
        let marked = self.template.render(&self.conversation.with_content(self.k, &placeholder), false)?.text;
        let Some((head, tail)) = split_once_only(&marked, &placeholder) else { return Ok(None) };
        if !self.text.starts_with(head) || !self.text.ends_with(tail) || head.len() + tail.len() > self.text.len() {
            return Ok(None);
        }
        let said = head.len()..self.text.len() - tail.len();
        // What is left must be the content, as far as the template shows it.
        if !content.contains(self.text[said.clone()].trim()) {
            return Ok(None);
        }
        let prefix = self.conversation.prefix(self.k + 1).with_content(self.k, &placeholder);
        let Ok(prefix) = self.template.render(&prefix, false) else { return Ok(None) };
        let Some((_, prefix_tail)) = split_once_only(&prefix.text, &placeholder) else { return Ok(None) };
        let shared = common_prefix(tail, prefix_tail);
        // Where the two part in the middle, what they share may reach into what follows the turn (`<|` of two different
        // tokens): the turn ends with the last special token in it and the white space after that.
        let shared = if shared == prefix_tail.len() {
            shared
        } else {
            let end = last_end(&tail[..shared], self.ends_with_special).unwrap_or(0);
            end + tail[end..shared].len() - tail[end..shared].trim_start().len()
        };
        Ok(Some(Placed { content: said.start, end: said.end + shared }))
    }

    /// The end of a turn of which the prefix (`with`) has something that the whole leaves out.
    fn end_by_omission(&self, with: &str) -> Option<usize> {
        let parted = common_prefix(self.text, with);
        let (whole, with) = (&self.text[parted..], &with[parted..]);
        let rest = with.char_indices().map(|(i, _)| &with[i..]).find(|rest| whole.starts_with(rest))?;
        (!rest.trim().is_empty()).then_some(parted + rest.len())
    }

    /// Where the header of the turn ends, if the whole has only part of the generation prompt: after a line or a special
    /// token of it.
    fn part_of_prompt(&self, prompt: &str) -> Option<usize> {
        let before = self.template.render(&self.conversation.prefix(self.k), false).ok()?.text.len();
        let shared = common_prefix(self.text, prompt);
        let header = self.text.get(before..shared)?;
        last_end(header, &|t| t.ends_with('\n') || (self.ends_with_special)(t)).map(|end| before + end)
    }
}

fn split_once_only<'t>(text: &'t str, needle: &str) -> Option<(&'t str, &'t str)> {
    text.split_once(needle).filter(|(_, tail)| !tail.contains(needle))
}

/// End of the longest part of `text`, from its start, for which `holds` is true.
fn last_end(text: &str, holds: &dyn Fn(&str) -> bool) -> Option<usize> {
    text.char_indices().map(|(i, c)| i + c.len_utf8()).rev().find(|end| holds(&text[..*end]))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::special::Specials;
    use crate::template::Clock;
    use crate::testing::{CHATML, IM_END, IM_START, bytes, model_dir};
    use proptest::prelude::*;
    use serde_json::json;

    fn chat(messages: Json) -> Conversation {
        Conversation::new(&messages, None).unwrap()
    }

    fn talk(turns: &[(&str, &str)]) -> Conversation {
        chat(turns.iter().map(|(role, content)| json!({"role": role, "content": content})).collect())
    }

    fn special(text: &str) -> bool {
        text.ends_with("<|im_end|>") || text.ends_with("<done>")
    }

    /// What the assistant said, as text.
    fn said(source: &str, conversation: &Conversation) -> Result<Vec<String>, String> {
        let template = ChatTemplate::new(source, &Specials::default(), Clock::Fixed).unwrap();
        let (text, turns) = assistant_turns(&template, conversation, &special)?;
        Ok(turns.into_iter().map(|t| text[t].to_string()).collect())
    }

    /// Drops the thoughts of all turns but the last, as reasoning models do, and opens the last one with a think tag.
    const THINKING: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn a_turn_is_its_content_and_its_end() {
        let c = talk(&[("system", "S"), ("user", "Hi"), ("assistant", "Hello\n"), ("user", "Bye"), ("assistant", "So long")]);
        assert_eq!(said(CHATML, &c).unwrap(), ["Hello\n<|im_end|>\n", "So long<|im_end|>\n"]);
        let c = talk(&[("user", "Hi")]);
        assert_eq!(said(CHATML, &c).unwrap(), [""; 0]);
    }

    #[test]
    fn same_words_of_others_do_not_count() {
        let c = talk(&[("user", "assistant\nYo"), ("assistant", "Yo"), ("user", "Yo"), ("assistant", "Yo")]);
        let template = ChatTemplate::new(CHATML, &Specials::default(), Clock::Fixed).unwrap();
        let (text, turns) = assistant_turns(&template, &c, &special).unwrap();
        let header = "<|im_start|>assistant\n";
        assert_eq!(turns.len(), 2);
        assert!(turns.iter().all(|t| text[..t.start].ends_with(header) && &text[t.clone()] == "Yo<|im_end|>\n"), "{turns:?}");
    }

    #[test]
    fn without_end_tokens_white_space_ends_a_turn() {
        let source = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
        let c = talk(&[("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]);
        assert_eq!(said(source, &c).unwrap(), ["Hello\n\n"]);
    }

    #[test]
    fn two_turns_in_a_row_are_two() {
        let c = talk(&[("assistant", "A"), ("assistant", "B"), ("user", "C"), ("assistant", "D")]);
        assert_eq!(said(CHATML, &c).unwrap(), ["A<|im_end|>\n", "B<|im_end|>\n", "D<|im_end|>\n"]);
    }

    #[test]
    fn turns_that_lose_their_thoughts_are_found_by_their_words() {
        let c = talk(&[("user", "Q"), ("assistant", "<think>hm</think>\n\nOne"), ("user", "R"), ("assistant", "<think>ha</think>\n\nTwo")]);
        assert_eq!(said(THINKING, &c).unwrap(), ["One<|im_end|>\n", "<think>ha</think>\n\nTwo<|im_end|>\n"]);
    }

    #[test]
    fn calls_of_tools_are_found_without_words() {
        // Writes empty thoughts into the last turn only.
        let source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content }}{% if m.calls %}{{ m.calls|tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let call = json!({"role": "assistant", "content": "", "calls": [{"f": 1}]});
        let c =
            chat(json!([{"role": "user", "content": "Q"}, call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "A"}]));
        assert_eq!(said(source, &c).unwrap(), ["[{\"f\": 1}]<|im_end|>\n", "<think></think>A<|im_end|>\n"]);
        // Without calls and words the turn is its end.
        let nothing = json!({"role": "assistant", "content": ""});
        let c = chat(
            json!([{"role": "user", "content": "Q"}, nothing, {"role": "user", "content": "R"}, {"role": "assistant", "content": "A"}]),
        );
        assert_eq!(said(source, &c).unwrap(), ["<|im_end|>\n", "<think></think>A<|im_end|>\n"]);
    }

    #[test]
    fn a_prompt_that_opens_a_thought_ends_where_it_is_written() {
        // The generation prompt has a tag that finished turns do not have.
        let source = CHATML.replace("<|im_start|>assistant\n' }}{% endif %}", "<|im_start|>assistant\n<think>' }}{% endif %}");
        let c = talk(&[("user", "Q"), ("assistant", "One"), ("user", "R"), ("assistant", "<think>x</think>Two")]);
        assert_eq!(said(&source, &c).unwrap(), ["One<|im_end|>\n", "x</think>Two<|im_end|>\n"]);
    }

    #[test]
    fn what_closes_the_whole_conversation_belongs_to_its_last_turn() {
        let source = format!("{CHATML}{{% if not add_generation_prompt %}}<done>{{% endif %}}");
        let c = talk(&[("user", "Q"), ("assistant", "One"), ("user", "R"), ("assistant", "Two")]);
        assert_eq!(said(&source, &c).unwrap(), ["One<|im_end|>\n", "Two<|im_end|>\n<done>"]);
    }

    #[test]
    fn templates_that_refuse_prefixes_still_work() {
        // Refuses conversations that do not end with the assistant, and empty ones.
        let source = format!("{{% if messages[-1].role != 'assistant' %}}{{{{ raise_exception('no') }}}}{{% endif %}}{CHATML}");
        let c = talk(&[("user", "Q"), ("assistant", " One "), ("user", "R"), ("assistant", "Two")]);
        assert_eq!(said(&source, &c).unwrap(), [" One <|im_end|>\n", "Two<|im_end|>\n"]);
        assert_eq!(said(&source, &talk(&[("user", "Q")])).unwrap_err(), "no (line 1 of the template)");
    }

    #[test]
    fn a_mask_is_never_guessed() {
        // Earlier turns are replaced by something that has nothing to do with their content.
        let source =
            "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}(gone){% else %}{{ m.content }}{% endif %}{% endfor %}";
        let c = talk(&[("user", "Q"), ("assistant", "One"), ("user", "R"), ("assistant", "Two")]);
        let e = said(source, &c).unwrap_err();
        assert!(e.contains("message 1") && e.contains("generation"), "{e}");
    }

    #[test]
    fn tokens_are_marked_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::load(&model_dir(dir.path(), true, Some(CHATML))).unwrap();
        let c = talk(&[("user", "Hé"), ("assistant", "é!"), ("user", "x")]);
        let marked = tokenizer.encode_conversation(&c).unwrap();
        let turn = |role: &str, content: &str| [&[IM_START][..], &bytes(role), &[10], &bytes(content), &[IM_END, 10]].concat();
        // No <bos>: the template has none.
        assert_eq!(marked.ids, [turn("user", "Hé"), turn("assistant", "é!"), turn("user", "x")].concat());
        let mut mask = vec![false; marked.ids.len()];
        let from = turn("user", "Hé").len() + 1 + "assistant".len() + 1;
        // Two bytes of é, one of !, the end token and the line break after it.
        mask[from..from + 5].fill(true);
        assert_eq!(marked.assistant, mask);
    }

    #[test]
    fn generation_blocks_decide_where_there_are_any() {
        let source = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}";
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = Tokenizer::load(&model_dir(dir.path(), false, Some(source))).unwrap();
        let marked = tokenizer.encode_conversation(&talk(&[("user", "ab"), ("assistant", "c"), ("user", "d")])).unwrap();
        assert_eq!(marked.ids, bytes("abc.d"));
        assert_eq!(marked.assistant, [false, false, true, true, false]);
    }

    #[test]
    fn tokens_across_an_edge_count() {
        // [ab][cd][ef] with a turn of c..=e: the second is inside, the third has one byte of it.
        assert_eq!(mark(&[(0, 2), (2, 4), (4, 6)], &[2..5]), [false, true, true]);
        assert_eq!(mark(&[(0, 2), (2, 4), (4, 6)], &[1..2, 4..6]), [true, false, true]);
        assert_eq!(mark(&[(0, 2), (2, 2), (2, 4)], &[2..4]), [false, false, true]);
        assert_eq!(mark(&[(0, 3), (0, 3), (0, 3)], &[0..3]), [true; 3]);
        assert_eq!(mark(&[(0, 3)], &[]), [false]);
    }

    #[test]
    fn malformed_conversations_say_what_is_missing() {
        for (messages, what) in [
            (json!("hi"), "not a list"),
            (json!([]), "empty"),
            (json!(["hi"]), "message 0 is not an object"),
            (json!([{"role": "user", "content": "a"}, {"content": "b"}]), "message 1 has no `role`"),
            (json!([{"role": 3, "content": "a"}]), "`role` of message 0 is not a string"),
            (json!([{"role": "user"}]), "message 0 has no `content`"),
        ] {
            let e = Conversation::new(&messages, None).unwrap_err();
            assert!(e.contains(what), "{e}");
        }
    }

    proptest! {
        #[test]
        fn exactly_the_assistants_words_are_found(turns in prop::collection::vec((any::<bool>(), "[a-cé \n<>|]{0,6}"), 1..8)) {
            let turns: Vec<_> = turns.iter().map(|(a, t)| (if *a { "assistant" } else { "user" }, t.as_str())).collect();
            let expected: Vec<_> = turns.iter().filter(|t| t.0 == "assistant").map(|t| format!("{}<|im_end|>\n", t.1)).collect();
            prop_assert_eq!(said(CHATML, &talk(&turns)).unwrap(), expected);
        }

        #[test]
        fn both_ways_of_marking_agree(turns in prop::collection::vec((any::<bool>(), "[a-c]{1,6}"), 1..8)) {
            let turns: Vec<_> = turns.iter().map(|(a, t)| (if *a { "assistant" } else { "user" }, t.as_str())).collect();
            let c = talk(&turns);
            let template = ChatTemplate::new(CHATML, &Specials::default(), Clock::Fixed).unwrap();
            let text = template.render(&c, false).unwrap().text;
            for k in (0..turns.len()).filter(|k| turns[*k].0 == "assistant") {
                let search = Search { template: &template, conversation: &c, k, text: &text, ends_with_special: &special };
                let (turn, placed) = (search.turn().unwrap().unwrap(), search.by_placeholder().unwrap().unwrap());
                prop_assert_eq!(turn, placed.content..placed.end);
            }
        }
    }
}
