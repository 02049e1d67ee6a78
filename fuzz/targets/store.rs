//! A segment of any bytes is refused, or everything in it can be looked at and claimed.
//!
//! Input: a manifest (or nothing: that of a sound store), then changes to the segment that it describes: pairs of a place (u16:
//! word number among the described words, see `places`) and a value (u64). Checksums are made right again afterwards, unless
//! the first byte after the manifest is odd.
#![no_main]

use ramtorch_fuzz::{joined, parts};
use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, Part, Store, StoreSpec, TensorSpec, fuzzing};
use std::sync::OnceLock;

const HEADER: usize = 4096;
const MOST: u64 = 1 << 20;

fn spec(world_size: u32, moments: MomentFormat, gradients: GradientFormat) -> StoreSpec {
    let tensor = |name: &str, shape: &[u64], joined| TensorSpec { name: name.into(), shape: shape.to_vec(), joined, decay: false };
    StoreSpec {
        blocks: vec![
            BlockSpec { name: "e".into(), tensors: vec![tensor("e.w", &[50, 33], false)] },
            BlockSpec { name: "l".into(), tensors: vec![tensor("q", &[33, 33], false), tensor("k", &[11, 33], true)] },
        ],
        world_size,
        moments,
        gradients,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 64,
        log: GradientLog::NONE,
        metadata: "{}".into(),
    }
}

fn name() -> &'static str {
    static NAME: OnceLock<String> = OnceLock::new();
    NAME.get_or_init(|| format!("/ramtorch-fuzz-{}.segment", std::process::id()))
}

fn path() -> String {
    format!("/dev/shm{}", name())
}

/// A new store as bytes, and its manifest.
fn sound(spec: &StoreSpec) -> Option<Vec<u8>> {
    let _ = Store::unlink(name());
    drop(Store::create(name(), spec).ok()?);
    let bytes = std::fs::read(path()).ok();
    let _ = Store::unlink(name());
    bytes
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("eight bytes"))
}

fn set_word(bytes: &mut [u8], index: usize, value: u64) {
    if let Some(place) = bytes.get_mut(index * 8..index * 8 + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn manifest(bytes: &[u8]) -> Vec<u8> {
    bytes[word(bytes, 3) as usize..][..word(bytes, 4) as usize].to_vec()
}

fn seeds() -> Vec<Vec<u8>> {
    let change = |place: u16, value: u64| [&place.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let mut seeds = vec![
        joined(&[b"", b"\0"]),
        joined(&[b"", &[&[0][..], &change(2, 1 << 20), &change(3, 8192)].concat()]),
        joined(&[b"", &[&[0][..], &change(512, 7), &change(1024, 1 << 40)].concat()]),
        joined(&[b"", &[&[1][..], &change(5, 7)].concat()]),
    ];
    for (world, moments, gradients) in [(2, MomentFormat::Bf16, GradientFormat::F32), (1, MomentFormat::None, GradientFormat::None)] {
        let bytes = sound(&spec(world, moments, gradients)).expect("a small store");
        seeds.push(joined(&[&manifest(&bytes), b"\0"]));
    }
    seeds
}

/// The segment that a manifest describes, with that manifest in it byte for byte.
fn described(text: &[u8]) -> Option<Vec<u8>> {
    let (layout, header) = fuzzing::describe(text)?;
    if layout.bytes() > MOST {
        return None;
    }
    let mut bytes = sound(layout.spec())?;
    // Another length of the manifest may have moved what follows; then only the header and the manifest are as described.
    bytes.resize(layout.bytes() as usize, 0);
    bytes[..HEADER].copy_from_slice(&header);
    let start = word(&header, 3) as usize;
    bytes.get_mut(start..start + text.len())?.copy_from_slice(text);
    Some(bytes)
}

fn exercise(store: &Store) {
    let layout = store.layout();
    let mut out = vec![0.0; layout.span().min(4096) as usize];
    for part in [Part::Weight, Part::Moment1, Part::Moment2] {
        let _ = store.read(0, part, &mut out);
        let _ = store.read(layout.span() - 1, part, &mut out[..1]);
    }
    for page in 0..layout.page_count() {
        store.page_ptrs(store.entry(page).physical);
    }
    let _ = (store.record(), store.control(), store.exchange(), store.generation(), store.gradient_ptr(layout.span()));
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    static SOUND: OnceLock<Vec<u8>> = OnceLock::new();
    let [text, changes] = parts::<2>(data);
    let mut bytes = match text {
        [] => SOUND.get_or_init(|| sound(&spec(2, MomentFormat::Bf16, GradientFormat::F32)).expect("a small store")).clone(),
        text => match described(text) {
            Some(bytes) => bytes,
            // Neither laid out nor small: as it is, behind a header that was right once.
            None => {
                let mut bytes = SOUND.get_or_init(|| sound(&spec(2, MomentFormat::Bf16, GradientFormat::F32)).expect("a small store")).clone();
                let start = word(&bytes, 3) as usize;
                let n = text.len().min(bytes.len() - start);
                bytes[start..start + n].copy_from_slice(&text[..n]);
                set_word(&mut bytes, 4, n as u64);
                bytes
            }
        },
    };
    let (flags, changes) = changes.split_first().unwrap_or((&0, &[]));
    for change in changes.chunks_exact(10) {
        let (place, value) = change.split_at(2);
        let place = u16::from_le_bytes([place[0], place[1]]);
        set_word(&mut bytes, usize::from(place), u64::from_le_bytes(value.try_into().expect("eight bytes")));
    }
    if flags & 1 == 0 {
        let start = usize::try_from(word(&bytes, 3)).unwrap_or(usize::MAX);
        let end = start.saturating_add(usize::try_from(word(&bytes, 4)).unwrap_or(usize::MAX));
        if let Some(manifest) = bytes.get(start..end) {
            let sum = crc32c::crc32c(manifest);
            set_word(&mut bytes, 5, sum.into());
        }
        let sum = crc32c::crc32c(&bytes[..HEADER - 8]);
        set_word(&mut bytes, HEADER / 8 - 1, sum.into());
    }
    // A torn file.
    if flags & 2 != 0 {
        bytes.truncate(usize::from(flags >> 2) * 4096);
    }
    std::fs::write(path(), &bytes).expect("room in /dev/shm");
    let read_only = Store::attach_read_only(name()).map(|s| exercise(&s));
    let writable = Store::attach(name()).map(|s| {
        exercise(&s);
        (0..s.layout().spec().world_size).for_each(|rank| drop(s.claim(rank)));
    });
    let _ = Store::unlink(name());
    assert_eq!(read_only.is_ok(), writable.is_ok());
});
