//! inspect, export, eval, generate.

use crate::mock::{Mock, Stage};
use ramtorch_client::v1;
use v1::model_source::Source;

fn tensor(name: &str, values: Vec<f32>) -> v1::TensorInfo {
    v1::TensorInfo {
        name: name.into(),
        shape: vec![2, 3],
        dtype: "bf16".into(),
        block: "layer 0".into(),
        parameters: 6,
        mean: 0.0,
        std: 0.0212,
        min: -0.5,
        max: f64::NAN,
        nonfinite: 1,
        values,
        pages: vec![0],
    }
}

#[tokio::test]
async fn inspect_is_a_table_of_tensors() {
    let tensors = vec![tensor("model.norm.weight", vec![]), tensor("w", vec![0.5, -1.0])];
    let mock = Mock::start(Stage { tensors, ..Stage::default() });
    let out = mock.run(&["inspect", "austen", "model.*", "w", "--values", "2"]).await.succeeded().out;
    let expected = "\
NAME               SHAPE  DTYPE  BLOCK    PARAMETERS  MEAN      STD       MIN  MAX  NOT FINITE
model.norm.weight  2×3    bf16   layer 0           6     0  2.12e-2  -5.00e-1  NaN           1
w                  2×3    bf16   layer 0           6     0  2.12e-2  -5.00e-1  NaN           1

w
  5e-1 -1e0 …

2 tensors, 12 parameters, step 120
";
    assert_eq!(out, expected);
    let asked = mock.stage().inspect_asked[0].clone();
    assert_eq!(asked.model.unwrap().source.unwrap(), Source::Job("austen".into()));
    assert_eq!((asked.names, asked.values), (vec!["model.*".to_owned(), "w".into()], 2));
    let json = &mock.run(&["inspect", "job:austen", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!((json["step"].as_u64(), json["tensors"][1]["shape"][1].as_u64()), (Some(120), Some(3)));
    assert!(json["tensors"][0]["max"].is_null());
}

#[tokio::test]
async fn export_sends_absolute_paths() {
    let mock = Mock::start(Stage::default());
    std::fs::create_dir(mock.folder().join("austen")).unwrap();
    let mut command = mock.command(&["export", "austen", "out/model", "--dtype", "bf16", "--overwrite"]);
    let ended = crate::harness::end(command.current_dir(mock.folder())).await.succeeded();
    let path = mock.folder().join("out/model");
    assert_eq!(ended.out, format!("exported step 300 to {}, 1.50 GiB\n", path.display()));
    let asked = mock.stage().export_asked[0].clone();
    let folder = mock.folder().join("austen").to_str().unwrap().to_owned();
    assert_eq!(asked.model.unwrap().source.unwrap(), Source::Path(folder), "the folder is there");
    assert_eq!((asked.dtype.as_str(), asked.overwrite), ("bf16", true));
    let json = &mock.run(&["export", "austen", "/m", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(*json, serde_json::json!({ "path": "/m", "step": 300, "bytes": 3u64 << 29 }));
}

#[tokio::test]
async fn eval_measures_on_files() {
    let mock = Mock::start(Stage::default());
    let arguments = ["eval", "/models/a", "--data", "/d/a.jsonl", "/d/*.jsonl", "--format", "jsonl", "--sequence-length", "256"];
    let out = mock.run(&arguments).await.succeeded().out;
    assert_eq!(out, "loss        2.5000\nperplexity  12.1825\ntokens      40000\ntime        8s (5.00k tok/s)\n");
    let asked = mock.stage().eval_asked[0].clone();
    assert_eq!((asked.files, asked.sequence_length), (vec!["/d/a.jsonl".to_owned(), "/d/*.jsonl".into()], 256));
    assert_eq!(asked.data_format, "jsonl");
    let json = &mock.run(&["eval", "/m", "--data", "x", "--format", "text", "--output", "json"]).await.succeeded().json()[0];
    assert_eq!(*json, serde_json::json!({ "loss": 2.5, "perplexity": 12.182_493_960_703_473, "tokens": 40_000, "seconds": 8.0 }));
    assert_eq!(mock.run(&["eval", "/m", "--format", "text"]).await.code, Some(2), "no data");
}

fn token(prompt: u32, text: &str) -> v1::GenerateEvent {
    v1::GenerateEvent { event: Some(v1::generate_event::Event::Token(v1::TokenText { prompt, text: text.into() })) }
}

fn done(texts: &[&str]) -> v1::GenerateEvent {
    let texts = texts.iter().map(|t| (*t).to_owned()).collect();
    v1::GenerateEvent {
        event: Some(v1::generate_event::Event::Done(v1::GenerateDone {
            texts,
            prompt_tokens: 3,
            new_tokens: 10,
            seconds: 2.0,
            prefill_seconds: 0.5,
            decode_seconds: 1.0,
            decode_tokens: 9,
        })),
    }
}

#[tokio::test]
async fn a_single_prompt_streams() {
    let generated = vec![token(0, " a truth"), token(0, " univer\x1bsally"), done(&[" a truth universally"])];
    let mock = Mock::start(Stage { generated, ..Stage::default() });
    let arguments = [
        "generate",
        "austen",
        "--prompt",
        "-It is",
        "--max-new-tokens",
        "9",
        "--temperature",
        "0",
        "--top-k",
        "5",
        "--top-p",
        "0.9",
        "--seed",
        "7",
        "--chat",
    ];
    let ended = mock.run(&arguments).await.succeeded();
    assert_eq!(ended.out, " a truth univer\u{fffd}sally\n");
    assert_eq!(ended.err, "10 tokens in 2s (9.0 tok/s after the first)\n");
    let asked = mock.stage().generate_asked[0].clone();
    assert_eq!(asked.prompts, ["-It is"]);
    assert_eq!((asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p, asked.seed, asked.chat), (9, 0.0, 5, 0.9, 7, true));
}

#[tokio::test]
async fn several_prompts_come_together() {
    let generated = vec![token(1, "two"), token(0, "on"), token(0, "e"), done(&["one", "two\nlines"])];
    let mock = Mock::start(Stage { generated, ..Stage::default() });
    let file = mock.folder().join("prompts");
    std::fs::write(&file, "\nsecond\n").unwrap();
    let arguments = ["generate", "austen", "-p", "first", "--prompts-file", file.to_str().unwrap()];
    let ended = mock.run(&arguments).await.succeeded();
    assert_eq!(ended.out, "[1] first\n    one\n\n[2] second\n    two\n    lines\n");
    let json = &mock.run(&[&arguments[..], &["--output", "json"]].concat()).await.succeeded().json()[0];
    assert_eq!(json["prompts"], serde_json::json!(["first", "second"]));
    assert_eq!(json["texts"], serde_json::json!(["one", "two\nlines"]));
    assert_eq!((json["new_tokens"].as_u64(), json["seconds"].as_f64()), (Some(10), Some(2.0)));
    assert_eq!(
        (json["prefill_seconds"].as_f64(), json["decode_seconds"].as_f64(), json["decode_tokens"].as_u64()),
        (Some(0.5), Some(1.0), Some(9))
    );
}

#[tokio::test]
async fn the_standard_input_is_the_prompt() {
    let mock = Mock::start(Stage { generated: vec![done(&["!"])], ..Stage::default() });
    let ended = mock.run_with_input(&["generate", "austen", "-q"], "Once upon\na time\n").await.succeeded();
    assert_eq!((ended.out.as_str(), ended.err.as_str()), ("!\n", ""), "text that only came with the end");
    assert_eq!(mock.stage().generate_asked[0].prompts, ["Once upon\na time"]);
}

#[tokio::test]
async fn answers_that_make_no_sense_are_errors() {
    for generated in [vec![token(3, "x")], vec![token(0, "x")], vec![]] {
        let mock = Mock::start(Stage { generated, ..Stage::default() });
        let ended = mock.run(&["generate", "austen", "-p", "x", "--output", "json"]).await;
        assert_eq!(ended.code, Some(1), "{ended:?}");
        assert_eq!(ended.error_json()["kind"], "internal");
    }
    let too_few = Mock::start(Stage { generated: vec![token(0, "a"), token(1, "b"), done(&[])], ..Stage::default() });
    let ended = too_few.run(&["generate", "austen", "-p", "x", "-p", "y", "--output", "json"]).await.succeeded();
    assert_eq!(ended.json()[0]["texts"], serde_json::json!(["a", "b"]), "the streamed parts stand in");
}
