//! Chat templates: Jinja as transformers renders it.
//!
//! `{% generation %}` blocks mark what the assistant writes. They are no Jinja of their own; as in transformers they
//! become a block of their own. Here the tags are rewritten to a filter block with a scope in it, and the filter puts
//! marks around the text, which are taken out again after rendering.

use crate::chat::Conversation;
use crate::python;
use crate::special::Specials;
use minijinja::{Environment, Error, ErrorKind, Value};
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
        environment.add_filter("generation_block", |text: String| format!("{BEGIN}{text}{END}"));
        environment.add_test("iterable", python::is_iterable);
        environment.add_test("sequence", python::is_sequence);
        // Jinja reads any line end as a line feed.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let (source, has_generation) = rewrite_generation(&source);
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
        context.push(("tools".into(), conversation.tools.clone().unwrap_or(Value::from(()))));
        context.push(("documents".into(), Value::from(())));
        context.push(("messages".into(), Value::from(conversation.messages.clone())));
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

/// Replaces the tags `generation` and `endgeneration` by those of a filter block; says whether there were any. Comments, raw
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
        let tags = match inner.trim() {
            "endraw" => {
                raw = false;
                None
            }
            _ if raw => None,
            "raw" => {
                raw = true;
                None
            }
            "generation" => Some(("filter generation_block", "with")),
            "endgeneration" => Some(("endwith", "endfilter")),
            _ => None,
        };
        match tags {
            Some((first, second)) => {
                found = true;
                out.push_str(&format!("{{%{open} {first} %}}{{% {second} {close}%}}"));
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        let specials =
            Specials { bos: Some(("<s>".into(), 1)), eos: Some(("</s>".into(), 2)), others: vec![("pad_token".into(), "<pad>".into())] };
        ChatTemplate::new(source, &specials, Clock::Fixed).unwrap()
    }

    fn chat(messages: serde_json::Value) -> Conversation {
        Conversation::new(&messages, None).unwrap()
    }

    fn render(source: &str) -> Result<String, String> {
        let messages = json!([{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yo"}]);
        template(source).render(&chat(messages), false).map(|r| r.text)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        assert_eq!(
            render("{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}\n").unwrap(),
            "user\nassistant\n"
        );
    }

    #[test]
    fn python_is_spoken() {
        assert_eq!(
            render("{{ messages[0]['content'].strip().upper() }}{{ bos_token }}{{ pad_token }}{{ eos_token }}").unwrap(),
            "HI<s><pad></s>"
        );
        assert_eq!(render("{{ true }} {{ none }} {{ false }} {{ missing }}|").unwrap(), "True None False |");
        assert_eq!(render("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}").unwrap(), "user");
        assert_eq!(
            render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}").unwrap(),
            "2"
        );
        assert_eq!(
            render("{{ messages[1:][0].role }} {{ messages[::-1][1].role }} {{ tools is none }} {{ tools is defined }}").unwrap(),
            "assistant user True True"
        );
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}").unwrap(), "26 Jul 2024");
    }

    #[test]
    fn tests_of_types_are_those_of_python() {
        let source = "{% for x in ['s', [], {}, 1, none, missing] %}{{ x is iterable }}{{ x is sequence }} {% endfor %}";
        assert_eq!(render(source).unwrap(), "TrueTrue TrueTrue TrueTrue FalseFalse FalseFalse TrueFalse ");
        assert_eq!(render("a\r\n{% if true %}\r\nb\rc\r\n{% endif %}").unwrap(), "a\nb\nc\n");
    }

    #[test]
    fn tojson_is_json_dumps() {
        let source = |args: &str| format!("{{{{ {{'b': [1, 2.5, true, none], 'a': 'é<&\\'\\n'}}|tojson{args} }}}}");
        assert_eq!(render(&source("")).unwrap(), r#"{"b": [1, 2.5, true, null], "a": "é<&'\n"}"#);
        assert_eq!(render(&source("(sort_keys=true, ensure_ascii=true)")).unwrap(), r#"{"a": "\u00e9<&'\n", "b": [1, 2.5, true, null]}"#);
        assert_eq!(render(&source("(separators=(',', ':'))")).unwrap(), r#"{"b":[1,2.5,true,null],"a":"é<&'\n"}"#);
        assert_eq!(
            render("{{ {'a': [1, {}], 'b': []}|tojson(indent=2) }}").unwrap(),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
    }

    #[test]
    fn refusals_have_message_and_line() {
        assert_eq!(render("\n{{ raise_exception('roles must alternate') }}").unwrap_err(), "roles must alternate (line 2 of the template)");
        assert!(render("{{ messages[0].tool.name }}").unwrap_err().contains("line 1"));
        let e = ChatTemplate::new("{% for %}", &Specials::default(), Clock::Fixed).unwrap_err();
        assert!(e.contains("line 1"), "{e}");
    }

    #[test]
    fn endless_templates_are_stopped() {
        let e = render("{% for i in range(90000) %}{% for j in range(90000) %}{% set x = 1 %}{% endfor %}{% endfor %}").unwrap_err();
        assert!(e.contains("fuel"), "{e}");
    }

    #[test]
    fn generation_blocks_are_found_in_the_text() {
        let source = "{% for m in messages %}\n{% if m.role == 'assistant' %}\nA:{% generation %}\n  {{- m.content }};{%- endgeneration -%}  \n{% else %}\nU:{{ m.content }}\n{% endif %}\n{% endfor %}";
        let t = template(source);
        assert!(t.has_generation());
        let messages =
            json!([{"role": "user", "content": "é"}, {"role": "assistant", "content": "Ja"}, {"role": "assistant", "content": ""}]);
        let r = t.render(&chat(messages), false).unwrap();
        assert_eq!(r.text, "U:é\nA:Ja;A:;");
        assert_eq!(r.generated.iter().map(|g| &r.text[g.clone()]).collect::<Vec<_>>(), ["Ja;", ";"]);
    }

    #[test]
    fn generation_blocks_see_the_variables_around_them() {
        let source = "{% set who = 'x' %}{% for m in messages %}{% set n = loop.index %}{% generation %}{{ who }}{{ n }}{{ m.role[0] }}{% endgeneration %}{% endfor %}";
        let r = template(source).render(&chat(json!([{"role": "user", "content": ""}])), false).unwrap();
        assert_eq!((r.text.as_str(), &r.generated[..]), ("x1u", &[0..3][..]));
    }

    #[test]
    fn generation_blocks_have_a_scope_and_reach_namespaces() {
        let source = "{% set ns = namespace(n=0) %}{% set a = 'out' %}{% generation %}{% set ns.n = ns.n + 1 %}{% set a = 'in' %}{{ a }}{% endgeneration %}{{ ns.n }}{{ a }}";
        let r = template(source).render(&chat(json!([{"role": "user", "content": ""}])), false).unwrap();
        assert_eq!((r.text.as_str(), &r.generated[..]), ("in1out", &[0..2][..]));
    }

    #[test]
    fn other_uses_of_the_word_are_left_alone() {
        for source in [
            "{% if add_generation_prompt %}{% endif %}",
            "{# {% generation %} #}x",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{{ \"it's {% generation %}\" }}{% set a = '%}{% generation %}' %}",
        ] {
            assert_eq!(rewrite_generation(source), (source.to_string(), false));
        }
        assert_eq!(
            rewrite_generation("{%-generation%}a{%+ endgeneration -%}").0,
            "{%- filter generation_block %}{% with %}a{%+ endwith %}{% endfilter -%}"
        );
    }

    #[test]
    fn generation_blocks_taken_apart_are_an_error() {
        let source = "{% generation %}{% generation %}a{% endgeneration %}{% endgeneration %}";
        assert!(template(source).render(&chat(json!([{"role": "user", "content": ""}])), false).unwrap_err().contains("nested"));
    }

    proptest! {
        #[test]
        fn rewriting_keeps_all_other_text(source in "([{}%#'\" -]|raw|endraw|generation|é|\n){0,40}") {
            let (out, found) = rewrite_generation(&source);
            if !found {
                prop_assert_eq!(&out, &source);
            }
            let _ = ChatTemplate::new(&source, &Specials::default(), Clock::Fixed);
        }

        #[test]
        fn marks_come_out_whole(parts in prop::collection::vec(("[a-zé]{0,3}", any::<bool>()), 0..8)) {
            let marked: String = parts.iter().map(|(t, g)| if *g { format!("{BEGIN}{t}{END}") } else { t.clone() }).collect();
            let r = unmark(&marked).unwrap();
            prop_assert_eq!(&r.text, &parts.iter().map(|(t, _)| t.as_str()).collect::<String>());
            let inside: Vec<_> = r.generated.iter().map(|g| r.text[g.clone()].to_string()).collect();
            prop_assert_eq!(inside, parts.iter().filter(|(_, g)| *g).map(|(t, _)| t.clone()).collect::<Vec<_>>());
        }
    }
}
