use super::*;
use crate::durable::faults::{self, Fault};
use crate::source::{StoreWeights, WeightSource};
use crate::testing::{Synthetic, TINY_LLAMA, TestStore, bits, empty_folder, read_all, read_all_moments, store, tiny_llama};
use crate::{ModelAssets, ModelError};
use proptest::prelude::*;
use ramtorch_store::{MomentFormat, Store};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn meta(step: u64) -> CheckpointMeta {
    let values = vec![1.5, f64::NAN, f64::NEG_INFINITY, 0.1];
    CheckpointMeta { step, run: "run-1".into(), architecture: tiny_llama(), job: serde_json::json!({ "seed": 9 }), values }
}

fn assets() -> ModelAssets {
    ModelAssets { config: Some(TINY_LLAMA.into()), files: vec![("tokenizer.json".into(), b"{}".to_vec())] }
}

fn files(step: u64, shards: u32, store: &Store) -> Arc<CheckpointFiles> {
    Arc::new(CheckpointFiles::new(store.layout(), shards, step).unwrap())
}

fn write(root: &Path, step: u64, shards: u32, store: &Store, keep: usize) -> Result<Committed, ModelError> {
    let files = files(step, shards, store);
    let first = CheckpointWriter::begin(root, &files)?;
    for rank in (1..shards).rev() {
        CheckpointWriter::join(root, &files)?.part(rank, shards)?.write_all(store)?;
    }
    first.part(0, shards)?.write_all(store)?;
    first.commit(&meta(step), &assets(), keep)
}

fn state(salt: u32, step: u64) -> (TestStore, Synthetic) {
    let source = Synthetic { salt, moments: true };
    (store(&tiny_llama(), 2, MomentFormat::F32, step, &source), source)
}

fn assert_holds(checkpoint: &Checkpoint, source: &dyn WeightSource) {
    let model = tiny_llama();
    for (a, b) in read_all(&model, checkpoint).iter().zip(&read_all(&model, source)) {
        assert_eq!(bits(a), bits(b));
    }
    assert_eq!(read_all_moments(&model, checkpoint), read_all_moments(&model, source));
}

fn entries(root: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn verified(root: &Path) -> Search {
    find_sound(root, &FindOptions { verify: true, ..Default::default() }).unwrap()
}

#[test]
fn state_returns_bit_for_bit_on_any_number_of_ranks() {
    let model = tiny_llama();
    let source = Synthetic { salt: 5, moments: true };
    for (moments, ranks, shards) in
        [(MomentFormat::F32, 1, 1), (MomentFormat::Bf16, 3, 3), (MomentFormat::F32, 2, 5), (MomentFormat::None, 2, 2)]
    {
        let folder = empty_folder();
        let before = store(&model, ranks, moments, 12, &source);
        let done = write(folder.path(), 12, shards, &before, 0).unwrap();
        assert_eq!(done.path, folder.path().join("step-00000012"));
        assert_eq!(std::fs::read_to_string(folder.path().join(LATEST_FILE)).unwrap(), "step-00000012\n");
        assert!(done.bytes >= CheckpointWriter::bytes_needed(&before));

        let found = verified(folder.path()).found.unwrap();
        assert_eq!((found.step(), found.moments(), found.bytes()), (12, moments, done.bytes));
        assert_eq!(
            found.meta().values.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            meta(12).values.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        );
        assert_eq!((&found.meta().architecture, &found.meta().job), (&model, &meta(12).job));
        assert_eq!(found.assets().unwrap(), assets());

        let after = store(&model, 4, moments, 12, &found);
        let (a, b) = (StoreWeights::live(&before), StoreWeights::live(&after));
        assert_eq!(read_all(&model, &a), read_all(&model, &b));
        assert_eq!(read_all_moments(&model, &a), read_all_moments(&model, &b));
    }
}

#[test]
fn moments_change_format_on_the_way_in() {
    let folder = empty_folder();
    let (before, source) = state(5, 3);
    write(folder.path(), 3, 1, &before, 0).unwrap();
    let found = verified(folder.path()).found.unwrap();
    let narrow = store(&tiny_llama(), 1, MomentFormat::Bf16, 3, &found);
    assert_eq!(read_all_moments(&tiny_llama(), &StoreWeights::live(&narrow)), read_all_moments(&tiny_llama(), &source));
}

#[test]
fn the_reference_library_reads_the_shards() {
    let folder = empty_folder();
    let (store, source) = state(2, 1);
    let path = write(folder.path(), 1, 2, &store, 0).unwrap().path;
    let mut seen = 0;
    for shard in 0..2 {
        let bytes = std::fs::read(path.join(format!("shard-{shard:05}-of-00002.safetensors"))).unwrap();
        for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
            seen += 1;
            if name.ends_with(".weight") {
                let mut ours = vec![0.0; view.shape().iter().product()];
                source.read(&name, 0, &mut ours).unwrap();
                assert_eq!(view.data(), ours.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>(), "{name}");
            }
        }
    }
    assert_eq!(seen, 3 * crate::hf::inventory(&tiny_llama().blocks()).count());
}

