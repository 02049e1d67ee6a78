//! A Hugging Face tokenizer with what surrounds it in a model folder: special tokens, end of text, chat template.

use crate::chat::{Conversation, Marked};
use crate::special::{self, Specials};
use crate::template::{ChatTemplate, Clock};
use crate::{DataError, TextStream};
use serde::{Deserialize, Serialize};
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
        // A damaged file can trip an assertion in the tokenizers crate; that is bad input like any other.
        let loaded = std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(&bytes));
        let mut inner = match loaded {
            Ok(Ok(t)) => t,
            Ok(Err(e)) => return Err(bad(format!("not a tokenizer that this program can read: {e}"))),
            Err(_) => return Err(bad("not a tokenizer that this program can read: the file is damaged".into())),
        };
        // Truncation and padding are settings for batches of short texts; training data is neither cut nor padded.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| bad(e.to_string()))?;

        let (prefix, suffix) = special::around(&inner).map_err(|e| bad(format!("its post-processor fails: {e}")))?;
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
        let max = |with_added| inner.get_vocab(with_added).into_values().max().unwrap_or(0);
        let (max_base_id, max_id) = (max(false), max(true));
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
        let body = self.inner.encode_fast(text, false).map_err(|e| self.failed(e))?;
        if !add_special {
            return Ok(body.get_ids().to_vec());
        }
        Ok([&self.prefix, body.get_ids(), &self.suffix].concat())
    }

    /// Token ids without special tokens, and the bytes of `text` that each stands for.
    pub(crate) fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<(usize, usize)>), DataError> {
        let encoding = self.inner.encode(text, false).map_err(|e| self.failed(e))?;
        Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
    }

    /// Text of `ids`; special tokens are left out with `skip_special`. Ids that the tokenizer does not have are
    /// skipped.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, DataError> {
        self.inner.decode(ids, skip_special).map_err(|e| self.failed(e))
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
