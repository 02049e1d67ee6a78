//! A stream of tokens over one or more mapped files, and the windows that training takes from it.

use crate::{DataError, DataFile, map::Map};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

/// Bits of a cached token that hold its id.
pub(crate) const ID_MASK: u32 = (1 << 30) - 1;
/// Set in a cached token that begins a document.
pub(crate) const FLAG_START: u32 = 1 << 30;
/// Set in a cached token that is context only: no loss where it is the target.
pub(crate) const FLAG_NO_LOSS: u32 = 1 << 31;

/// How the words of a stream are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Words {
    /// Words of a token cache: id and flags.
    Flagged,
    /// Plain ids; a document begins with each file and after each end-of-text token, if one is known.
    Plain {
        /// Id of the end-of-text token.
        end_of_text: Option<u32>,
    },
}

/// Tokens of several files, one after the other.
#[derive(Debug)]
pub(crate) struct Stream {
    segments: Vec<Segment>,
    tokens: u64,
    words: Words,
    /// Ids at or above this are errors.
    id_limit: u32,
}

#[derive(Debug)]
struct Segment {
    map: Map,
    file: DataFile,
    /// Index in the stream of its first token.
    first: u64,
}

impl Stream {
    pub(crate) fn open(files: &[DataFile], words: Words, vocab_size: Option<usize>) -> Result<Stream, DataError> {
        let mut tokens = 0u64;
        let mut segments = Vec::with_capacity(files.len());
        for file in files {
            let map = file.map()?;
            let end = file.items.checked_mul(4).and_then(|n| n.checked_add(file.data_offset));
            if end.is_none_or(|end| end > map.len() as u64) {
                return Err(DataError::file(&file.path, "the description of this file is damaged; submit the job again"));
            }
            segments.push(Segment { map, file: file.clone(), first: tokens });
            tokens += file.items;
        }
        let id_limit = vocab_size.map_or(u32::MAX, |v| u32::try_from(v).unwrap_or(u32::MAX));
        Ok(Stream { segments, tokens, words, id_limit })
    }

    pub(crate) fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Copies the raw words `start .. start + out.len()`, which must lie inside of the stream.
    fn read(&self, mut start: u64, mut out: &mut [u32]) {
        let mut index = self.segments.partition_point(|s| s.first + s.file.items <= start);
        while !out.is_empty() {
            let segment = &self.segments[index];
            let place = start - segment.first;
            // The lengths were checked against the map when the stream was opened.
            let n = ((segment.file.items - place) as usize).min(out.len());
            let at = (segment.file.data_offset + place * 4) as usize;
            let (head, rest) = out.split_at_mut(n);
            for (word, bytes) in head.iter_mut().zip(segment.map[at..at + n * 4].chunks_exact(4)) {
                *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            }
            out = rest;
            start += n as u64;
            index += 1;
        }
    }

    /// Path of the file that holds token `at`, and the index of the token in it.
    fn locate(&self, at: u64) -> (&Path, u64) {
        let index = self.segments.partition_point(|s| s.first + s.file.items <= at).min(self.segments.len().saturating_sub(1));
        self.segments.get(index).map_or((Path::new(""), at), |s| (&s.file.path, at - s.first))
    }

    fn id_error(&self, at: u64, id: u32) -> DataError {
        let (path, position) = self.locate(at);
        DataError::TokenRange { path: path.to_path_buf(), position, id, vocab_size: self.id_limit as usize }
    }
}

/// The sequences of one split. Cheap to clone; may be used from many threads.
#[derive(Debug, Clone)]
pub struct Split {
    stream: Arc<Stream>,
    /// Sequences of the stream, by their number.
    range: Range<u64>,
    sequence_length: usize,
    /// Whether a token that begins a document is left out of the loss.
    document_mask: bool,
}

impl Split {
    pub(crate) fn new(stream: Arc<Stream>, range: Range<u64>, sequence_length: usize, document_mask: bool) -> Split {
        Split { stream, range, sequence_length, document_mask }
    }

    /// Number of sequences.
    pub fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Inputs (and targets) of a sequence.
    pub fn sequence_length(&self) -> usize {
        self.sequence_length
    }