/// Write step 2 over a folder that holds step 1, with a fault at each change of the file system in turn.
fn with_faults(fault: Fault, before: u64, mut check: impl FnMut(&Path, &Result<Committed, ModelError>, &Synthetic, &Synthetic)) {
    let ((old, old_source), (new, new_source)) = (state(1, before), state(2, 2));
    let mut n = 0;
    loop {
        let folder = empty_folder();
        write(folder.path(), before, 1, &old, 0).unwrap();
        faults::plan(Some((n, fault)));
        let result = write(folder.path(), 2, 2, &new, 1);
        let reached = faults::count() > n;
        faults::plan(None);
        check(folder.path(), &result, &old_source, &new_source);
        if !reached {
            assert!(n > 30, "{n} changes are too few to be true");
            assert!(result.unwrap().warnings.is_empty());
            return;
        }
        n += 1;
    }
}

#[test]
fn a_writer_may_die_at_any_change_of_the_disk() {
    for (before, exchange) in [(1, true), (2, true), (2, false)] {
        faults::allow_exchange(exchange);
        with_faults(Fault::Death, before, |root, result, old, new| {
            let search = verified(root);
            let found = search.found.expect("a sound checkpoint at any time");
            assert_eq!(search.skipped, []);
            // Over a checkpoint of the same step, the content tells which one it is.
            let is_new = read_all(&tiny_llama(), &found) == read_all(&tiny_llama(), new);
            assert_holds(&found, if is_new { new } else { old });
            assert!(is_new || result.is_err(), "what was said to be written must be there");

            let (store, _) = state(3, 2);
            write(root, 2, 1, &store, 1).unwrap();
            assert_eq!(entries(root), ["latest", "step-00000002"]);
        });
    }
    faults::allow_exchange(true);
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before() {
    with_faults(Fault::DiskFull, 1, |root, result, old, new| {
        let found = verified(root).found.unwrap();
        match result {
            Err(e) => {
                assert!(e.to_string().contains("No space left") && e.to_string().contains("free some space"), "{e}");
                assert_eq!(e.fault(), crate::Fault::Output);
                // Only when the rename itself was made and could not be made durable is the new one there as well.
                let named = found.step() == 2;
                assert_holds(&found, if named { new } else { old });
                let left: &[_] = if named { &["latest", "step-00000001", "step-00000002"] } else { &["latest", "step-00000001"] };
                assert_eq!(entries(root), left);
            }
            Ok(_) => assert_holds(&found, new),
        }
    });
}

#[test]
fn new_folders_have_durable_names() {
    let folder = empty_folder();
    let made = |changes: u64| {
        faults::plan(None);
        crate::durable::create_folder(&folder.path().join("a/b")).unwrap();
        assert_eq!(faults::count(), changes);
    };
    // Both folders in one change, and the folders that name them.
    made(3);
    made(1);
}

#[test]
fn older_checkpoints_go_and_damaged_ones_do_not_count() {
    let folder = empty_folder();
    for step in 1..=4 {
        let (store, _) = state(1, step);
        let done = write(folder.path(), step, 1, &store, 2).unwrap();
        assert_eq!(done.removed.len(), usize::from(step > 2));
    }
    assert_eq!(entries(folder.path()), ["latest", "step-00000003", "step-00000004"]);
    std::fs::remove_file(folder.path().join("step-00000004/shard-00000-of-00001.safetensors")).unwrap();
    for (step, left) in [(5, &[3, 4, 5][..]), (6, &[5, 6])] {
        let (store, _) = state(1, step);
        write(folder.path(), step, 1, &store, 2).unwrap();
        let left: Vec<_> = std::iter::once("latest".to_owned()).chain(left.iter().map(|&s| folder_name(s))).collect();
        assert_eq!(entries(folder.path()), left);
    }
}

#[test]
fn what_another_run_or_a_later_step_left_is_not_removed() {
    let folder = empty_folder();
    for step in [9, 2] {
        let (store, _) = state(1, step);
        let removed = write(folder.path(), step, 1, &store, 1).unwrap().removed;
        assert_eq!(removed, Vec::<PathBuf>::new(), "step {step}");
    }
    let (store, _) = state(1, 3);
    let writer = CheckpointWriter::begin(folder.path(), &files(3, 1, &store)).unwrap();
    writer.part(0, 1).unwrap().write_all(&store).unwrap();
    writer.commit(&CheckpointMeta { run: "run-2".into(), ..meta(3) }, &assets(), 1).unwrap();
    assert_eq!(entries(folder.path()), ["latest", "step-00000002", "step-00000003", "step-00000009"]);
    let (store, _) = state(1, 4);
    assert_eq!(write(folder.path(), 4, 1, &store, 1).unwrap().removed, [folder.path().join(folder_name(2))]);
    let of_run_2 = FindOptions { run: Some("run-2".into()), ..Default::default() };
    assert_eq!(find_sound(folder.path(), &of_run_2).unwrap().found.unwrap().step(), 3);
}

#[test]
fn one_writer_at_a_time() {
    let folder = empty_folder();
    let (store, _) = state(1, 1);
    let writer = CheckpointWriter::begin(folder.path(), &files(1, 1, &store)).unwrap();
    let second = CheckpointWriter::begin(folder.path(), &files(2, 1, &store)).err().unwrap();
    assert!(second.to_string().contains("another process is writing"), "{second}");
    writer.abort().unwrap();
    assert_eq!(entries(folder.path()), Vec::<String>::new());
    drop(CheckpointWriter::begin(folder.path(), &files(2, 1, &store)).unwrap());
    assert_eq!(entries(folder.path()), Vec::<String>::new());
    assert!(CheckpointWriter::join(folder.path(), &files(2, 1, &store)).is_err());
}

#[test]
fn an_incomplete_checkpoint_is_not_committed() {
    let folder = empty_folder();
    let (store, _) = state(1, 1);
    let writer = CheckpointWriter::begin(folder.path(), &files(1, 2, &store)).unwrap();
    writer.part(0, 2).unwrap().write_all(&store).unwrap();
    let error = writer.commit(&meta(1), &assets(), 0).unwrap_err().to_string();
    assert!(error.contains("rank-00001.json"), "{error}");

    let writer = CheckpointWriter::begin(folder.path(), &files(1, 1, &store)).unwrap();
    writer.part(0, 1).unwrap().write_all(&store).unwrap();
    let note = writer_note(folder.path(), 1);
    let text = std::fs::read_to_string(&note).unwrap();
    let (_, rest) = text.split_once("\"writer\":\"").unwrap();
    let identity = &rest[..rest.find('"').unwrap()];
    std::fs::write(&note, text.replace(identity, "1-2-3")).unwrap();
    let error = writer.commit(&meta(1), &assets(), 0).unwrap_err().to_string();
    assert!(error.contains("does not belong to this checkpoint"), "{error}");

    // A page that nobody wrote is room that was reserved, and no content.
    for (missing, twice) in [(true, false), (false, true)] {
        let files = files(1, 1, &store);
        let writer = CheckpointWriter::begin(folder.path(), &files).unwrap();
        let part = writer.part(0, 1).unwrap();
        for page in files.pages(0, 1) {
            for _ in 0..if page == 1 { usize::from(!missing) + usize::from(twice) } else { 1 } {
                part.write_page(page, |start, part, out| store.read_at_step(start, part, 1, out)).unwrap();
            }
        }
        part.finish().unwrap();
        let error = writer.commit(&meta(1), &assets(), 0).unwrap_err().to_string();
        assert!(error.contains("was written by no rank"), "{error}");
    }

    let writer = CheckpointWriter::begin(folder.path(), &files(2, 1, &store)).unwrap();
    let error = writer.part(0, 1).unwrap().write_all(&store).unwrap_err().to_string();
    assert!(error.contains("step 1") && error.contains("2"), "the store is at another step: {error}");
    assert!(writer.part(3, 2).is_err());
    drop(writer);
    assert!(verified(folder.path()).found.is_none());
}

/// After a death, the newest whole checkpoint of this run is told, `latest` names it, and nothing unfinished is left.
#[test]
fn a_folder_is_put_in_order_after_a_death() {
    let folder = empty_folder();
    let root = folder.path();
    assert_eq!(tidy(&root.join("none"), 9, "run-1", 1).unwrap(), None);
    for step in [4, 8, 12] {
        let (store, _) = state(1, step);
        write(root, step, 1, &store, 0).unwrap();
    }
    std::fs::write(root.join(LATEST_FILE), "step-00000004\n").unwrap();
    std::fs::create_dir(root.join("step-00000016.partial")).unwrap();
    std::fs::remove_file(root.join("step-00000008/shard-00000-of-00001.safetensors")).unwrap();
    assert_eq!(tidy(root, 9, "run-2", 1).unwrap(), None, "another run's");
    assert_eq!(tidy(root, 9, "run-1", 2).unwrap(), Some((4, root.join(folder_name(4)))), "8 is damaged, 12 is later");
    assert_eq!(tidy(root, 14, "run-1", 1).unwrap(), Some((12, root.join(folder_name(12)))));
    assert_eq!(std::fs::read_to_string(root.join(LATEST_FILE)).unwrap(), "step-00000012\n");
    assert_eq!(entries(root), ["latest", "step-00000012"]);
}

/// People and scripts that follow `latest` find a checkpoint, also when the one that it named is gone or damaged.
#[test]
fn latest_goes_back_when_what_it_names_is_no_checkpoint() {
    let latest = |root: &Path| std::fs::read_to_string(root.join(LATEST_FILE)).unwrap();
    for damaged in [false, true] {
        let folder = empty_folder();
        let root = folder.path();
        for step in [4, 8] {
            let (store, _) = state(1, step);
            write(root, step, 1, &store, 0).unwrap();
        }
        tidy(root, 4, "run-1", 2).unwrap();
        assert_eq!(latest(root), "step-00000008\n", "a sound one of a later step stays named");
        if damaged {
            std::fs::remove_file(root.join("step-00000008/shard-00000-of-00001.safetensors")).unwrap();
        } else {
            std::fs::remove_dir_all(root.join("step-00000008")).unwrap();
        }
        assert_eq!(tidy(root, 9, "run-1", 2).unwrap(), Some((4, root.join(folder_name(4)))));
        assert_eq!(latest(root), "step-00000004\n");
    }
}

fn writer_note(root: &Path, step: u64) -> PathBuf {
    root.join(format!("{}.partial", folder_name(step))).join("rank-00000.json")
}

fn damage(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn a_damaged_tensor_is_named_and_the_checkpoint_before_used() {
    let folder = empty_folder();
    let (first, source) = state(1, 1);
    write(folder.path(), 1, 1, &first, 0).unwrap();
    let (second, _) = state(2, 2);
    let path = write(folder.path(), 2, 1, &second, 0).unwrap().path;
    let shard = path.join("shard-00000-of-00001.safetensors");
    let offset = Checkpoint::open(&path).unwrap().place_of("model.layers.1.mlp.up_proj.weight.exp_avg_sq");
    damage(&shard, offset + 5);

    let checkpoint = Checkpoint::open(&path).unwrap();
    let (mut m, mut v) = ([0.0; 3], [0.0; 3]);
    let error = checkpoint.read_moments("model.layers.1.mlp.up_proj.weight", 90, &mut m, &mut v).unwrap_err();
    assert!(matches!(&error, ModelError::Damaged { tensor, .. } if tensor == "model.layers.1.mlp.up_proj.weight.exp_avg_sq"), "{error}");
    checkpoint.read("model.layers.1.mlp.up_proj.weight", 0, &mut m).unwrap();
    checkpoint.read_moments("model.norm.weight", 0, &mut m, &mut v).unwrap();

    // Sizes are right, so only a search that verifies passes it over.
    assert_eq!(find_sound(folder.path(), &FindOptions::default()).unwrap().found.unwrap().step(), 2);
    let search = verified(folder.path());
    assert_holds(&search.found.unwrap(), &source);
    assert_eq!(search.skipped.len(), 1);
    assert!(search.skipped[0].reason.contains("up_proj.weight.exp_avg_sq") && search.skipped[0].reason.contains("shard-00000-of-00001"));
    let behind = find_sound(folder.path(), &FindOptions { before: Some(2), ..Default::default() }).unwrap();
    assert_eq!((behind.found.unwrap().step(), behind.skipped.len()), (1, 0));
}

/// An older one in its place would lose steps that a mount brings back.
#[test]
fn what_the_system_does_not_read_is_an_error_and_not_passed_over() {
    let folder = empty_folder();
    let (store, _) = state(1, 1);
    let good = write(folder.path(), 1, 1, &store, 0).unwrap().path;
    let newer = folder.path().join(folder_name(2));
    std::fs::create_dir(&newer).unwrap();
    // Links that lead to themselves: whoever runs this cannot read them.
    std::os::unix::fs::symlink(MANIFEST_FILE, newer.join(MANIFEST_FILE)).unwrap();
    let error = find_sound(folder.path(), &FindOptions::default()).unwrap_err();
    assert!(matches!(&error, ModelError::Read { path, .. } if path.starts_with(&newer)), "{error}");
    std::fs::remove_file(newer.join(MANIFEST_FILE)).unwrap();
    for name in entries(&good) {
        std::fs::copy(good.join(&name), newer.join(&name)).unwrap();
    }
    let shard = newer.join("shard-00000-of-00001.safetensors");
    std::fs::remove_file(&shard).unwrap();
    std::os::unix::fs::symlink(&shard, &shard).unwrap();
    let error = find_sound(folder.path(), &FindOptions::default()).unwrap_err();
    assert!(error.to_string().contains("shard-00000"), "{error}");
}

#[test]
fn incomplete_and_foreign_folders_are_passed_over_with_a_reason() {
    let folder = empty_folder();
    let (store, _) = state(1, 1);
    let good = write(folder.path(), 1, 2, &store, 0).unwrap().path;
    let copy = |step: u64| {
        let to = folder.path().join(folder_name(step));
        std::fs::create_dir(&to).unwrap();
        for name in entries(&good) {
            std::fs::copy(good.join(&name), to.join(&name)).unwrap();
        }
        to
    };
    let shard = "shard-00001-of-00002.safetensors";
    std::fs::remove_file(copy(9).join(shard)).unwrap();
    std::fs::File::options().write(true).open(copy(8).join(shard)).unwrap().set_len(3000).unwrap();
    let newer = copy(7).join(MANIFEST_FILE);
    std::fs::write(&newer, std::fs::read_to_string(&newer).unwrap().replace("\"version\":1", "\"version\":2")).unwrap();
    copy(6);
    std::fs::create_dir(folder.path().join("step-00000005")).unwrap();
    std::fs::create_dir(folder.path().join("step-4")).unwrap();

    let search = find_sound(folder.path(), &FindOptions::default()).unwrap();
    assert_eq!(search.found.unwrap().step(), 1);
    let reasons: Vec<_> = search.skipped.iter().map(|s| s.reason.as_str()).collect();
    for (reason, says) in reasons.iter().zip([shard, "truncated", "version 2", "holds step 1", MANIFEST_FILE]) {
        assert!(reason.contains(says), "{reason}");
    }
    assert_eq!(reasons.len(), 5);
    let other = FindOptions { run: Some("run-2".into()), before: Some(5), ..Default::default() };
    assert!(find_sound(folder.path(), &other).unwrap().found.is_none());
    assert!(find_sound(&folder.path().join("none"), &FindOptions::default()).unwrap().found.is_none());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn no_damage_of_the_description_panics(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        thread_local! {
            static SOUND: (tempfile::TempDir, Vec<u8>) = {
                let folder = empty_folder();
                let (store, _) = state(1, 1);
                write(folder.path(), 1, 1, &store, 0).unwrap();
                let text = std::fs::read(folder.path().join(folder_name(1)).join(MANIFEST_FILE)).unwrap();
                (folder, text)
            };
        }
        SOUND.with(|(folder, text)| {
            let mut text = text.clone();
            for (at, byte) in &changes {
                let at = at.index(text.len());
                text[at] = *byte;
            }
            let path = folder.path().join(folder_name(1));
            std::fs::write(path.join(MANIFEST_FILE), &text).unwrap();
            if let Ok(checkpoint) = Checkpoint::open(&path) {
                // A changed checksum is found, anything else that passes the checks is readable.
                match checkpoint.verify() {
                    Ok(()) => drop(read_all(&checkpoint.meta().architecture, &checkpoint)),
                    Err(e) => assert!(matches!(e, ModelError::Damaged { .. }), "{e}"),
                }
            }
        });
    }
}
