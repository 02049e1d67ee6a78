//! Header and manifest: written once when a segment is made, and checked whole before anything in it is used.
//!
//! The manifest names everything and decides everything; the header repeats, as numbers at fixed places, what follows
//! from it. On attaching, the layout is worked out again from the manifest, and every number must be the same.

use crate::error::StoreError;
use crate::layout::{CONTROL_WORDS, HEADER_BYTES, LIVE_BYTES, Layout, MANIFEST_BYTES_MAX, Tensor};
use crate::spec::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};
use serde::{Deserialize, Serialize};

/// Versions of the layout that this program writes and reads: without a gradient log, and with one, where a page may be behind
/// the committed step.
pub(crate) const VERSION: u32 = 2;
pub(crate) const VERSION_LOG: u32 = 3;
/// "RAMTORCH", as a little-endian word.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"RAMTORCH");
/// Words of the header, the checksum in the last.
pub(crate) const HEADER_WORDS: usize = HEADER_BYTES as usize / 8;

/// Words with a meaning; those between them and the checksum are zero.
const FIELDS: usize = 30;
const FIELD_NAMES: [&str; FIELDS] = [
    "magic",
    "version",
    "bytes",
    "manifest_start",
    "manifest_bytes",
    "manifest_crc32c",
    "parameters",
    "span",
    "page_parameters",
    "page_count",
    "physical_count",
    "page_bytes",
    "world_size",
    "spare_pages_per_rank",
    "moment_format",
    "gradient_format",
    "live_start",
    "page_table_start",
    "control_start",
    "control_words",
    "exchange_start",
    "exchange_bytes",
    "gradients_start",
    "gradients_bytes",
    "pages_start",
    "lo_in_page",
    "moment1_in_page",
    "moment2_in_page",
    "log_steps",
    "log_parameters",
];

#[derive(Serialize, Deserialize)]
struct ManifestTensor {
    name: String,
    shape: Vec<u64>,
    start: u64,
    parameters: u64,
    joined: bool,
    decay: bool,
}

