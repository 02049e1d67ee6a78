use super::*;
use crate::checkpoint::{CheckpointFiles, CheckpointMeta, CheckpointWriter};
use crate::export::{ExportOptions, export_hf};
use crate::inspect::inspect;
use crate::source::StoreWeights;
use crate::testing::{Synthetic, TINY_LLAMA, bits, empty_folder, fixture, read_all, store, tiny_llama};
use ramtorch_store::MomentFormat;

fn spec(text: &str) -> ModelSpec {
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_job_names_its_model_in_three_ways() {
    let folder = fixture("llama");
    let by_path = resolve(&spec(&format!(r#"{{"path": {folder:?}}}"#))).unwrap();
    assert_eq!(by_path.weights.as_deref(), Some(folder.as_path()));
    assert!(by_path.assets.file("tokenizer.json").is_some());
    let by_config = resolve(&spec(&format!(r#"{{"config": {:?}}}"#, folder.join("config.json")))).unwrap();
    assert_eq!((by_config.weights, &by_config.architecture), (None, &by_path.architecture));
    assert_eq!(by_config.assets, by_path.assets);
    let stack = resolve(&spec(r#"{"layers": [4, 8, 2], "activation": "tanh", "weights": "w.safetensors"}"#)).unwrap();
    assert_eq!(stack.architecture.describe(), "Stack, 58 parameters, 2 layers");
    assert_eq!(stack.weights, Some("w.safetensors".into()));
    assert!(resolve(&spec(r#"{"layers": [4]}"#)).is_err());
    assert!(resolve(&spec("{}")).is_err());
    assert!(matches!(resolve(&spec(r#"{"path": "/nowhere"}"#)), Err(ModelError::Read { .. })));
}

#[test]
fn another_tokenizer_brings_its_settings() {
    let folder = empty_folder();
    let (model, other) = (folder.path().join("model"), folder.path().join("other"));
    for (path, mark) in [(&model, "model"), (&other, "other")] {
        std::fs::create_dir(path).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "vocab.json"] {
            std::fs::write(path.join(name), mark).unwrap();
        }
    }
    std::fs::write(model.join("config.json"), TINY_LLAMA).unwrap();
    std::fs::write(model.join("generation_config.json"), "model").unwrap();
    std::fs::remove_file(other.join("vocab.json")).unwrap();
    std::fs::rename(other.join("tokenizer.json"), other.join("mine.json")).unwrap();
    let assets = ModelAssets::from_folder(&model, Some(&other.join("mine.json"))).unwrap();
    assert_eq!(assets.file("tokenizer.json"), Some(&b"other"[..]));
    assert_eq!(assets.file("tokenizer_config.json"), Some(&b"other"[..]));
    assert_eq!(assets.file("generation_config.json"), Some(&b"model"[..]));
    assert_eq!(assets.file("vocab.json"), None, "it belongs to the tokenizer that was replaced");
    assert!(ModelAssets::from_folder(&model, Some(&other.join("none.json"))).is_err());
}

#[test]
fn weights_come_from_a_folder_a_file_or_a_seed() {
    let folder = empty_folder();
    let stack = resolve(&spec(r#"{"layers": [4, 8, 2]}"#)).unwrap();
    let seeded = open_weights(&stack.architecture, None, 3).unwrap();
    let out = folder.path().join("out");
    export_hf(&out, &stack.architecture, &stack.assets, &*seeded, &ExportOptions::new(Dtype::F32, false)).unwrap();
    let expected = read_all(&stack.architecture, &*seeded);
    for path in [out.clone(), out.join("model.safetensors")] {
        let opened = open_weights(&stack.architecture, Some(&path), 0).unwrap();
        assert_eq!(read_all(&stack.architecture, &*opened), expected);
    }
    let opened = OpenModel::open(&out).unwrap();
    assert_eq!((&opened.architecture, opened.step), (&stack.architecture, None));
    assert_eq!(read_all(&stack.architecture, &*opened.weights), expected);
    std::fs::write(out.join(STACK_FILE), r#"{"architecture": {"stack": {"widths": [], "activation": "relu", "loss": "mse"}}}"#).unwrap();
    assert!(OpenModel::open(&out).err().unwrap().to_string().contains("widths"));
}

#[test]
fn paths_are_recognised() {
    let folder = empty_folder();
    let source = Synthetic { salt: 1, moments: true };
    let config = TINY_LLAMA.replace("\"tie_word", "\"torch_dtype\": \"bfloat16\", \"tie_word");
    for step in [5, 6] {
        let store = store(&tiny_llama(), 1, MomentFormat::F32, step, &source);
        let files = std::sync::Arc::new(CheckpointFiles::new(store.layout(), 1, step).unwrap());
        let writer = CheckpointWriter::begin(folder.path(), &files).unwrap();
        writer.part(0, 1).unwrap().write_all(&store).unwrap();
        let meta = CheckpointMeta { step, run: "r".into(), architecture: tiny_llama(), job: serde_json::Value::Null, values: vec![] };
        let assets = ModelAssets { config: Some(config.clone().into_bytes()), files: vec![] };
        writer.commit(&meta, &assets, 0).unwrap();
    }
    let newest = OpenModel::open(folder.path()).unwrap();
    assert_eq!((newest.step, newest.dtype), (Some(6), Dtype::BF16));
    assert_eq!(read_all(&tiny_llama(), &*newest.weights), read_all(&tiny_llama(), &source));
    let one = folder.path().join("step-00000005");
    assert_eq!(OpenModel::open(&one).unwrap().step, Some(5));
    std::fs::remove_file(folder.path().join("step-00000006").join(MANIFEST_FILE)).unwrap();
    let older = OpenModel::open(folder.path()).unwrap();
    assert_eq!((older.step, older.skipped.len()), (Some(5), 1));
    std::fs::remove_file(one.join(MANIFEST_FILE)).unwrap();
    let error = OpenModel::open(folder.path()).err().unwrap().to_string();
    assert!(error.contains("none of its 2 checkpoints"), "{error}");

    assert_eq!(OpenModel::open(&fixture("qwen2-untied")).unwrap().dtype, Dtype::BF16);
    let empty = empty_folder();
    assert!(OpenModel::open(empty.path()).err().unwrap().to_string().contains("neither a model"));
    assert!(matches!(OpenModel::open(&empty.path().join("x")), Err(ModelError::Read { .. })));
}

#[test]
fn tensors_are_described_the_same_wherever_they_are() {
    let path = fixture("qwen3");
    let folder = OpenModel::open(&path).unwrap();
    let store = store(&folder.architecture, 2, MomentFormat::None, 0, &*folder.weights);
    let live = StoreWeights::live(&store);
    let names = ["model.layers.*.self_attn.?_proj.weight".to_owned(), "lm_head.weight".to_owned()];
    let there = inspect(&folder.architecture, &*folder.weights, &names, 4, None).unwrap();
    let here = inspect(&folder.architecture, &live, &names, 4, Some(store.layout())).unwrap();
    assert_eq!(there.len(), 9);
    for (a, b) in there.iter().zip(&here) {
        assert!(a.pages.is_empty() && !b.pages.is_empty());
        assert_eq!(a, &crate::TensorSummary { pages: vec![], ..b.clone() });
        let all = read_all(&folder.architecture, &*folder.weights);
        let blocks = folder.architecture.blocks();
        let number = crate::hf::inventory(&blocks).position(|(name, _)| name == a.name).unwrap();
        let values: Vec<f64> = all[number].iter().map(|&x| f64::from(x)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64;
        assert!((a.mean - mean).abs() < 1e-12 && (a.std - variance.sqrt()).abs() < 1e-12);
        assert_eq!(bits(&a.values), bits(&all[number][..4]));
        assert_eq!((a.parameters, a.nonfinite, a.dtype.as_str()), (values.len() as u64, 0, "F32"));
    }
    assert!(inspect(&folder.architecture, &live, &["nothing*".into()], 0, None).unwrap_err().to_string().contains("nothing*"));
    assert!(inspect(&folder.architecture, &live, &["[".into()], 0, None).is_err());
    assert_eq!(inspect(&folder.architecture, &live, &[], 0, None).unwrap().len(), store.layout().tensors().len());
}
