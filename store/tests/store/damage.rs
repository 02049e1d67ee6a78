//! Damaged and hostile segments: an error, never a crash.

use crate::common::*;
use proptest::prelude::*;
use ramtorch_store::*;
use std::os::unix::fs::FileExt;

const HEADER: usize = 4096;

/// A sound segment, as bytes.
fn sound() -> Vec<u8> {
    let segment = Segment::new();
    let store = Store::create(&segment.name, &spec(2, MomentFormat::Bf16, GradientFormat::F32)).unwrap();
    load_all(&store);
    std::fs::read(segment.path()).unwrap()
}

fn attach(bytes: &[u8]) -> Result<(), StoreError> {
    let segment = Segment::new();
    std::fs::write(segment.path(), bytes).unwrap();
    let read_only = Store::attach_read_only(&segment.name).map(|store| exercise(&store));
    let writable = Store::attach(&segment.name).map(|store| {
        exercise(&store);
        (0..store.layout().spec().world_size).for_each(|rank| drop(store.claim(rank)));
    });
    assert_eq!(read_only.is_ok(), writable.is_ok());
    writable
}

/// What is let in can be used throughout.
fn exercise(store: &Store) {
    let mut out = vec![0.0; store.layout().span() as usize];
    for part in [Part::Weight, Part::Moment1, Part::Moment2] {
        let _ = store.read(0, part, &mut out);
    }
    for page in 0..store.layout().page_count() {
        store.page_ptrs(store.entry(page).physical);
    }
    let _ = (store.record(), store.control(), store.exchange(), store.generation(), store.gradient_ptr(store.layout().span()));
}

fn word(bytes: &[u8], index: usize) -> u64 {
    u64::from_le_bytes(bytes[index * 8..index * 8 + 8].try_into().unwrap())
}

