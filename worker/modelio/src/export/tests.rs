use super::*;
use crate::durable::faults::{self, Fault};
use crate::hf::HfFolder;
use crate::source::StoreWeights;
use crate::testing::{Synthetic, TINY_LLAMA, empty_folder, fixture, read_all, store, tiny_llama};
use ramtorch_store::MomentFormat;

fn assets() -> ModelAssets {
    ModelAssets { config: Some(TINY_LLAMA.into()), files: vec![("tokenizer.json".into(), b"{}".to_vec())] }
}

fn source(salt: u32) -> Synthetic {
    Synthetic { salt, moments: false }
}

fn export(folder: &Path, salt: u32, options: &ExportOptions) -> Result<u64, ModelError> {
    export_hf(folder, &tiny_llama(), &assets(), &source(salt), options)
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn fixtures_go_out_as_they_came_in() {
    for name in ["llama", "llama-tied-llama3", "mistral", "qwen2", "qwen2-untied", "qwen3", "gpt2"] {
        let path = fixture(name);
        let (model, _) = Architecture::from_config_file(&path.join("config.json")).unwrap();
        let folder = HfFolder::open(&path, &model).unwrap();
        let assets = ModelAssets::from_folder(&path, None).unwrap();
        let out = empty_folder();
        let out = out.path().join("deep/model");
        export_hf(&out, &model, &assets, &folder, &ExportOptions::new(folder.dtype(), false)).unwrap();
        let back = HfFolder::open(&out, &Architecture::from_config_file(&out.join("config.json")).unwrap().0).unwrap();
        assert_eq!(back.dtype(), folder.dtype());
        assert_eq!(read_all(&model, &back), read_all(&model, &folder), "{name}");
        assert_eq!(std::fs::read(out.join("tokenizer.json")).unwrap(), std::fs::read(path.join("tokenizer.json")).unwrap());
    }
}

#[test]
fn a_store_is_exported_at_one_step_and_rounded_as_pytorch_rounds() {
    let folder = empty_folder();
    let (model, out) = (tiny_llama(), folder.path().join("out"));
    let store = store(&model, 2, MomentFormat::F32, 7, &source(1));
    let options = ExportOptions::new(Dtype::BF16, false);
    assert!(export_hf(&out, &model, &assets(), &StoreWeights::at_step(&store, 8), &options).is_err());
    assert_eq!(entries(folder.path()), Vec::<String>::new(), "a failed export leaves nothing");
    let bytes = export_hf(&out, &model, &assets(), &StoreWeights::at_step(&store, 7), &options).unwrap();
    assert_eq!(bytes, std::fs::metadata(out.join(SINGLE_FILE)).unwrap().len());
    let back = read_all(&model, &HfFolder::open(&out, &model).unwrap());
    for (a, b) in read_all(&model, &source(1)).iter().flatten().zip(back.iter().flatten()) {
        assert_eq!(half::bf16::from_f32(*a).to_f32().to_bits(), b.to_bits());
    }
}

#[test]
fn the_configuration_is_kept_and_its_format_corrected() {
    let corrected = |text: &str, dtype| corrected_config(text.as_bytes(), "LlamaForCausalLM", dtype).unwrap().to_string();
    let given = r#"{"z":1,"torch_dtype":"float16","architectures":["Mine"],"a":{"b":1e-6}}"#;
    assert_eq!(corrected(given, Dtype::BF16), r#"{"z":1,"torch_dtype":"bfloat16","architectures":["Mine"],"a":{"b":1e-6}}"#);
    assert_eq!(corrected(r#"{"dtype":"bfloat16","architectures":["A"]}"#, Dtype::F32), r#"{"dtype":"float32","architectures":["A"]}"#);
    assert_eq!(corrected("{}", Dtype::F32), r#"{"torch_dtype":"float32","architectures":["LlamaForCausalLM"]}"#);
}

#[test]
fn large_models_are_sharded() {
    let plan = |bytes: &[u64]| -> Vec<PlannedTensor> {
        bytes.iter().enumerate().map(|(i, &b)| PlannedTensor { name: i.to_string(), dtype: Dtype::BF16, shape: vec![b / 2] }).collect()
    };
    let lengths = |bytes: &[u64], limit| shards(&plan(bytes), limit).iter().map(|s| s.len()).collect::<Vec<_>>();
    assert_eq!(lengths(&[4, 4, 4], 12), [3]);
    assert_eq!(lengths(&[4, 4, 4], 11), [2, 1]);
    assert_eq!(lengths(&[4, 40, 4, 4], 11), [1, 1, 2]);

    let folder = empty_folder();
    let out = folder.path().join("m");
    export(&out, 1, &ExportOptions { shard_bytes: 3000, ..ExportOptions::new(Dtype::F32, false) }).unwrap();
    let index: Value = serde_json::from_slice(&std::fs::read(out.join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], tiny_llama().parameter_count() * 4);
    let count = entries(&out).iter().filter(|n| n.ends_with(".safetensors")).count();
    assert!(count > 1 && entries(&out).contains(&format!("model-00001-of-{count:05}.safetensors")));
    assert_eq!(read_all(&tiny_llama(), &HfFolder::open(&out, &tiny_llama()).unwrap()), read_all(&tiny_llama(), &source(1)));
    // Unsharded over sharded: nothing of the old files may be left to be picked up.
    export(&out, 2, &ExportOptions::new(Dtype::F32, true)).unwrap();
    assert_eq!(entries(&out), ["config.json", "model.safetensors", "tokenizer.json"]);
}

#[test]
fn folders_are_replaced_only_when_that_is_safe() {
    let folder = empty_folder();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    export(&out, 1, &ExportOptions::new(Dtype::F32, false)).unwrap();
    let error = export(&out, 2, &ExportOptions::new(Dtype::F32, false)).unwrap_err();
    assert!(error.to_string().contains("already and not empty"), "{error}");
    assert_eq!(error.fault(), crate::Fault::Output);
    export(&out, 2, &ExportOptions::new(Dtype::F32, true)).unwrap();
    std::fs::write(out.join("thesis.tex"), "x").unwrap();
    let error = export(&out, 3, &ExportOptions::new(Dtype::F32, true)).unwrap_err();
    assert!(error.to_string().contains("thesis.tex"), "{error}");
    assert_eq!(entries(folder.path()), ["out"]);
    std::fs::remove_file(out.join("thesis.tex")).unwrap();

    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&out, &link).unwrap();
    export(&link, 4, &ExportOptions::new(Dtype::F32, true)).unwrap();
    assert!(link.is_symlink());
    assert_eq!(read_all(&tiny_llama(), &HfFolder::open(&out, &tiny_llama()).unwrap()), read_all(&tiny_llama(), &source(4)));

    std::fs::write(folder.path().join("file"), "x").unwrap();
    assert!(export(&folder.path().join("file"), 1, &ExportOptions::new(Dtype::F32, true)).is_err());
    assert!(export(Path::new("/"), 1, &ExportOptions::new(Dtype::F32, false)).is_err());
    let error =
        export_hf(&folder.path().join("x"), &tiny_llama(), &ModelAssets::default(), &source(1), &ExportOptions::new(Dtype::F32, false));
    assert!(error.unwrap_err().to_string().contains("config.json"));
}

#[test]
fn an_export_that_dies_leaves_the_old_folder_or_the_new_one() {
    for (fault, follow_links) in [(Fault::Death, true), (Fault::Death, false), (Fault::DiskFull, true), (Fault::DiskFull, false)] {
        let mut n = 0;
        loop {
            let folder = empty_folder();
            let out = folder.path().join("out");
            let options = ExportOptions { shard_bytes: 3000, follow_links, ..ExportOptions::new(Dtype::F32, true) };
            export(&out, 1, &options).unwrap();
            faults::plan(Some((n, fault)));
            let result = export(&out, 2, &options);
            let reached = faults::count() > n;
            faults::plan(None);
            let held = read_all(&tiny_llama(), &HfFolder::open(&out, &tiny_llama()).unwrap());
            let is_new = held == read_all(&tiny_llama(), &source(2));
            assert!(is_new || held == read_all(&tiny_llama(), &source(1)), "{fault:?} at {n}");
            assert!(is_new || result.is_err());
            export(&out, 3, &options).unwrap();
            assert_eq!(entries(folder.path()), ["out"], "{fault:?} at {n}");
            if !reached {
                result.unwrap();
                assert!(n > 20);
                break;
            }
            n += 1;
        }
    }
}

/// Somebody puts links in the way of an export for which the path was looked at before, at any time.
#[test]
fn a_link_that_comes_into_the_way_is_not_followed() {
    use std::os::unix::fs::symlink;
    let options = ExportOptions { follow_links: false, ..ExportOptions::new(Dtype::F32, true) };
    let folder = empty_folder();
    let root = folder.path().canonicalize().unwrap();
    let at = |p: &str| root.join(p);
    std::fs::create_dir_all(at("theirs")).unwrap();
    std::fs::write(at("theirs/config.json"), "theirs").unwrap();
    let untouched = || {
        assert_eq!(entries(&at("theirs")), ["config.json"]);
        assert_eq!(std::fs::read_to_string(at("theirs/config.json")).unwrap(), "theirs");
    };
    // Before: the folder itself, one above it, what is written beside it.
    for link in ["mine", "way"] {
        symlink(at("theirs"), at(link)).unwrap();
        let e = export(&at(link).join(if link == "way" { "model" } else { "" }), 1, &options).unwrap_err();
        assert!(e.fault() == crate::Fault::Output && e.to_string().contains(&format!("/{link}: is a link")), "{e}");
        std::fs::remove_file(at(link)).unwrap();
        untouched();
    }
    std::fs::create_dir(at("way")).unwrap();
    for (suffix, target) in [(".partial", "theirs"), (".replaced", "theirs"), (".partial", "nowhere")] {
        symlink(at(target), at(&format!("way/model{suffix}"))).unwrap();
        export(&at("way/model"), 1, &options).unwrap();
        assert_eq!(entries(&at("way")), ["model"], "{suffix}");
        untouched();
    }
    // While the first tensor is read: of the folder above, of the temporary folder, of the folder itself.
    struct Swaps<'a>(&'a (dyn Fn() + Sync), std::sync::Once);
    impl WeightSource for Swaps<'_> {
        fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
            self.1.call_once(self.0);
            source(7).read(tensor, start, out)
        }
    }
    let swapped =
        |swap: &(dyn Fn() + Sync)| export_hf(&at("way/model"), &tiny_llama(), &assets(), &Swaps(swap, std::sync::Once::new()), &options);
    let put = |name: &str| {
        std::fs::rename(at(name), at("aside")).unwrap();
        symlink(at("theirs"), at(name)).unwrap();
    };
    let done =
        |path: &str| read_all(&tiny_llama(), &HfFolder::open(&at(path), &tiny_llama()).unwrap()) == read_all(&tiny_llama(), &source(7));
    swapped(&|| put("way")).unwrap();
    assert!(done("aside/model"), "in the folder that was meant");
    untouched();
    std::fs::remove_file(at("way")).unwrap();
    std::fs::rename(at("aside"), at("way")).unwrap();
    let e = swapped(&|| put("way/model.partial")).unwrap_err();
    assert!(e.to_string().contains("way/model.partial: was moved away") && entries(&at("way")) == ["model"], "{e}");
    untouched();
    std::fs::remove_dir_all(at("aside")).unwrap();
    std::fs::remove_dir_all(at("way")).unwrap();
    std::fs::create_dir(at("way")).unwrap();
    swapped(&|| symlink(at("theirs"), at("way/model")).unwrap()).unwrap();
    assert!(done("way/model") && entries(&at("way")) == ["model"], "{:?}", entries(&at("way")));
    untouched();
    // Folders on the way are made; links are followed where nobody has looked.
    export(&at("new/deep/model"), 1, &options).unwrap();
    symlink(at("new"), at("link")).unwrap();
    export(&at("link/deep/model"), 2, &ExportOptions { follow_links: true, ..options }).unwrap();
    assert!(export(&at("link/deep/model"), 2, &options).is_err() && export(Path::new("/"), 2, &options).is_err());
}
