//! Tokenising a text too long to be tokenised at once, with the same result.
//!
//! The text is cut into pieces, each tokenised with some text of its neighbours around it:
//!
//! ```text
//!   piece j    ───────────core──────────┼──context──┤
//!   piece j+1              ├──context───┼──────────core───────────
//!                                 ╲ the same eight tokens at the same bytes: cut in their middle
//! ```
//! Far enough from the ends of a piece, tokens do not depend on where it was cut, so near a boundary the tokens of both
//! pieces agree; the tokens of the first are taken up to a place where they do, and those of the second from there.
//! Where they never agree (one endless word) the two are joined and tokenised again.

use crate::{DataError, Tokenizer};
use rayon::prelude::*;

/// Bytes of the core of a piece.
pub(crate) const PIECE_BYTES: usize = 256 << 10;
/// Bytes of context on each side.
pub(crate) const CONTEXT_BYTES: usize = 2 << 10;
/// So many pieces are joined without finding agreement before the text is cut anyway: it has no words.
const JOINED_MAX: usize = 16;
/// Tokens that must agree.
const AGREE: usize = 8;

/// A token and the bytes of the text that it stands for, counted from the start of the document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Token {
    id: u32,
    start: u64,
    end: u64,
}

/// A tokenised piece.
#[derive(Debug)]
pub(crate) struct Piece {
    text: String,
    /// Place of the text in the document.
    at: u64,
    tokens: Vec<Token>,
}

impl Piece {
    /// Tokenises the piece of a document that begins at byte `at`.
    pub(crate) fn encode(tokenizer: &Tokenizer, text: String, at: u64) -> Result<Piece, DataError> {
        let (ids, offsets) = tokenizer.encode_with_offsets(&text)?;
        let token = |(id, (start, end)): (u32, (usize, usize))| Token { id, start: at + start as u64, end: at + end as u64 };
        let tokens = ids.into_iter().zip(offsets).map(token).collect();
        Ok(Piece { text, at, tokens })
    }

    fn end(&self) -> u64 {
        self.at + self.text.len() as u64
    }
}

/// Joins the pieces of one document, in order.
#[derive(Debug, Default)]
pub(crate) struct Stitcher {
    pending: Option<Piece>,
    /// Pieces that were joined into `pending`.
    joined: usize,
    /// So many tokens of `pending` have been taken from the piece before.
    taken: usize,
}

impl Stitcher {
    /// Adds the next piece and appends to `out` the ids that are certain now.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, piece: Piece, out: &mut Vec<u32>) -> Result<(), DataError> {
        let Some(before) = self.pending.take() else {
            self.pending = Some(piece);
            return Ok(());
        };
        let (end, begin) = match agreement(&before, &piece, self.taken) {
            Some(cut) => cut,
            None if self.joined < JOINED_MAX => {
                let Piece { mut text, at, .. } = before;
                // Both are cut at whole characters, so the place where the first ends is one in the second.
                let known = usize::try_from((at + text.len() as u64).saturating_sub(piece.at)).unwrap_or(0);
                text.push_str(piece.text.get(known..).unwrap_or_default());
                // Text before the cut is the same, so as many tokens of it are taken.
                self.pending = Some(Piece::encode(tokenizer, text, at)?);
                self.joined += 1;
                return Ok(());
            }
            None => {
                // Cut the text itself, in the middle of what both have: nothing is lost, whatever the offsets say.
                let shared = usize::try_from(before.end().saturating_sub(piece.at)).unwrap_or(0);
                let cut = piece.text.floor_char_boundary(shared / 2);
                let head = before.text.get(..before.text.len().saturating_sub(shared - cut)).unwrap_or(&before.text);
                let head = Piece::encode(tokenizer, head.to_string(), before.at)?;
                out.extend(head.tokens.iter().skip(self.taken).map(|t| t.id));
                let tail = Piece::encode(tokenizer, piece.text[cut..].to_string(), piece.at + cut as u64)?;
                *self = Stitcher { pending: Some(tail), joined: 0, taken: 0 };
                return Ok(());
            }
        };
        out.extend(before.tokens[self.taken..end].iter().map(|t| t.id));
        *self = Stitcher { pending: Some(piece), joined: 0, taken: begin };
        Ok(())
    }

    /// Appends the rest of the document, and is ready for another one.
    pub(crate) fn finish(&mut self, out: &mut Vec<u32>) {
        let Stitcher { pending, taken, .. } = std::mem::take(self);
        out.extend(pending.iter().flat_map(|p| p.tokens.iter().skip(taken)).map(|t| t.id));
    }
}