fn set_word(bytes: &mut [u8], index: usize, value: u64) {
    bytes[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
}

/// Makes the header's checksum right again, as an attacker would.
fn seal(bytes: &mut [u8]) {
    let checksum = crc32c::crc32c(&bytes[..HEADER - 8]);
    set_word(bytes, HEADER / 8 - 1, checksum.into());
}

/// Puts another manifest in, of the same place and any length that fits, with right checksums.
fn with_manifest(bytes: &[u8], manifest: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let start = word(&bytes, 3) as usize;
    bytes[start..start + manifest.len()].copy_from_slice(manifest);
    set_word(&mut bytes, 4, manifest.len() as u64);
    set_word(&mut bytes, 5, crc32c::crc32c(manifest).into());
    seal(&mut bytes);
    bytes
}

fn manifest(bytes: &[u8]) -> Vec<u8> {
    let start = word(bytes, 3) as usize;
    bytes[start..start + word(bytes, 4) as usize].to_vec()
}

fn reason(result: Result<(), StoreError>) -> String {
    match result {
        Ok(()) => panic!("it was let in"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn a_sound_one_is_let_in() {
    attach(&sound()).unwrap();
}

#[test]
fn every_number_of_the_header_is_checked() {
    let good = sound();
    for index in 0..30 {
        let is = word(&good, index);
        let values = [
            0,
            1,
            is.wrapping_sub(1),
            is + 1,
            is * 2 + 1,
            is ^ 4096,
            is ^ 1 << 40,
            1 << 31,
            u64::from(u32::MAX),
            i64::MAX as u64,
            u64::MAX,
        ];
        for value in values.into_iter().filter(|v| *v != is) {
            let mut bytes = good.clone();
            set_word(&mut bytes, index, value);
            assert!(attach(&bytes).is_err(), "word {index} = {value}, checksum wrong");
            seal(&mut bytes);
            assert!(attach(&bytes).is_err(), "word {index} = {value}, checksum right");
        }
    }
    let mut bytes = good.clone();
    set_word(&mut bytes, 100, 1);
    seal(&mut bytes);
    assert!(reason(attach(&bytes)).contains("word 100 of its header (reserved) is 1"));
    set_word(&mut bytes, 1, 1);
    assert!(reason(attach(&bytes)).contains("layout version 1, this program reads versions 2 to 3"));
    set_word(&mut bytes, 0, 0);
    assert!(reason(attach(&bytes)).contains("still being made"));
}

#[test]
fn a_file_of_the_wrong_length_or_kind_is_refused() {
    let good = sound();
    for len in [0, 1, 4095, 4096, 8192, 12288, good.len() / 2, good.len() - 4096, good.len() - 1, good.len() + 1, good.len() + 4096] {
        let mut bytes = good.clone();
        bytes.resize(len, 0);
        assert!(attach(&bytes).is_err(), "{len} bytes");
    }
    let folder = Segment::new();
    std::fs::create_dir(folder.path()).unwrap();
    let results = [Store::attach(&folder.name).err(), Store::attach_read_only(&folder.name).err()];
    std::fs::remove_dir(folder.path()).unwrap();
    assert!(results.iter().all(Option::is_some));
    let pipe = Segment::new();
    nix::unistd::mkfifo(&pipe.path(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(reason(Store::attach(&pipe.name).map(drop)).contains("not a regular file"));
    assert!(reason(Store::attach_read_only(&pipe.name).map(drop)).contains("not a regular file"));
}

#[test]
fn a_manifest_that_lies_is_refused() {
    let good = sound();
    let text = String::from_utf8(manifest(&good)).unwrap();
    let replaced = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} is not in {text}");
        with_manifest(&good, text.replacen(from, to, 1).as_bytes())
    };
    // The same manifest in other words of the same length is as good.
    attach(&with_manifest(&good, text.as_bytes())).unwrap();
    for (from, to) in [
        (r#""world_size":2"#, r#""world_size":0"#),
        (r#""world_size":2"#, r#""world_size":1"#),
        (r#""world_size":2"#, r#""world_size":4294967295"#),
        (r#""world_size":2"#, r#""world_size":-1"#),
        (r#""spare_pages_per_rank":1"#, r#""spare_pages_per_rank":4294967295"#),
        (r#""page_parameters":1024"#, r#""page_parameters":0"#),
        (r#""page_parameters":1024"#, r#""page_parameters":1025"#),
        (r#""page_parameters":1024"#, r#""page_parameters":2048"#),
        (r#""exchange_bytes":4096"#, r#""exchange_bytes":18446744073709551615"#),
        (r#""exchange_bytes":4096"#, r#""exchange_bytes":9223372036854775807"#),
        (r#""moments":"bf16""#, r#""moments":"fp8""#),
        (r#""moments":"bf16""#, r#""moments":"f32""#),
        (r#""gradients":"f32""#, r#""gradients":"none""#),
        ("[50,33]", "[50,0]"),
        ("[50,33]", "[51,33]"),
        ("[50,33]", "[33,18446744073709551615]"),
        ("[50,33]", "[4294967296,4294967296,33]"),
        (r#""start":0"#, r#""start":64"#),
        (r#""parameters":1650"#, r#""parameters":1649"#),
        ("embedding.weight", "q.weight"),
        ("embedding.weight", ""),
        (r#""joined":false"#, r#""joined":true"#),
        (r#""blocks":[{"#, r#""blocks":[[{"#),
        (r#""metadata""#, r#""metadat""#),
        ("{", "["),
    ] {
        assert!(attach(&replaced(from, to)).is_err(), "{from} → {to}");
    }
    for manifest in [&b""[..], b"{}", b"null", b"\xff\xfe", b"{\"blocks\":[]}", &vec![b'['; 100_000][..2000], &[0; 64]] {
        assert!(attach(&with_manifest(&good, manifest)).is_err());
    }
    assert!(reason(attach(&replaced(r#""start":0"#, r#""start":64"#))).contains("puts block \"embedding\" at 64"));
}

#[test]
fn a_page_table_or_record_that_lies_is_refused() {
    let good = sound();
    let table = word(&good, 17) as usize / 8;
    let with_entry = |physical: u64| {
        let mut bytes = good.clone();
        set_word(&mut bytes, table + 2, physical | 7 << 28);
        reason(attach(&bytes))
    };
    // Outside the physical pages, another rank's, another rank's spare.
    for physical in [12, 15, 0xf_ffff, 1, 3, 10] {
        let text = with_entry(physical);
        assert!(text.contains(&format!("page 2 is said to lie in physical page {physical}, which is not its rank's")), "{text}");
    }
    let taken = word(&good, table + 6) & 0xf_ffff;
    let text = with_entry(taken);
    assert!(text.contains(&format!("page 6 is said to lie in physical page {taken}, as another page is")), "{text}");
    let mut bytes = good.clone();
    set_word(&mut bytes, 512 + 64 + 1, 9);
    assert!(reason(attach(&bytes)).contains("unknown phase 9"));
}

#[test]
fn damage_while_it_is_mapped_is_an_error_too() {
    let segment = Segment::new();
    let store = Store::create(&segment.name, &spec(2, MomentFormat::F32, GradientFormat::None)).unwrap();
    load_all(&store);
    let file = std::fs::OpenOptions::new().write(true).open(segment.path()).unwrap();
    let table = store.layout().sections().page_table.start;
    file.write_all_at(&u64::MAX.to_le_bytes(), table + 16).unwrap();
    assert_eq!(store.entry(2).step, NEVER);
    store.page_ptrs(store.entry(2).physical);
    let mut out = vec![0.0; 4096];
    assert!(matches!(store.read(0, Part::Weight, &mut out), Err(StoreError::Damaged { .. })));
    assert!(matches!(store.claim(1), Err(StoreError::Damaged { .. })));
    assert!(matches!(store.claim(1), Err(StoreError::Damaged { .. })), "the failed claim left no lock");
    assert!(store.claim(0).is_ok());
    file.write_all_at(&[9; 512], 4096 + 512).unwrap();
    assert_eq!(store.record().phase, StepPhase::Loading);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Random bytes anywhere outside the pages' contents: an error, or a store that can be used throughout.
    #[test]
    fn random_damage_never_crashes(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12), resealed: bool) {
        let mut bytes = sound();
        let end = word(&bytes, 18) as usize;
        for (index, value) in changes {
            let at = index.index(end);
            bytes[at] = value;
        }
        if resealed {
            let (start, len) = (word(&bytes, 3) as usize, word(&bytes, 4) as usize);
            if let Some(manifest) = start.checked_add(len).and_then(|end| bytes.get(start..end)) {
                let checksum = crc32c::crc32c(manifest);
                set_word(&mut bytes, 5, checksum.into());
            }
            seal(&mut bytes);
        }
        let _ = attach(&bytes);
    }

    /// Random text edits of a manifest whose checksums are right.
    #[test]
    fn edited_manifests_never_crash(at in any::<prop::sample::Index>(), cut in 0usize..12, put in "[0-9\\[\\]{}:,\"a-z-]{0,12}") {
        let good = sound();
        let mut manifest = manifest(&good);
        let at = at.index(manifest.len());
        let end = (at + cut).min(manifest.len());
        manifest.splice(at..end, put.bytes());
        let _ = attach(&with_manifest(&good, &manifest));
    }
}
