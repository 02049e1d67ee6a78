use super::*;
use crate::testing::{Synthetic, TINY_LLAMA, architecture, bits, empty_folder, fixture, read_all, tiny_llama};
use crate::{ExportOptions, ModelAssets, export_hf};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Tensors of a file under construction: name, shape, values.
type Tensors = BTreeMap<String, (Vec<u64>, Vec<f32>)>;

fn tensors(architecture: &Architecture) -> Tensors {
    let source = Synthetic { salt: 3, moments: false };
    let blocks = architecture.blocks();
    let one = |(name, shape): (&str, &[u64])| {
        let mut values = vec![0.0; shape.iter().product::<u64>() as usize];
        source.read(name, 0, &mut values).unwrap();
        (name.to_owned(), (shape.to_vec(), values))
    };
    inventory(&blocks).map(one).collect()
}

/// A safetensors file made by hand, independently of this crate's writer.
fn write(path: &Path, tensors: &Tensors, dtype: &str) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for (name, (shape, values)) in tensors {
        let start = data.len();
        for x in values {
            match dtype {
                "F64" => data.extend(f64::from(*x).to_le_bytes()),
                "BF16" => data.extend(half::bf16::from_f32(*x).to_le_bytes()),
                "F16" => data.extend(half::f16::from_f32(*x).to_le_bytes()),
                "I32" => data.extend((*x as i32).to_le_bytes()),
                _ => data.extend(x.to_le_bytes()),
            }
        }
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    std::fs::write(path, bytes).unwrap();
}

fn open(tensors: &Tensors, architecture: &Architecture) -> Result<HfFolder, ModelError> {
    let folder = empty_folder();
    write(&folder.path().join(SINGLE_FILE), tensors, "F32");
    HfFolder::open(folder.path(), architecture)
}

#[test]
fn fixtures_open_and_agree_with_the_reference_library() {
    for name in ["llama", "llama-tied-llama3", "mistral", "qwen2", "qwen2-untied", "qwen3", "gpt2"] {
        let path = fixture(name);
        let (model, _) = Architecture::from_config_file(&path.join("config.json")).unwrap();
        let folder = HfFolder::open(&path, &model).unwrap();
        assert_eq!(folder.dtype(), if name == "qwen2-untied" { Dtype::BF16 } else { Dtype::F32 });
        let mut seen = 0;
        for file in
            std::fs::read_dir(&path).unwrap().map(|f| f.unwrap().path()).filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
        {
            let bytes = std::fs::read(&file).unwrap();
            for (name, view) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                let mut ours = vec![0.0; view.shape().iter().product()];
                folder.read(&name, 0, &mut ours).unwrap();
                let theirs: Vec<u32> = match view.dtype() {
                    safetensors::Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect(),
                    _ => view.data().as_chunks::<2>().0.iter().map(|&b| u32::from(u16::from_le_bytes(b)) << 16).collect(),
                };
                assert_eq!(bits(&ours), theirs, "{name}");
                seen += ours.len() as u64;
            }
        }
        assert_eq!(seen, model.parameter_count(), "{name}");
    }
}

#[test]
fn every_number_format_is_read() {
    let model = tiny_llama();
    let mut given = tensors(&model);
    given.values_mut().for_each(|(_, values)| values.iter_mut().for_each(|x| *x = (*x * 64.0).round() / 64.0));
    for dtype in ["F64", "F32", "BF16", "F16"] {
        let folder = empty_folder();
        write(&folder.path().join(SINGLE_FILE), &given, dtype);
        let opened = HfFolder::open(folder.path(), &model).unwrap();
        assert_eq!(opened.dtype().name(), dtype);
        for (name, (_, values)) in &given {
            let mut out = vec![0.0; values.len()];
            opened.read(name, 0, &mut out).unwrap();
            assert_eq!(&out, values, "{dtype} {name}");
        }
    }
    let folder = empty_folder();
    write(&folder.path().join(SINGLE_FILE), &given, "I32");
    let error = HfFolder::open(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("type that weights cannot have"), "{error}");
}

