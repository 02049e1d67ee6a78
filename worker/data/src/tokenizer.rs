//! A Hugging Face tokenizer with what surrounds it in a model folder: special tokens, end of text, chat template.

use crate::chat::{Conversation, Marked};
use crate::special::{self, Specials};
use crate::stream::ID_MASK;
use crate::template::{ChatTemplate, Clock};
use crate::{DataError, TextStream};
use serde::{Deserialize, Serialize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The files that a tokenizer is read from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerSource {
    /// tokenizer.json.
    pub tokenizer_json: PathBuf,
    /// tokenizer_config.json: names of the special tokens, often the chat template.
    pub tokenizer_config: Option<PathBuf>,
    /// chat_template.jinja; takes the place of a template in tokenizer_config.json.
    pub chat_template: Option<PathBuf>,
    /// special_tokens_map.json, of older folders.
    #[serde(default)]
    pub special_tokens_map: Option<PathBuf>,
    /// config.json of the model: `bos_token_id` and `eos_token_id` where no file above names them.
    #[serde(default)]
    pub model_config: Option<PathBuf>,
    /// generation_config.json of the model: more tokens that end a generated text.
    #[serde(default)]
    pub generation_config: Option<PathBuf>,
}

impl TokenizerSource {
    /// The tokenizer of a model folder; `None` where it has no tokenizer.json.
    pub fn find(model_dir: &Path) -> Option<TokenizerSource> {
        let json = model_dir.join("tokenizer.json");
        json.is_file().then(|| Self::beside(&json))
    }

    /// The given tokenizer.json with the files that lie beside it.
    pub fn beside(tokenizer_json: &Path) -> TokenizerSource {
        let dir = tokenizer_json.parent().unwrap_or(Path::new("."));
        let file = |name: &str| Some(dir.join(name)).filter(|p| p.is_file());
        TokenizerSource {
            tokenizer_json: tokenizer_json.to_path_buf(),
            tokenizer_config: file("tokenizer_config.json"),
            chat_template: file("chat_template.jinja"),
            special_tokens_map: file("special_tokens_map.json"),
            model_config: file("config.json"),
            generation_config: file("generation_config.json"),
        }
    }
}

/// A loaded tokenizer. May be used from many threads.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    /// Special tokens that the tokenizer itself puts before and after a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    specials: Specials,
    eos_ids: Vec<u32>,
    chat: Option<ChatTemplate>,
    /// Contents of special tokens, to recognise the end of a turn.
    special_texts: Vec<String>,
    max_base_id: u32,
    max_id: u32,
    digest: blake3::Hash,
}

impl Tokenizer {
    /// Reads a tokenizer and what belongs to it. In chat templates, `strftime_now` gives today's date (UTC).
    ///
    /// # Errors
    /// A file that is missing, is not what its name says, or names tokens that the tokenizer does not have; a chat
    /// template that does not compile.
    pub fn load(source: &TokenizerSource) -> Result<Tokenizer, DataError> {
        Self::load_with(source, Clock::Now)
    }

    /// The same with a fixed date, so that prepared data is a function of its files alone.
    pub(crate) fn load_with(source: &TokenizerSource, clock: Clock) -> Result<Tokenizer, DataError> {
        let path = &source.tokenizer_json;
        let bytes = std::fs::read(path).map_err(DataError::read(path))?;
        let bad = |reason: String| DataError::Tokenizer { path: path.clone(), reason };
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(&bytes))
            .map_err(|e| bad(format!("not a tokenizer that this program can read: {e}")))?;
        // Truncation and padding are settings for batches of short texts; training data is neither cut nor padded.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| bad(e.to_string()))?;

        let (prefix, suffix) = guarded(|| special::around(&inner)).map_err(|e| bad(format!("its post-processor fails: {e}")))?;
        // From here on special tokens are added by hand, and offsets are not trimmed.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);

