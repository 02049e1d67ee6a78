//! A tokenizer that tests can compute by hand: one token for each byte, whose id is the byte, and special tokens from
//! 256 on.
#![allow(dead_code, clippy::unwrap_used)]

use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Special tokens of the test tokenizer, from id 256 on.
pub const SPECIALS: [&str; 5] = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<extra>"];
pub const BOS: u32 = 256;
pub const EOS: u32 = 257;
pub const IM_START: u32 = 258;
pub const IM_END: u32 = 259;
pub const EXTRA: u32 = 260;
pub const VOCAB: usize = 261;

/// A template in the style of ChatML, which most models use.
pub const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// The character that stands for a byte in byte-level vocabularies.
pub fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return byte as char;
    }
    let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
    char::from_u32(256 + before).unwrap()
}

/// tokenizer.json of the byte tokenizer; with `bos`, its post-processor begins each text with `<bos>`.
pub fn tokenizer_json(bos: bool) -> Value {
    let vocab: serde_json::Map<String, Value> = (0..=255u8).map(|b| (byte_char(b).to_string(), json!(b))).collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(i, s)| json!({"id": 256 + i, "content": s, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let template = json!({
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}},
    });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": if bos { template } else { byte_level.clone() }, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// Writes a model folder with the byte tokenizer and a chat template.
pub fn model_dir(dir: &Path, bos: bool, template: Option<&str>) -> super::TokenizerSource {
    write(dir, "tokenizer.json", tokenizer_json(bos).to_string());
    write(dir, "tokenizer_config.json", json!({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": null}).to_string());
    if let Some(template) = template {
        write(dir, "chat_template.jinja", template);
    }
    super::TokenizerSource::find(dir).unwrap()
}

/// Writes a file and returns its path.
pub fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

/// Little-endian u32.
pub fn token_bytes(ids: impl IntoIterator<Item = u32>) -> Vec<u8> {
    ids.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// Ids of a text without special tokens.
pub fn bytes(text: &str) -> Vec<u32> {
    text.bytes().map(u32::from).collect()
}