#[test]
fn what_does_not_fit_names_tensor_and_file() {
    let model = tiny_llama();
    let norm = "model.layers.1.input_layernorm.weight";

    let mut given = tensors(&model);
    given.remove(norm);
    let error = open(&given, &model).unwrap_err();
    assert!(matches!(&error, ModelError::MissingTensor { tensor, .. } if tensor == norm), "{error}");

    let mut given = tensors(&model);
    given.insert("model.layers.2.input_layernorm.weight".into(), (vec![8], vec![0.0; 8]));
    let error = open(&given, &model).unwrap_err();
    assert!(matches!(&error, ModelError::ExtraTensor { .. }), "{error}");
    assert!(error.to_string().contains("layers.2") && error.to_string().contains(SINGLE_FILE), "{error}");

    let mut given = tensors(&model);
    given.insert(norm.into(), (vec![2, 4], vec![0.0; 8]));
    let error = open(&given, &model).unwrap_err().to_string();
    assert!(error.contains(norm) && error.contains("[2, 4]") && error.contains("[8]"), "{error}");

    let mut given = tensors(&model);
    let plain = given["model.norm.weight"].clone();
    given.insert("norm.weight".into(), plain);
    assert!(open(&given, &model).unwrap_err().to_string().contains("as well"));

    let folder = empty_folder();
    let error = HfFolder::open(folder.path(), &model).unwrap_err().to_string();
    assert!(error.contains("neither model.safetensors nor"), "{error}");
    std::fs::write(folder.path().join("pytorch_model.bin"), b"x").unwrap();
    assert!(HfFolder::open(folder.path(), &model).unwrap_err().to_string().contains("pytorch_model.bin is not read"));
    write(&folder.path().join(SINGLE_FILE), &tensors(&model), "F32");
    let file = folder.path().join(SINGLE_FILE);
    let size = std::fs::metadata(&file).unwrap().len();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(size - 1).unwrap();
    assert!(HfFolder::open(folder.path(), &model).unwrap_err().to_string().contains("truncated: tensor `"));
}

#[test]
fn buffers_prefixes_and_tied_heads_of_older_files_are_accepted() {
    let tied = architecture(&TINY_LLAMA.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true"));
    let mut given = tensors(&tied);
    given.insert("lm_head.weight".into(), (vec![37, 8], vec![0.0; 37 * 8]));
    given.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (vec![2], vec![0.0; 2]));
    open(&given, &tied).unwrap();
    assert!(open(&given, &tiny_llama()).is_ok(), "an untied head is a weight");

    let gpt2 = architecture(r#"{"model_type": "gpt2", "vocab_size": 11, "n_positions": 6, "n_embd": 4, "n_layer": 1, "n_head": 2}"#);
    let whole = tensors(&gpt2);
    let mut bare: Tensors = whole.iter().map(|(name, t)| (name.strip_prefix("transformer.").unwrap().to_owned(), t.clone())).collect();
    bare.insert("h.0.attn.bias".into(), (vec![1, 1, 6, 6], vec![0.0; 36]));
    bare.insert("h.0.attn.masked_bias".into(), (vec![], vec![0.0]));
    let opened = open(&bare, &gpt2);
    let folder = empty_folder();
    write(&folder.path().join(SINGLE_FILE), &bare, "F32");
    drop(opened.unwrap());
    let opened = HfFolder::open(folder.path(), &gpt2).unwrap();
    for (name, (_, values)) in &whole {
        let mut out = vec![0.0; values.len()];
        opened.read(name, 0, &mut out).unwrap();
        assert_eq!(&out, values, "{name}");
    }
}

fn sharded(folder: &Path) -> (Architecture, Index) {
    let model = tiny_llama();
    let assets = ModelAssets { config: Some(TINY_LLAMA.as_bytes().to_vec()), files: Vec::new() };
    let options = ExportOptions { dtype: Dtype::F32, overwrite: false, shard_bytes: 2000, follow_links: true };
    let out = folder.join("out");
    export_hf(&out, &model, &assets, &Synthetic { salt: 3, moments: false }, &options).unwrap();
    (model, Index::read(&out.join(INDEX_FILE)).unwrap())
}

#[test]
fn shards_are_put_together_and_missing_ones_told() {
    let folder = empty_folder();
    let (model, index) = sharded(folder.path());
    let out = folder.path().join("out");
    assert!(index.files.len() > 2, "{:?}", index.files);
    let opened = HfFolder::open(&out, &model).unwrap();
    assert_eq!(read_all(&model, &opened), read_all(&model, &Synthetic { salt: 3, moments: false }));

    let shard = out.join(index.files.iter().nth(1).unwrap());
    let moved = out.join("aside");
    std::fs::rename(&shard, &moved).unwrap();
    let error = HfFolder::open(&out, &model).unwrap_err().to_string();
    assert!(error.contains(shard.to_str().unwrap()), "{error}");
    std::fs::rename(&moved, &shard).unwrap();

    let edit = |from: &str, to: &str| {
        let text = std::fs::read_to_string(out.join(INDEX_FILE)).unwrap();
        assert!(text.contains(from));
        std::fs::write(out.join(INDEX_FILE), text.replace(from, to)).unwrap();
        let error = HfFolder::open(&out, &model).unwrap_err().to_string();
        std::fs::write(out.join(INDEX_FILE), text).unwrap();
        error
    };
    let name = shard.file_name().unwrap().to_str().unwrap();
    assert!(edit(name, "../secret").contains("not a file of this folder"));
    assert!(edit(name, "/etc/passwd").contains("not a file of this folder"));
    assert!(edit("weight_map", "weights").contains("damaged index"));
    assert!(edit("model.norm.weight", "model.nrom.weight").contains("model.nrom.weight"));
}