/// Where the tokens of two pieces may be joined, as an index into each: inside of the text that both have, with the
/// same tokens around it, and between two tokens that share no byte.
fn agreement(a: &Piece, b: &Piece, taken: usize) -> Option<(usize, usize)> {
    let margin = a.end().saturating_sub(b.at) / 4;
    let (from, to) = (b.at + margin, a.end().saturating_sub(margin));
    let mut j = 0;
    for i in a.tokens.partition_point(|t| t.start < from).max(taken)..a.tokens.len() {
        while b.tokens.get(j).is_some_and(|t| t.start < a.tokens[i].start) {
            j += 1;
        }
        let (x, y) = (a.tokens.get(i..i + AGREE)?, b.tokens.get(j..j + AGREE)?);
        if x[AGREE - 1].end > to {
            return None;
        }
        if x == y {
            let clean = (AGREE / 2..AGREE).find(|&k| x[k].start >= x[k - 1].end && x[k].start > x[k - 1].start);
            if let Some(k) = clean {
                return Some((i + k, j + k));
            }
        }
    }
    None
}

/// Ids of a text of any length, without special tokens.
pub(crate) fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, DataError> {
    if text.len() <= PIECE_BYTES {
        return tokenizer.encode(text, false);
    }
    encode_in_pieces(tokenizer, text, PIECE_BYTES, CONTEXT_BYTES)
}