    /// Reads sequence `i`: with L the sequence length, `inputs` are tokens iL .. iL+L of the stream, `targets` tokens
    /// iL+1 .. iL+L+1 (ends excluded). `weights` is 1 where the target counts in the loss and 0 where it does not.
    /// `document_starts`, where asked for, gets for each input the index in this sequence at which its document
    /// begins; 0 for a document that began earlier. All slices have length L.
    ///
    /// # Errors
    /// A token id that is not below the vocabulary size, which can only be if the file changed after it was checked.
    ///
    /// # Panics
    /// Where `i` is not below [`Split::len`], or a slice is not L long.
    pub fn sequence(
        &self,
        i: u64,
        inputs: &mut [u32],
        targets: &mut [u32],
        weights: &mut [f32],
        document_starts: Option<&mut [i32]>,
    ) -> Result<(), DataError> {
        let length = self.sequence_length;
        assert!(i < self.len(), "sequence {i} of {}", self.len());
        assert!(inputs.len() == length && targets.len() == length && weights.len() == length, "slices must hold {length} tokens");
        let stream = &*self.stream;
        let start = (self.range.start + i) * length as u64;
        stream.read(start, inputs);
        targets[..length - 1].copy_from_slice(&inputs[1..]);
        stream.read(start + length as u64, &mut targets[length - 1..]);

        match stream.words {
            Words::Flagged => {
                for (weight, &word) in weights.iter_mut().zip(&*targets) {
                    let masked = word & FLAG_NO_LOSS != 0 || (self.document_mask && word & FLAG_START != 0);
                    *weight = if masked { 0.0 } else { 1.0 };
                }
                if let Some(starts) = document_starts {
                    fill_starts(starts, length, |t| inputs[t] & FLAG_START != 0);
                }
                inputs.iter_mut().chain(targets.iter_mut()).for_each(|word| *word &= ID_MASK);
            }
            Words::Plain { end_of_text } => {
                let ends = |word: u32| end_of_text == Some(word);
                // A file that begins inside of the window begins a document there.
                let after_start = stream.segments.partition_point(|s| s.first <= start);
                let files = || stream.segments[after_start..].iter().map(|s| s.first - start).take_while(|t| *t <= length as u64);
                weights.fill(1.0);
                if self.document_mask {
                    for (t, weight) in weights.iter_mut().enumerate() {
                        if ends(inputs[t]) {
                            *weight = 0.0;
                        }
                    }
                    files().for_each(|t| weights[t as usize - 1] = 0.0);
                }
                if let Some(starts) = document_starts {
                    let mut boundary = files().peekable();
                    fill_starts(starts, length, |t| {
                        let mut begins = t > 0 && ends(inputs[t - 1]);
                        while boundary.next_if(|b| *b <= t as u64).is_some() {
                            begins = true;
                        }
                        begins
                    });
                }
            }
        }
        for (t, &id) in inputs.iter().chain(&targets[length - 1..]).enumerate() {
            if id >= stream.id_limit {
                return Err(stream.id_error(start + t as u64, id));
            }
        }
        Ok(())
    }
}

