//! Text of a growing list of token ids, handed out as soon as it is certain.

use crate::{DataError, Tokenizer};

/// Decodes ids one at a time. What it hands out never ends inside of a UTF-8 character, and all pieces together are
/// what [`Tokenizer::decode`] makes of all ids, as long as these are bytes of UTF-8 text.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    skip_special: bool,
    ids: Vec<u32>,
    /// Ids before this only gave context to those that follow; their text is not needed any more.
    context: usize,
    /// Ids before this have been handed out.
    done: usize,
}

/// Pending ids after which text that still is not UTF-8 is handed out with replacement characters. The longest character
/// has four bytes, so this leaves room for a whole one after a few stray bytes.
const PENDING_MAX: usize = 8;

impl<'t> TextStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        TextStream { tokenizer, skip_special, ids: Vec::new(), context: 0, done: 0 }
    }

    /// Adds one id and returns the text that is certain now; often empty.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        self.take(self.ids.len() - self.done > PENDING_MAX)
    }

    /// Returns what is left when no id follows.
    pub fn finish(&mut self) -> Result<String, DataError> {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> Result<String, DataError> {
        // Decoders treat the first token of a text differently (a leading space is dropped), so the new ids are
        // decoded after the last ones that were handed out, and the text of those is cut off.
        let before = self.tokenizer.decode(&self.ids[self.context..self.done], self.skip_special)?;
        let text = self.tokenizer.decode(&self.ids[self.context..], self.skip_special)?;
        if text.ends_with('\u{FFFD}') && !all {
            return Ok(String::new());
        }
        let new = text.get(before.len()..).unwrap_or_default().to_string();
        if !new.is_empty() || all {
            self.context = self.done;
            self.done = self.ids.len();
        }
        Ok(new)
    }
}