        let config = source.tokenizer_config.as_deref().map(special::read_json).transpose()?;
        let (specials, eos_ids) = special::resolve(&inner, source, config.as_ref())?;
        let template = match &source.chat_template {
            Some(path) => Some((std::fs::read_to_string(path).map_err(DataError::read(path))?, path)),
            None => match (&config, &source.tokenizer_config) {
                (Some(config), Some(path)) => special::template_of(config, path)?.map(|t| (t, path)),
                _ => None,
            },
        };
        let mut hasher = blake3::Hasher::new();
        hasher.update(blake3::hash(&bytes).as_bytes());
        hasher.update(format!("{specials:?} {template:?}", template = template.as_ref().map(|t| &t.0)).as_bytes());
        let chat = template
            .map(|(text, path)| {
                ChatTemplate::new(&text, &specials, clock)
                    .map_err(|reason| DataError::Template { reason: format!("{}: {reason}", path.display()) })
            })
            .transpose()?;

        let mut special_texts: Vec<String> =
            inner.get_added_tokens_decoder().into_values().filter(|t| t.special).map(|t| t.content).collect();
        special_texts.extend(specials.eos.iter().map(|(text, _)| text.clone()));
        special_texts.retain(|t| !t.trim().is_empty());
        special_texts.sort();
        let max = |with_added: bool| inner.get_vocab(with_added).into_values().max().unwrap_or(0);
        let (max_base_id, max_id) = (max(false), max(true));
        if max_id > ID_MASK {
            return Err(bad(format!("it has token id {max_id}; ids must be below {}", ID_MASK + 1)));
        }
        Ok(Tokenizer {
            path: path.clone(),
            prefix,
            suffix,
            specials,
            eos_ids,
            chat,
            special_texts,
            max_base_id,
            max_id,
            digest: hasher.finalize(),
            inner,
        })
    }

    /// Token ids of `text`. With `add_special`, the tokens that the tokenizer itself puts around a text (such as a
    /// begin-of-text token) are added; text from a chat template carries its own and must be encoded without.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, DataError> {
        let body = guarded(|| self.inner.encode_fast(text, false)).map_err(|e| self.failed(e))?;
        if !add_special {
            return Ok(body.get_ids().to_vec());
        }
        Ok([&self.prefix, body.get_ids(), &self.suffix].concat())
    }

    /// Token ids without special tokens, and the bytes of `text` that each stands for.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<(usize, usize)>), DataError> {
        let encoding = guarded(|| self.inner.encode(text, false)).map_err(|e| self.failed(e))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// Text of `ids`; special tokens are left out with `skip_special`. Ids that the tokenizer does not have are
    /// skipped.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.failed(e))
    }

    /// Decodes a growing list of ids piece by piece.
    pub fn stream(&self, skip_special: bool) -> TextStream<'_> {
        TextStream::new(self, skip_special)
    }

    /// One more than the largest id, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.max_id as usize + 1
    }

    /// Begin-of-text token, if the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.specials.bos.as_ref().map(|(_, id)| *id)
    }

    /// End-of-text token: the one that follows each document in training data.
    pub fn eos(&self) -> Option<u32> {
        self.specials.eos.as_ref().map(|(_, id)| *id)
    }

    /// Every token that ends a generated text: [`Tokenizer::eos`] and those that config.json and
    /// generation_config.json list.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// A conversation as the model's chat template writes it. Each message is an object with `role` and `content`, and
    /// whatever else the template knows. The result is to be encoded without special tokens.
    ///
    /// # Errors
    /// The model has no chat template, or the template refuses the conversation.
    pub fn apply_chat_template(&self, messages: &[serde_json::Value], add_generation_prompt: bool) -> Result<String, DataError> {
        let refused = |reason| DataError::Template { reason };
        let conversation = Conversation::new(&serde_json::Value::from(messages), None).map_err(refused)?;
        Ok(self.template()?.render(&conversation, add_generation_prompt).map_err(refused)?.text)
    }

    /// Tokens of a conversation and which of them the assistant wrote.
    pub(crate) fn encode_conversation(&self, conversation: &Conversation) -> Result<Marked, DataError> {
        crate::chat::encode(self, self.template()?, conversation)
    }

    fn template(&self) -> Result<&ChatTemplate, DataError> {
        self.chat.as_ref().ok_or_else(|| DataError::Template {
            reason: format!(
                "the tokenizer {} has none (no chat_template.jinja and no `chat_template` in tokenizer_config.json); put one there, or train on plain text",
                self.path.display()
            ),
        })
    }

    /// Whether `text` ends with a special token.
    pub(crate) fn ends_with_special(&self, text: &str) -> bool {
        self.special_texts.iter().any(|s| text.ends_with(s.as_str()))
    }

    /// Tokens that the tokenizer puts before and after a document.
    pub(crate) fn around(&self) -> (&[u32], &[u32]) {
        (&self.prefix, &self.suffix)
    }

    /// tokenizer.json.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Largest id without added tokens.
    pub(crate) fn max_base_id(&self) -> u32 {
        self.max_base_id
    }

    /// Hash of all that decides which tokens a document becomes.
    pub(crate) fn digest(&self) -> blake3::Hash {
        self.digest
    }

    fn failed(&self, e: tokenizers::Error) -> DataError {
        DataError::Tokenizer { path: self.path.clone(), reason: format!("the tokenizer fails: {e}") }
    }
}

