//! From the `[data]` section of a job to a [`Dataset`].

use crate::dataset::sequences;
use crate::documents::BatchSize;
use crate::encode::{Job, Progress};
use crate::file::{modified_ns, read_full, resolve, unchanged};
use crate::template::Clock;
use crate::tensors::{TensorLayout, inspect};
use crate::{DataError, DataFile, DataKind, Dataset, Source, Tokenizer, TokenizerSource};
use ramtorch_job::{DataFormat, DataSpec};
use rayon::prelude::*;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Reads and checks all data of a job, and tokenises what is not tokens yet into `cache_dir` (or `data.cache`).
///
/// `tokenizer` is needed for text, JSONL and Parquet, and for ready tokens with `document_mask`. `vocab_size` is the
/// model's: every token id must be below it. For `tensors` with class targets it is the number of the model's outputs.
/// `progress` is called with what is being done, bytes done and bytes in all, from any thread.
///
/// The result depends only on the contents of the files, the tokenizer and `spec`. It may be run by several processes
/// at once with the same `cache_dir`.
///
/// # Errors
/// See [`DataError`]; each names the file and the place in it.
pub fn prepare(
    spec: &DataSpec,
    tokenizer: Option<&TokenizerSource>,
    vocab_size: Option<usize>,
    cache_dir: &Path,
    progress: Progress,
) -> Result<Dataset, DataError> {
    if spec.sequence_length == 0 {
        return Err(DataError::Spec { key: "data.sequence_length", reason: "must be at least 1".into() });
    }
    if !(0.0..1.0).contains(&spec.validation_fraction) {
        return Err(DataError::Spec { key: "data.validation_fraction", reason: format!("{} is not in [0, 1)", spec.validation_fraction) });
    }
    let train = resolve("data.train", &spec.train)?;
    let validation = spec.validation.as_ref().map(|v| resolve("data.validation", v)).transpose()?;
    let both = |read: &mut dyn FnMut(&[PathBuf]) -> Result<Source, DataError>| -> Result<(Source, Option<Source>), DataError> {
        let train_source = read(&train)?;
        Ok((train_source, validation.as_deref().map(read).transpose()?))
    };
    let mut data = Dataset {
        kind: DataKind::Cache,
        sequence_length: spec.sequence_length,
        train_sequences: 0,
        validation_sequences: 0,
        has_mask: spec.document_mask,
        document_mask: spec.document_mask,
        vocab_size,
        end_of_text: None,
        train: Source::default(),
        validation: None,
        tensors: None,
    };
    match spec.format {
        DataFormat::Text | DataFormat::Jsonl | DataFormat::Parquet => {
            let tokenizer = load(tokenizer, spec.format, vocab_size)?;
            let cache_dir = spec.cache.as_deref().unwrap_or(cache_dir);
            let column = spec.column.as_deref().filter(|_| spec.format == DataFormat::Parquet);
            let batch = BatchSize::for_this_machine();
            (data.train, data.validation) = both(&mut |files| {
                Job { format: spec.format, column, files, tokenizer: &tokenizer, vocab_size, cache_dir, batch }.run(progress)
            })?;
            data.has_mask = data.document_mask || data.sources().any(|s| s.loss_tokens < s.tokens);
            for (key, source) in [("data.train", Some(&data.train)), ("data.validation", data.validation.as_ref())] {
                if source.is_some_and(|s| s.tokens > 0 && s.loss_tokens == 0) {
                    let reason =
                        "no conversation has a turn of the assistant, so there is nothing to learn from; the role must be `assistant`";
                    return Err(DataError::Spec { key, reason: reason.into() });
                }
            }
        }
        DataFormat::Tokens => {
            data.kind = DataKind::Tokens;
            if spec.document_mask {
                data.end_of_text = Some(end_of_text(tokenizer)?);
            }
            (data.train, data.validation) = both(&mut |files| tokens(files, vocab_size, progress))?;
        }
        DataFormat::Tensors => {
            data.kind = DataKind::Tensors;
            data.sequence_length = 1;
            data.has_mask = false;
            data.document_mask = false;
            let mut layout = None;
            (data.train, data.validation) = both(&mut |files| tensors(files, vocab_size, &mut layout, progress))?;
            data.tensors = layout;
        }
    }
    split(&mut data, spec.validation_fraction)?;
    Ok(data)
}

/// Counts sequences, and takes the last ones for validation where that has no files of its own.
fn split(data: &mut Dataset, fraction: f64) -> Result<(), DataError> {
    let count = |source: &Source, split: &'static str| {
        let n = if data.kind == DataKind::Tensors { source.tokens } else { sequences(source.tokens, data.sequence_length) };
        if n == 0 {
            return Err(DataError::TooShort { split, tokens: source.tokens, sequence_length: data.sequence_length });
        }
        Ok(n)
    };
    let all = count(&data.train, "training")?;
    let own = data.validation.as_ref().map(|v| count(v, "validation")).transpose()?;
    let taken = match own {
        None if fraction > 0.0 => {
            if all < 2 {
                return Err(DataError::Spec {
                    key: "data.validation_fraction",
                    reason: format!(
                        "the data has only {all} sequence, which cannot be split; add data, lower `data.sequence_length`, or name `data.validation` files"
                    ),
                });
            }
            ((all as f64 * fraction).round() as u64).clamp(1, all - 1)
        }
        _ => 0,
    };
    data.train_sequences = all - taken;
    data.validation_sequences = own.unwrap_or(taken);
    Ok(())
}

