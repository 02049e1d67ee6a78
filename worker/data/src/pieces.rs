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
/// Text that was joined up to this length without finding agreement is cut anyway: it has no words.
const JOINED_MAX_BYTES: usize = 4 << 20;
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
    /// Tokens of `pending` that begin before this byte have been taken from the piece before.
    taken: u64,
}

impl Stitcher {
    /// Adds the next piece and appends to `out` the ids that are certain now.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, piece: Piece, out: &mut Vec<u32>) -> Result<(), DataError> {
        let Some(before) = self.pending.take() else {
            self.pending = Some(piece);
            return Ok(());
        };
        let cut = match agreement(&before, &piece, self.taken) {
            Some(cut) => cut,
            None if before.text.len() < JOINED_MAX_BYTES => {
                let Piece { mut text, at, .. } = before;
                // Both are cut at whole characters, so the place where the first ends is one in the second.
                let known = usize::try_from((at + text.len() as u64).saturating_sub(piece.at)).unwrap_or(0);
                text.push_str(piece.text.get(known..).unwrap_or_default());
                self.pending = Some(Piece::encode(tokenizer, text, at)?);
                return Ok(());
            }
            None => (piece.at + before.end()) / 2,
        };
        self.take(&before, cut, out);
        self.pending = Some(piece);
        Ok(())
    }

    /// Appends the rest of the document, and is ready for another one.
    pub(crate) fn finish(&mut self, out: &mut Vec<u32>) {
        if let Some(last) = self.pending.take() {
            self.take(&last, u64::MAX, out);
        }
        self.taken = 0;
    }

    fn take(&mut self, piece: &Piece, cut: u64, out: &mut Vec<u32>) {
        out.extend(piece.tokens.iter().skip_while(|t| t.start < self.taken).take_while(|t| t.start < cut).map(|t| t.id));
        self.taken = cut;
    }
}

/// A byte at which the tokens of two pieces may be joined: inside of what both have, with the same tokens around it,
/// and between two tokens that share no byte.
fn agreement(a: &Piece, b: &Piece, taken: u64) -> Option<u64> {
    let margin = (a.end() - b.at.min(a.end())) / 4;
    let (from, to) = ((b.at + margin).max(taken), a.end().saturating_sub(margin));
    let a = &a.tokens[a.tokens.partition_point(|t| t.start < from)..];
    let b = &b.tokens[b.tokens.partition_point(|t| t.start < from)..];
    let mut j = 0;
    for i in 0..a.len() {
        while j < b.len() && b[j].start < a[i].start {
            j += 1;
        }
        let (x, y) = (a.get(i..i + AGREE)?, b.get(j..j + AGREE)?);
        if x[AGREE - 1].end > to {
            return None;
        }
        if x == y {
            let clean = (AGREE / 2..AGREE).find(|&k| x[k].start >= x[k - 1].end && x[k].start > x[k - 1].start);
            if let Some(k) = clean {
                return Some(x[k].start);
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
    let mut ids = Vec::new();
    let mut stitcher = Stitcher::default();
    let cores: Vec<usize> = (0..text.len()).step_by(PIECE_BYTES).collect();
    for group in cores.chunks(2 * rayon::current_num_threads()) {
        let encode = |&core: &usize| {
            let start = text.floor_char_boundary(core.saturating_sub(CONTEXT_BYTES));
            let end = text.floor_char_boundary((core + PIECE_BYTES + CONTEXT_BYTES).min(text.len()));
            Piece::encode(tokenizer, text[start..end].to_string(), start as u64)
        };
        for piece in group.par_iter().map(encode).collect::<Vec<_>>() {
            stitcher.push(tokenizer, piece?, &mut ids)?;
        }
    }
    stitcher.finish(&mut ids);
    Ok(ids)
}
