//! Text of a growing list of token ids, handed out as soon as it is certain.

use crate::{DataError, Tokenizer};

/// Decodes ids one at a time. What it hands out never ends inside of a UTF-8 character, and all pieces together are
/// what [`Tokenizer::decode`] makes of all ids, as long as these are bytes of UTF-8 text. Bytes that are not become
/// replacement characters.
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

/// Ids that an unfinished character can be spread over: the longest has four bytes, and each id has at least one.
const UNFINISHED_MAX: usize = 3;

impl<'t> TextStream<'t> {
    pub(crate) fn new(tokenizer: &'t Tokenizer, skip_special: bool) -> Self {
        TextStream { tokenizer, skip_special, ids: Vec::new(), context: 0, done: 0 }
    }

    /// Adds one id and returns the text that is certain now; often empty.
    pub fn push(&mut self, id: u32) -> Result<String, DataError> {
        self.ids.push(id);
        // Text that ends with a replacement character may go on with the rest of a character; what comes before it does
        // not. Ids that cannot belong to an unfinished one are handed out whatever they are.
        let pending = self.ids.len() - self.done;
        for held in 0..UNFINISHED_MAX.min(pending) {
            let text = self.text(self.ids.len() - held)?;
            if !text.ends_with('\u{FFFD}') {
                return self.take(text, self.ids.len() - held);
            }
        }
        if pending <= UNFINISHED_MAX {
            return Ok(String::new());
        }
        let end = self.ids.len() - UNFINISHED_MAX;
        self.take(self.text(end)?, end)
    }

    /// Returns what is left when no id follows.
    pub fn finish(&mut self) -> Result<String, DataError> {
        let end = self.ids.len();
        self.take(self.text(end)?, end)
    }

    /// Text of the ids before `end`, beginning with those that give context.
    fn text(&self, end: usize) -> Result<String, DataError> {
        // Decoders treat the first token of a text differently (a leading space is dropped), so new ids are decoded
        // after the last ones that were handed out, and the text of those is cut off.
        self.tokenizer.decode(&self.ids[self.context..end], self.skip_special)
    }

    /// Hands out what `text`, the text of the ids before `end`, has beyond what was handed out.
    fn take(&mut self, text: String, end: usize) -> Result<String, DataError> {
        let before = self.text(self.done)?;
        let new = text.get(before.len()..).unwrap_or_default().to_string();
        if !new.is_empty() {
            self.context = self.done;
            self.done = end;
        }
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use crate::Tokenizer;
    use crate::testing::{EOS, model_dir};
    use proptest::prelude::*;

    fn tokenizer() -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        Tokenizer::load(&model_dir(dir.path(), true, None)).unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> Vec<String> {
        let mut stream = tokenizer.stream(skip_special);
        let mut pieces: Vec<_> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let t = tokenizer();
        let ids = t.encode("aé鯨🐋.", false).unwrap();
        assert_eq!(ids.len(), 11);
        assert_eq!(pieces(&t, &ids, true), ["a", "", "é", "", "", "鯨", "", "", "", "🐋", ".", ""]);
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced() {
        let t = tokenizer();
        assert_eq!(pieces(&t, &[97, 0xF0, 0x9F], true), ["a", "", "", "\u{FFFD}"]);
        // Stray bytes do not hold back what follows them, nor spoil it.
        let whale = t.encode("🐋!", false).unwrap();
        for stray in 1..12 {
            let pieces = pieces(&t, &[&vec![0xFF; stray], &whale[..]].concat(), true);
            assert_eq!(pieces.concat().trim_start_matches('\u{FFFD}'), "🐋!", "{stray}");
            assert_eq!(pieces[stray + 4], "!");
        }
    }

    #[test]
    fn special_tokens_are_shown_or_left_out() {
        let t = tokenizer();
        assert_eq!(pieces(&t, &[97, EOS, 98], true).concat(), "ab");
        assert_eq!(pieces(&t, &[97, EOS, 98], false).concat(), "a<eos>b");
    }

    proptest! {
        #[test]
        fn pieces_add_up_to_the_text(text in "\\PC{0,40}") {
            let t = tokenizer();
            let pieces = pieces(&t, &t.encode(&text, false).unwrap(), false);
            // A replacement character of the text itself cannot be told from one that stands for a stray byte.
            let plain = |text: String| text.replace('\u{FFFD}', "");
            prop_assert_eq!(plain(pieces.concat()), plain(text));
        }
    }
}