#[derive(Serialize, Deserialize)]
struct ManifestBlock {
    name: String,
    start: u64,
    parameters: u64,
    tensors: Vec<ManifestTensor>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Manifest {
    world_size: u32,
    spare_pages_per_rank: u32,
    moments: MomentFormat,
    gradients: GradientFormat,
    page_parameters: u32,
    exchange_bytes: u64,
    #[serde(default, skip_serializing_if = "GradientLog::is_none")]
    log: GradientLog,
    blocks: Vec<ManifestBlock>,
    metadata: String,
}

/// The manifest of a store whose tensors are placed.
pub(crate) fn manifest_bytes(layout: &Layout) -> Result<Vec<u8>, StoreError> {
    let spec = layout.spec();
    let tensor = |(place, spec): (&Tensor, &TensorSpec)| ManifestTensor {
        name: place.name.clone(),
        shape: place.shape.clone(),
        start: place.start,
        parameters: place.len,
        joined: spec.joined,
        decay: place.decay,
    };
    let blocks = layout.blocks().iter().zip(&spec.blocks);
    let manifest = Manifest {
        world_size: spec.world_size,
        spare_pages_per_rank: spec.spare_pages_per_rank,
        moments: spec.moments,
        gradients: spec.gradients,
        page_parameters: layout.page_parameters(),
        exchange_bytes: spec.exchange_bytes,
        log: spec.log.clone(),
        blocks: blocks
            .map(|(b, s)| ManifestBlock {
                name: b.name.clone(),
                start: b.start,
                parameters: b.len,
                tensors: layout.tensors()[b.tensors.clone()].iter().zip(&s.tensors).map(tensor).collect(),
            })
            .collect(),
        metadata: spec.metadata.clone(),
    };
    serde_json::to_vec(&manifest).map_err(|e| StoreError::Spec(format!("its manifest cannot be written: {e}")))
}

/// The header of a store.
pub(crate) fn header(layout: &Layout, manifest: &[u8]) -> [u64; HEADER_WORDS] {
    let (spec, sections) = (layout.spec(), layout.sections());
    let moment = u64::from(layout.page_parameters()) * spec.moments.bytes();
    let weights = u64::from(layout.page_parameters()) * 4;
    let log = Some(&spec.log).filter(|log| !log.is_none());
    let fields: [u64; FIELDS] = [
        MAGIC,
        u64::from(if log.is_some() { VERSION_LOG } else { VERSION }),
        layout.bytes(),
        sections.manifest.start,
        manifest.len() as u64,
        u64::from(crc32c::crc32c(manifest)),
        layout.parameters(),
        layout.span(),
        u64::from(layout.page_parameters()),
        u64::from(layout.page_count()),
        u64::from(layout.physical_count()),
        layout.page_bytes(),
        u64::from(spec.world_size),
        u64::from(spec.spare_pages_per_rank),
        match spec.moments {
            MomentFormat::None => 0,
            MomentFormat::F32 => 1,
            MomentFormat::Bf16 => 2,
        },
        match spec.gradients {
            GradientFormat::None => 0,
            GradientFormat::F32 => 1,
            GradientFormat::Bf16 => 2,
        },
        HEADER_BYTES,
        sections.page_table.start,
        sections.control.start,
        CONTROL_WORDS as u64,
        sections.exchange.start,
        sections.exchange.end - sections.exchange.start,
        sections.gradients.start,
        sections.gradients.end - sections.gradients.start,
        sections.pages.start,
        weights / 2,
        weights,
        weights + moment,
        log.map_or(0, |log| u64::from(log.steps)),
        layout.logged_parameters(),
    ];
    let mut words = [0; HEADER_WORDS];
    words[..FIELDS].copy_from_slice(&fields);
    words[HEADER_WORDS - 1] = header_checksum(&words);
    words
}

/// CRC-32C over all words but the last.
pub(crate) fn header_checksum(words: &[u64; HEADER_WORDS]) -> u64 {
    words[..HEADER_WORDS - 1].iter().fold(0, |crc, word| crc32c::crc32c_append(crc, &word.to_le_bytes())).into()
}

/// What a header says before it can be compared with a manifest: that there is one, and where.
///
/// `Err` is the reason for which it cannot be used; the version is told apart because it calls for another remedy.
pub(crate) enum Unusable {
    Version(u32),
    Because(String),
}

/// Checks a header by itself. Returns where the manifest lies: (start, bytes).
pub(crate) fn check_header(words: &[u64; HEADER_WORDS], segment_bytes: u64) -> Result<(u64, u64), Unusable> {
    let because = |reason: String| Err(Unusable::Because(reason));
    match words[0] {
        MAGIC => {}
        0 => return because("it has no magic number: it is still being made, or its making was cut short".into()),
        other => return because(format!("its magic number is {other:#018x}")),
    }
    if ![VERSION, VERSION_LOG].map(u64::from).contains(&words[1]) {
        return Err(Unusable::Version(u32::try_from(words[1]).unwrap_or(u32::MAX)));
    }
    if words[HEADER_WORDS - 1] != header_checksum(words) {
        return because("the checksum of its header is wrong".into());
    }
    if words[2] != segment_bytes {
        return because(format!("its header speaks of {} bytes, and it has {segment_bytes}", words[2]));
    }
    let (start, len) = (words[3], words[4]);
    if start != HEADER_BYTES + LIVE_BYTES || len > MANIFEST_BYTES_MAX || start.checked_add(len).is_none_or(|end| end > segment_bytes) {
        return because(format!("its manifest of {len} bytes at {start} is out of place"));
    }
    Ok((start, len))
}

/// The layout that a manifest gives, after comparing it with the header in every number.
pub(crate) fn layout_of(words: &[u64; HEADER_WORDS], manifest: &[u8]) -> Result<Layout, String> {
    if words[5] != u64::from(crc32c::crc32c(manifest)) {
        return Err("the checksum of its manifest is wrong".into());
    }
    let (layout, parsed) = layout_of_manifest(manifest)?;
    for (is, says) in layout.blocks().iter().zip(&parsed.blocks) {
        if (is.start, is.len) != (says.start, says.parameters) {
            return Err(format!(
                "its manifest puts block {:?} at {}, {} parameters; it belongs at {}, {}",
                is.name, says.start, says.parameters, is.start, is.len
            ));
        }
    }
    for (is, says) in layout.tensors().iter().zip(parsed.blocks.iter().flat_map(|b| &b.tensors)) {
        if (is.start, is.len) != (says.start, says.parameters) {
            return Err(format!(
                "its manifest puts tensor {:?} at {}, {} parameters; it belongs at {}, {}",
                is.name, says.start, says.parameters, is.start, is.len
            ));
        }
    }
    let expected = header(&layout, manifest);
    match words.iter().zip(&expected).position(|(is, should)| is != should) {
        None => Ok(layout),
        Some(i) => {
            let field = FIELD_NAMES.get(i).copied().unwrap_or("reserved");
            Err(format!("word {i} of its header ({field}) is {}, and {} follows from its manifest", words[i], expected[i]))
        }
    }
}

/// The layout that a manifest gives, whatever else it says of places.
pub(crate) fn layout_of_manifest(manifest: &[u8]) -> Result<(Layout, Manifest), String> {
    let parsed: Manifest = serde_json::from_slice(manifest).map_err(|e| format!("its manifest cannot be read: {e}"))?;
    let spec = StoreSpec {
        blocks: parsed.blocks.iter().map(block_spec).collect(),
        world_size: parsed.world_size,
        moments: parsed.moments,
        gradients: parsed.gradients,
        page_parameters: Some(parsed.page_parameters),
        spare_pages_per_rank: parsed.spare_pages_per_rank,
        exchange_bytes: parsed.exchange_bytes,
        log: parsed.log.clone(),
        metadata: parsed.metadata.clone(),
    };
    let layout = Layout::with_manifest_length(&spec, manifest.len() as u64).map_err(|e| e.to_string())?;
    Ok((layout, parsed))
}

fn block_spec(block: &ManifestBlock) -> BlockSpec {
    let tensor = |t: &ManifestTensor| TensorSpec { name: t.name.clone(), shape: t.shape.clone(), joined: t.joined, decay: t.decay };
    BlockSpec { name: block.name.clone(), tensors: block.tensors.iter().map(tensor).collect() }
}