/// Runs a call of the tokenizers crate. A damaged file makes it fail, or trips an assertion or an index in it, on loading or
/// later; that is bad input like any other.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err("the file is damaged".into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BOS, CHATML, EOS, IM_END, VOCAB, bytes, model_dir, tokenizer_json, write};
    use serde_json::json;

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn special_tokens_are_added_once_and_only_when_asked_for() {
        let d = dir();
        let t = Tokenizer::load(&model_dir(d.path(), true, Some(CHATML))).unwrap();
        assert_eq!(t.encode("Hi", true).unwrap(), [&[BOS][..], &bytes("Hi")].concat());
        assert_eq!(t.encode("Hi", false).unwrap(), bytes("Hi"));
        assert_eq!(t.encode("", true).unwrap(), [BOS]);
        assert_eq!(t.encode("<eos>!", false).unwrap(), [EOS, 33]);
        assert_eq!((t.bos(), t.eos(), t.vocab_size(), t.max_base_id()), (Some(BOS), Some(EOS), VOCAB, 255));
        assert_eq!(t.decode(&[BOS, 72, 105, EOS], true).unwrap(), "Hi");
        let messages = [json!({"role": "user", "content": "Hi"})];
        assert_eq!(t.apply_chat_template(&messages, true).unwrap(), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
        assert!(t.apply_chat_template(&[], true).is_err());
    }

    #[test]
    fn ends_of_text_are_collected() {
        let d = dir();
        write(d.path(), "generation_config.json", json!({"eos_token_id": [259, 257]}).to_string());
        let t = Tokenizer::load(&model_dir(d.path(), false, None)).unwrap();
        assert_eq!((t.eos(), t.eos_ids()), (Some(EOS), &[EOS, IM_END][..]));
        // Without a name the id in config.json counts, and without that a well-known name.
        let d = dir();
        write(d.path(), "tokenizer.json", tokenizer_json(false).to_string());
        let plain = TokenizerSource::find(d.path()).unwrap();
        assert_eq!(Tokenizer::load(&plain).unwrap().eos(), Some(EOS));
        write(d.path(), "config.json", json!({"eos_token_id": 259, "bos_token_id": null}).to_string());
        let t = Tokenizer::load(&TokenizerSource::find(d.path()).unwrap()).unwrap();
        assert_eq!((t.bos(), t.eos(), t.eos_ids()), (None, Some(IM_END), &[IM_END][..]));
        // An older folder.
        write(d.path(), "special_tokens_map.json", json!({"eos_token": {"content": "<extra>"}}).to_string());
        assert_eq!(Tokenizer::load(&TokenizerSource::find(d.path()).unwrap()).unwrap().eos(), Some(260));
    }

    #[test]
    fn templates_are_found_where_models_keep_them() {
        let d = dir();
        model_dir(d.path(), false, None);
        let hello = [json!({"role": "user", "content": "Hi"})];
        let with = |template: serde_json::Value| {
            write(d.path(), "tokenizer_config.json", json!({"eos_token": "<eos>", "chat_template": template}).to_string());
            Tokenizer::load(&TokenizerSource::find(d.path()).unwrap()).and_then(|t| t.apply_chat_template(&hello, false))
        };
        assert_eq!(with(json!("{{ messages[0].content }}{{ eos_token }}")).unwrap(), "Hi<eos>");
        let tools = json!({"name": "tool_use", "template": "T"});
        assert_eq!(with(json!([tools, {"name": "default", "template": "D"}])).unwrap(), "D");
        assert_eq!(with(json!([tools])).unwrap(), "T");
        assert!(with(json!([tools, {"name": "rag", "template": "R"}])).unwrap_err().to_string().contains("`default`"));
        assert!(with(json!(5)).unwrap_err().to_string().contains("tokenizer_config.json"));
        assert!(with(json!(null)).unwrap_err().to_string().contains("has none"));
        assert!(with(json!("{% if %}")).unwrap_err().to_string().contains("line 1"));
        write(d.path(), "chat_template.jinja", "J");
        assert_eq!(with(json!("{{ 1 }}")).unwrap(), "J");
    }

    #[test]
    fn broken_files_are_named() {
        let d = dir();
        assert!(TokenizerSource::find(d.path()).is_none());
        let source = model_dir(d.path(), false, None);
        let mut json = tokenizer_json(false);
        json["model"]["vocab"]["\u{0100}"] = json!("zero");
        for bad in ["", "{", "[]", "{\"version\": \"1.0\"}", &json.to_string()] {
            write(d.path(), "tokenizer.json", bad);
            let e = Tokenizer::load(&source).unwrap_err().to_string();
            assert!(e.contains("tokenizer.json: not a tokenizer"), "{e}");
        }
        let mut json = tokenizer_json(false);
        json["model"]["vocab"]["huge"] = json!(1u32 << 30);
        write(d.path(), "tokenizer.json", json.to_string());
        assert!(Tokenizer::load(&source).unwrap_err().to_string().contains("token id 1073741824"));
        model_dir(d.path(), false, None);
        write(d.path(), "tokenizer_config.json", "{\"eos_token\": \"<nope>\"}");
        let e = Tokenizer::load(&source).unwrap_err().to_string();
        assert!(e.contains("tokenizer_config.json: `eos_token` is \"<nope>\""), "{e}");
        write(d.path(), "tokenizer_config.json", "nonsense");
        assert!(Tokenizer::load(&source).unwrap_err().to_string().contains("not valid JSON"));
        std::fs::remove_file(d.path().join("tokenizer.json")).unwrap();
        assert!(Tokenizer::load(&source).unwrap_err().to_string().contains("cannot read"));
    }

    #[test]
    fn a_post_processor_that_names_an_unknown_token_is_refused() {
        let d = dir();
        let source = model_dir(d.path(), true, None);
        let mut json = tokenizer_json(true);
        json["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"other": {"id": "<bos>", "ids": [256], "tokens": ["<bos>"]}},
        });
        write(d.path(), "tokenizer.json", json.to_string());
        let e = Tokenizer::load(&source).unwrap_err().to_string();
        assert!(e.contains("tokenizer.json") && e.contains("post-processor"), "{e}");
    }

    #[test]
    fn the_digest_sees_what_decides_the_tokens() {
        let digest = |bos: bool, template: Option<&str>| {
            let d = dir();
            Tokenizer::load(&model_dir(d.path(), bos, template)).unwrap().digest()
        };
        assert_eq!(digest(true, None), digest(true, None));
        assert_ne!(digest(true, None), digest(false, None));
        assert_ne!(digest(true, None), digest(true, Some(CHATML)));
    }
}