fn load(source: Option<&TokenizerSource>, format: DataFormat, vocab_size: Option<usize>) -> Result<Tokenizer, DataError> {
    let source = source.ok_or(DataError::NoTokenizer { format })?;
    let tokenizer = Tokenizer::load_with(source, Clock::Fixed)?;
    // Added tokens may lie outside as long as no document has them; a vocabulary that does is another model's.
    match vocab_size {
        Some(vocab_size) if tokenizer.max_base_id() as usize >= vocab_size => {
            Err(DataError::TokenizerRange { path: source.tokenizer_json.clone(), id: tokenizer.max_base_id(), vocab_size })
        }
        _ => {
            if tokenizer.eos().is_none() {
                tracing::warn!(path = %source.tokenizer_json.display(), "the tokenizer has no end-of-text token: documents are joined without one");
            }
            Ok(tokenizer)
        }
    }
}

fn end_of_text(source: Option<&TokenizerSource>) -> Result<u32, DataError> {
    let missing = || {
        DataError::Spec {
        key: "data.document_mask",
        reason: "in ready token files a document ends with the end-of-text token, but there is no tokenizer that names it; put tokenizer.json and tokenizer_config.json into the model folder, or turn document_mask off".into(),
    }
    };
    Tokenizer::load(source.ok_or_else(missing)?)?.eos().ok_or_else(missing)
}

const BLOCK_BYTES: usize = 8 << 20;

/// Checks ready token files: whole tokens, each inside of the vocabulary.
fn tokens(files: &[PathBuf], vocab_size: Option<usize>, progress: Progress) -> Result<Source, DataError> {
    let total = files.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
    let mut source = Source::default();
    let mut done = 0;
    for path in files {
        let mut file = File::open(path).map_err(DataError::read(path))?;
        let meta = file.metadata().map_err(DataError::read(path))?;
        if meta.len() % 4 != 0 {
            let reason = format!(
                "{} bytes are not a whole number of tokens; a token file is little-endian u32 (4 bytes each) without a header",
                meta.len()
            );
            return Err(DataError::file(path, reason));
        }
        let mut hasher = blake3::Hasher::new();
        let mut block = vec![0; BLOCK_BYTES];
        let mut bytes = 0u64;
        loop {
            let n = read_full(&mut file, &mut block).map_err(DataError::read(path))?;
            if n == 0 {
                break;
            }
            let block = &block[..n];
            let id = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let outside = |limit: usize| block.par_chunks_exact(4).with_min_len(1 << 16).position_first(|b| id(b) as usize >= limit);
            let (bad, _) = rayon::join(
                || vocab_size.and_then(|v| outside(v).map(|at| (at, v))),
                || {
                    hasher.update_rayon(block);
                },
            );
            if let Some((at, vocab_size)) = bad {
                let position = bytes / 4 + at as u64;
                return Err(DataError::TokenRange { path: path.clone(), position, id: id(&block[at * 4..]), vocab_size });
            }
            bytes += n as u64;
            done += n as u64;
            progress("checking tokens", done, total);
        }
        let print = crate::file::Fingerprint { bytes, modified_ns: modified_ns(&meta), hash: hasher.finalize() };
        unchanged(path, &print)?;
        source.tokens += bytes / 4;
        source.files.push(DataFile {
            path: path.clone(),
            bytes,
            modified_ns: print.modified_ns,
            blake3: print.hash.to_hex().to_string(),
            data_offset: 0,
            items: bytes / 4,
        });
    }
    source.loss_tokens = source.tokens;
    Ok(source)
}

/// Checks tensors files: their tensors, their values, and that all files agree.
fn tensors(files: &[PathBuf], outputs: Option<usize>, layout: &mut Option<TensorLayout>, progress: Progress) -> Result<Source, DataError> {
    let total = files.iter().map(|p| p.metadata().map_or(0, |m| m.len())).sum();
    let mut source = Source::default();
    let mut done = 0;
    for path in files {
        let file = File::open(path).map_err(DataError::read(path))?;
        let meta = file.metadata().map_err(DataError::read(path))?;
        let map = crate::map::Map::of(&file, path)?;
        let (found, rows) = inspect(&map, path, outputs)?;
        let expected = *layout.get_or_insert(found);
        if found != expected {
            return Err(DataError::file(
                path,
                format!("its tensors are {found}, but those of the first file are {expected}; all files must agree"),
            ));
        }
        let hash = blake3::Hasher::new().update_rayon(&map).finalize();
        source.tokens += rows;
        source.files.push(DataFile {
            path: path.clone(),
            bytes: meta.len(),
            modified_ns: modified_ns(&meta),
            blake3: hash.to_hex().to_string(),
            data_offset: 0,
            items: rows,
        });
        done += meta.len();
        progress("checking tensors", done, total);
    }
    source.loss_tokens = source.tokens;
    Ok(source)
}