fn fill_starts(starts: &mut [i32], length: usize, mut begins: impl FnMut(usize) -> bool) {
    assert_eq!(starts.len(), length, "slices must hold {length} tokens");
    let mut begin = 0;
    for (t, start) in starts.iter_mut().enumerate() {
        if begins(t) {
            begin = t as i32;
        }
        *start = begin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::modified_ns;
    use crate::testing::{token_bytes, write};
    use proptest::prelude::*;

    fn file(dir: &Path, name: &str, words: &[u32]) -> DataFile {
        let path = write(dir, name, token_bytes(words.iter().copied()));
        let meta = path.metadata().unwrap();
        DataFile {
            path,
            bytes: meta.len(),
            modified_ns: modified_ns(&meta),
            blake3: String::new(),
            data_offset: 0,
            items: words.len() as u64,
        }
    }

    fn split(files: &[DataFile], words: Words, length: usize, document_mask: bool) -> Split {
        let stream = Stream::open(files, words, Some(1000)).unwrap();
        let n = crate::dataset::sequences(stream.tokens(), length);
        Split::new(Arc::new(stream), 0..n, length, document_mask)
    }

    #[derive(Debug, PartialEq)]
    struct Sequence {
        inputs: Vec<u32>,
        targets: Vec<u32>,
        weights: Vec<f32>,
        starts: Vec<i32>,
    }

    fn read(split: &Split, i: u64) -> Sequence {
        let n = split.sequence_length();
        let mut s = Sequence { inputs: vec![0; n], targets: vec![0; n], weights: vec![9.0; n], starts: vec![9; n] };
        split.sequence(i, &mut s.inputs, &mut s.targets, &mut s.weights, Some(&mut s.starts)).unwrap();
        s
    }

    #[test]
    fn windows_share_one_token_and_the_last_partial_one_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let files = [file(dir.path(), "a", &(0..12).collect::<Vec<_>>())];
        let split = split(&files, Words::Plain { end_of_text: None }, 4, false);
        // 0..=4 and 4..=8; for 8..=12 one token is missing.
        assert_eq!(split.len(), 2);
        assert_eq!(
            read(&split, 1),
            Sequence { inputs: vec![4, 5, 6, 7], targets: vec![5, 6, 7, 8], weights: vec![1.0; 4], starts: vec![0; 4] }
        );
    }

    #[test]
    fn loss_and_documents_come_from_the_flags() {
        let (s, n) = (FLAG_START, FLAG_NO_LOSS);
        let dir = tempfile::tempdir().unwrap();
        let files = [file(dir.path(), "a", &[1 | s | n, 2, 3, 4 | s, 5 | n, 6, 7])];
        let expected = |weights: [f32; 6]| Sequence {
            inputs: vec![1, 2, 3, 4, 5, 6],
            targets: vec![2, 3, 4, 5, 6, 7],
            weights: weights.to_vec(),
            starts: vec![0, 0, 0, 3, 3, 3],
        };
        assert_eq!(read(&split(&files, Words::Flagged, 6, false), 0), expected([1.0, 1.0, 1.0, 0.0, 1.0, 1.0]));
        assert_eq!(read(&split(&files, Words::Flagged, 6, true), 0), expected([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]));
    }

    #[test]
    fn in_plain_files_documents_end_with_the_end_of_text() {
        let dir = tempfile::tempdir().unwrap();
        let files = [file(dir.path(), "a", &[1, 0, 2, 3]), file(dir.path(), "b", &[4, 0]), file(dir.path(), "c", &[5, 6, 7])];
        let s = read(&split(&files, Words::Plain { end_of_text: Some(0) }, 8, true), 0);
        assert_eq!(s.inputs, [1, 0, 2, 3, 4, 0, 5, 6]);
        assert_eq!(s.starts, [0, 0, 2, 2, 4, 4, 6, 6]);
        // Not counted: 2 after an end, 4 (first of a file), 5 (both).
        assert_eq!(s.weights, [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]);
    }

    #[test]
    fn ids_outside_of_the_vocabulary_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let files = [file(dir.path(), "a", &[1, 2, 3]), file(dir.path(), "b", &[4, 1000])];
        let split = split(&files, Words::Plain { end_of_text: None }, 4, false);
        let (mut a, mut b, mut w) = ([0; 4], [0; 4], [0.0; 4]);
        let e = split.sequence(0, &mut a, &mut b, &mut w, None).unwrap_err().to_string();
        assert!(e.contains("/b: token 1 (byte 4) is 1000") && e.contains("ends at 999"), "{e}");
    }

    #[test]
    fn descriptions_that_reach_beyond_the_file_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let good = file(dir.path(), "a", &[1, 2, 3]);
        for (data_offset, items) in [(0, 4), (4, 3), (u64::MAX, 1), (1, u64::MAX), (13, 0)] {
            let bad = DataFile { data_offset, items, ..good.clone() };
            assert!(Stream::open(&[bad], Words::Flagged, None).is_err(), "{data_offset} {items}");
        }
    }

    proptest! {
        #[test]
        fn every_window_is_cut_from_the_joined_files(
            parts in prop::collection::vec(prop::collection::vec(0u32..1000, 0..30), 1..6), length in 1usize..20,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let files: Vec<_> = parts.iter().enumerate().map(|(i, p)| file(dir.path(), &i.to_string(), p)).collect();
            let all = parts.concat();
            let split = split(&files, Words::Plain { end_of_text: None }, length, false);
            prop_assert_eq!(split.len() as usize, all.len().saturating_sub(1) / length);
            for i in 0..split.len() {
                let s = read(&split, i);
                let at = i as usize * length;
                prop_assert_eq!(&s.inputs[..], &all[at..at + length]);
                prop_assert_eq!(&s.targets[..], &all[at + 1..at + length + 1]);
            }
        }
    }
}
