//! A token cache, or a ready token file: refused, or every sequence of it can be read.
//!
//! Input: first byte: bit 0 a cache (else a token file), bit 1 its checksums are made right, bits 2 to 7 the length of sequences;
//! then the file.
#![no_main]

use ramtorch_data::{DataKind, Dataset, Source, fuzzing};
use ramtorch_fuzz::{file, folder};
use ramtorch_job::JobSpec;
use std::path::Path;

const KEY: [u8; 32] = [7; 32];
const HEADER: usize = 4096;

/// A whole cache of these words.
fn cache(words: &[u32], documents: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..8].copy_from_slice(b"RTTOKENS");
    bytes[8] = 1;
    bytes[16..48].copy_from_slice(&KEY);
    bytes[80..88].copy_from_slice(&(words.len() as u64).to_le_bytes());
    bytes[88..96].copy_from_slice(&documents.to_le_bytes());
    bytes[96..104].copy_from_slice(&(words.len() as u64).to_le_bytes());
    bytes[104..108].copy_from_slice(&words.iter().map(|w| w & 0x3fff_ffff).max().unwrap_or(0).to_le_bytes());
    words.iter().for_each(|w| bytes.extend(w.to_le_bytes()));
    fuzzing::seal_cache(&mut bytes);
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let words: Vec<u32> = (0..40).map(|i| i % 9 | if i % 11 == 0 { 1 << 30 } else { 0 } | if i % 5 == 0 { 1 << 31 } else { 0 }).collect();
    let plain: Vec<u8> = (0..64u32).flat_map(|i| (i % 9).to_le_bytes()).collect();
    let with = |first: u8, rest: &[u8]| [&[first][..], rest].concat();
    vec![with(0b1111, &cache(&words, 4)), with(0b10011, &cache(&words[..5], 1)), with(0b1100, &plain), with(1, &cache(&[], 0))]
}

fn read(data: &Dataset) {
    let Ok(open) = data.open() else { return };
    let length = data.sequence_length;
    for split in open.train().into_iter().chain(open.validation()) {
        let (mut inputs, mut targets, mut weights, mut starts) = (vec![0; length], vec![0; length], vec![0.0; length], vec![0; length]);
        for i in 0..split.len().min(64) {
            if split.sequence(i, &mut inputs, &mut targets, &mut weights, Some(&mut starts)).is_ok() {
                assert!(inputs.iter().chain(&targets).all(|id| (*id as usize) < data.vocab_size.unwrap_or(usize::MAX)));
                assert!(starts.iter().enumerate().all(|(t, s)| *s >= 0 && *s as usize <= t));
            }
        }
    }
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let Some((&first, bytes)) = data.split_first() else { return };
    let sequence_length = usize::from(first >> 2) + 1;
    if first & 1 == 0 {
        // As a job's data, checked by preparation.
        let path = file("t.bin", bytes);
        let text = format!(
            "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"{}\"\nsequence_length = {sequence_length}\nvalidation_fraction = 0.25\n[train]\nsteps = 3\nbatch_size = 2\n",
            path.display()
        );
        let spec = JobSpec::parse(&text, Path::new("/"), "job").expect("a job file");
        if let Ok(data) = ramtorch_data::prepare(&spec.data, None, Some(9), folder(), &|_, _, _| {}) {
            read(&data);
        }
        return;
    }
    let mut bytes = bytes.to_vec();
    if first & 2 != 0 && bytes.len() >= HEADER {
        fuzzing::seal_cache(&mut bytes);
    }
    let name = fuzzing::cache_path(folder(), &KEY);
    std::fs::write(&name, &bytes).expect("room in /dev/shm");
    let Some(train) = fuzzing::find_cache(folder(), &KEY) else { return };
    let sequences = train.tokens.saturating_sub(1) / sequence_length as u64;
    for (vocab_size, document_mask) in [(None, true), (Some(9), false)] {
        read(&Dataset {
            kind: DataKind::Cache,
            sequence_length,
            train_sequences: sequences,
            validation_sequences: 0,
            has_mask: true,
            document_mask,
            vocab_size,
            end_of_text: None,
            train: Source::clone(&train),
            validation: None,
            tensors: None,
        });
    }
});