fn encode_in_pieces(tokenizer: &Tokenizer, text: &str, piece: usize, context: usize) -> Result<Vec<u32>, DataError> {
    let mut ids = Vec::new();
    let mut stitcher = Stitcher::default();
    let cores: Vec<usize> = (0..text.len()).step_by(piece).collect();
    for group in cores.chunks(2 * rayon::current_num_threads()) {
        let encode = |&core: &usize| {
            let start = text.floor_char_boundary(core.saturating_sub(context));
            let end = text.floor_char_boundary((core + piece + context).min(text.len()));
            Piece::encode(tokenizer, text[start..end].to_string(), start as u64)
        };
        for piece in group.par_iter().map(encode).collect::<Vec<_>>() {
            stitcher.push(tokenizer, piece?, &mut ids)?;
        }
    }
    stitcher.finish(&mut ids);
    Ok(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenizerSource;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
    use tokenizers::pre_tokenizers::{byte_level::ByteLevel, metaspace::Metaspace};
    use tokenizers::{AddedToken, PreTokenizerWrapper};

    const WORDS: [&str; 14] =
        ["the", "whale", "and", "a", "sea", "captain's", "Höhe", "1851", "…", "ships", "—", "white", "鯨は大きい", "don't"];
    const SPACES: [&str; 6] = [" ", " ", " ", "\n", "  \n\n", ". "];

    fn prose(picks: &[(usize, usize)]) -> String {
        picks.iter().map(|&(w, s)| format!("{}{}", WORDS[w % WORDS.len()], SPACES[s % SPACES.len()])).collect()
    }

    /// Byte-level, metaspace and no pre-tokenizer at all, each with merges learnt from prose.
    static TOKENIZERS: LazyLock<Vec<Tokenizer>> = LazyLock::new(|| {
        let text = prose(&(0..4000).map(|i| (i * 7 + i / 11, i * 5 + i / 3)).collect::<Vec<_>>());
        let pre: [Option<PreTokenizerWrapper>; 3] = [Some(ByteLevel::default().into()), Some(Metaspace::default().into()), None];
        pre.into_iter()
            .map(|pre| {
                let mut tokenizer = tokenizers::Tokenizer::new(BPE::default());
                tokenizer.with_pre_tokenizer(pre);
                let special = AddedToken::from("<eos>", true);
                // A character that is in no token would be dropped.
                let alphabet = ByteLevel::alphabet().into_iter().chain("é\n".chars()).collect();
                let mut trainer: tokenizers::models::TrainerWrapper = BpeTrainerBuilder::new()
                    .vocab_size(600)
                    .show_progress(false)
                    .initial_alphabet(alphabet)
                    .special_tokens(vec![special])
                    .build()
                    .into();
                tokenizer.train(&mut trainer, text.lines()).unwrap();
                let dir = tempfile::tempdir().unwrap();
                let path = dir.path().join("tokenizer.json");
                tokenizer.save(&path, false).unwrap();
                Tokenizer::load(&TokenizerSource::beside(&path)).unwrap()
            })
            .collect()
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn pieces_give_the_tokens_of_the_whole(
            picks in prop::collection::vec((0usize..100, 0usize..100), 0..600),
            piece in 150usize..900, context in 60usize..150, which in 0usize..3,
        ) {
            let (tokenizer, text) = (&TOKENIZERS[which], prose(&picks));
            let (pieces, whole) = (encode_in_pieces(tokenizer, &text, piece, context).unwrap(), tokenizer.encode(&text, false).unwrap());
            let same = pieces.iter().zip(&whole).take_while(|(a, b)| a == b).count();
            prop_assert!(pieces == whole, "{same} of {} and {}: {:?} instead of {:?}", pieces.len(), whole.len(), &pieces[same.saturating_sub(3)..], &whole[same.saturating_sub(3)..]);
        }

        #[test]
        fn text_without_words_is_joined(length in 0usize..5000, which in 0usize..3, c in prop::sample::select(vec!["a", "th", "é", "  ", "\n"])) {
            let (tokenizer, text) = (&TOKENIZERS[which], c.repeat(length));
            prop_assert_eq!(encode_in_pieces(tokenizer, &text, 500, 100).unwrap(), tokenizer.encode(&text, false).unwrap());
        }
    }

    #[test]
    fn special_tokens_at_a_cut_stay_whole() {
        let tokenizer = &TOKENIZERS[0];
        let eos = tokenizer.encode("<eos>", false).unwrap();
        assert_eq!(eos.len(), 1);
        for shift in 0..12 {
            let text = format!("{}{}", "x".repeat(shift), "sea <eos>".repeat(200));
            let ids = encode_in_pieces(tokenizer, &text, 300, 100).unwrap();
            assert_eq!(ids.iter().filter(|id| **id == eos[0]).count(), 200);
            assert_eq!(ids, tokenizer.encode(&text, false).unwrap());
        }
    }

    #[test]
    fn endless_words_are_cut_and_keep_every_byte() {
        // Pairs of `a`, counted from the odd first byte in the first piece and from an even one in all others.
        let mut json = crate::testing::tokenizer_json(false);
        json["model"]["vocab"]["aa"] = 256.into();
        json["model"]["merges"] = serde_json::json!([["a", "a"]]);
        let dir = tempfile::tempdir().unwrap();
        let path = crate::testing::write(dir.path(), "tokenizer.json", json.to_string());
        let tokenizer = Tokenizer::load(&TokenizerSource::beside(&path)).unwrap();
        for pieces in [3, JOINED_MAX, JOINED_MAX + 2, 3 * JOINED_MAX] {
            let text = format!("x{}", "a".repeat(400 * pieces));
            let ids = encode_in_pieces(&tokenizer, &text, 400, 100).unwrap();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
            let whole = tokenizer.encode(&text, false).unwrap();
            assert_eq!(ids == whole, pieces <= JOINED_MAX, "{pieces}");
        }
    }
}
