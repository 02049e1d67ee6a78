//! The files around a tokenizer, and a conversation: refused, or they encode, decode and render without a panic.
//!
//! Input: tokenizer.json, tokenizer_config.json, chat_template.jinja, messages (JSON), text; empty parts are no files.

use crate::ramtorch_fuzz::{file, fixture, joined, no_file, parts};
use ramtorch_data::{Tokenizer, TokenizerSource};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
const TRICKS: &str = "{%- set ns = namespace(x=0) -%}{% for m in messages %}{% if m['role'] == 'user' %}{{ m.content | trim | upper }}{% elif m.role == 'assistant' %}{% generation %}{{ m.content.split('a')[-1].strip() }}{% endgeneration %}{% else %}{{ m | tojson }}{{ raise_exception('no') }}{% endif %}{% set ns.x = ns.x + loop.index0 %}{% endfor %}{{ bos_token }}{{ strftime_now('%d %b %Y') }}{{ messages[1:] | length }}{% macro f(x) %}{{ x }}{% endmacro %}{{ f(3) }}";
const MESSAGES: &str = r#"[{"role":"user","content":"Hi a"},{"role":"assistant","content":"Yo"}]"#;
const SMALL: &str = r#"{"version":"1.0","added_tokens":[{"id":3,"content":"<|im_end|>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":null,"decoder":{"type":"ByteLevel"},"model":{"type":"BPE","vocab":{"a":0,"b":1,"ab":2},"merges":["a b"]}}"#;
const WORDS: &str = r#"{"version":"1.0","added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Lowercase"},{"type":"Replace","pattern":{"Regex":"[0-9]+"},"content":"n"}]},"pre_tokenizer":{"type":"Whitespace"},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"a","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[],"special_tokens":{"a":{"id":"a","ids":[0],"tokens":["a"]}}},"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"[UNK]":1},"unk_token":"[UNK]"}}"#;
const CONFIG: &str =
    r#"{"bos_token":null,"eos_token":"<|im_end|>","chat_template":[{"name":"default","template":"{{ messages[0].content }}"}]}"#;

/// Inputs to begin with.
pub fn seeds() -> Vec<Vec<u8>> {
    let [json, config, small, words] = [&fixture("models/gpt2/tokenizer.json")[..], CONFIG.as_bytes(), SMALL.as_bytes(), WORDS.as_bytes()];
    vec![
        joined(&[small, config, b"", MESSAGES.as_bytes(), b"abba ab"]),
        joined(&[small, b"", CHATML.as_bytes(), MESSAGES.as_bytes(), b"abba ab"]),
        joined(&[words, b"", TRICKS.as_bytes(), MESSAGES.as_bytes(), b"a 12 b"]),
        joined(&[json, b"", b"", MESSAGES.as_bytes(), b"abba ab"]),
    ]
}

/// One input.
pub fn run(data: &[u8]) {
    let [json, config, template, messages, text] = parts::<5>(data);
    let source = |name: &str, content: &[u8]| {
        if content.is_empty() {
            no_file(name);
            None
        } else {
            Some(file(name, content))
        }
    };
    let source = TokenizerSource {
        tokenizer_json: file("tokenizer.json", json),
        tokenizer_config: source("tokenizer_config.json", config),
        chat_template: source("chat_template.jinja", template),
        ..TokenizerSource::default()
    };
    let Ok(tokenizer) = Tokenizer::load(&source) else { return };
    let text = String::from_utf8_lossy(text);
    if let Ok(ids) = tokenizer.encode(&text, true) {
        let _ = tokenizer.decode(&ids, true);
        let mut stream = tokenizer.stream(true);
        for id in ids.iter().chain(&[u32::MAX, 0]) {
            let _ = stream.push(*id);
        }
        let _ = stream.finish();
    }
    if let Ok(messages) = serde_json::from_slice::<Vec<serde_json::Value>>(messages) {
        let _ = tokenizer.apply_chat_template(&messages, true);
        let _ = tokenizer.apply_chat_template(&messages, false);
    }
}
