//! Preparing data as a job does: files in, sequences out, and a clear message for everything that can be wrong.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use ramtorch_data::{DataError, DataErrorKind, DataKind, Dataset, OpenDataset, TargetLayout, TargetRow, TokenizerSource, prepare};
use ramtorch_job::DataSpec;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A folder with a model, data and a cache.
struct Node {
    dir: tempfile::TempDir,
    model: TokenizerSource,
}

impl Node {
    fn new(bos: bool) -> Node {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        let model = model_dir(&dir.path().join("model"), bos, Some(CHATML));
        Node { dir, model }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        write(self.path(), name, content).to_str().unwrap().to_string()
    }

    fn spec(&self, fields: Value) -> DataSpec {
        let mut all = json!({"sequence_length": 4, "format": "text"});
        all.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    fn prepare(&self, fields: Value) -> Result<Dataset, DataError> {
        prepare(&self.spec(fields), Some(&self.model), Some(VOCAB), &self.path().join("cache"), &|_, _, _| {})
    }

    fn open(&self, fields: Value) -> OpenDataset {
        self.prepare(fields).unwrap().open().unwrap()
    }

    fn error(&self, fields: Value) -> String {
        self.prepare(fields).unwrap_err().to_string()
    }

    fn caches(&self) -> usize {
        std::fs::read_dir(self.path().join("cache")).map_or(0, |d| d.count())
    }
}

/// All tokens of the training split but the last targets, and the weights of the targets.
fn all(data: &OpenDataset) -> (Vec<u32>, Vec<f32>) {
    let split = data.train().unwrap();
    let n = split.sequence_length();
    let (mut tokens, mut weights) = (Vec::new(), Vec::new());
    for i in 0..split.len() {
        let (mut x, mut y, mut w) = (vec![0; n], vec![0; n], vec![0.0; n]);
        split.sequence(i, &mut x, &mut y, &mut w, None).unwrap();
        if tokens.is_empty() {
            tokens.push(x[0]);
        }
        assert_eq!(x[0], *tokens.last().unwrap());
        tokens.extend(y);
        weights.extend(w);
    }
    (tokens, weights)
}

fn doc(text: &str) -> Vec<u32> {
    [&[BOS][..], &bytes(text), &[EOS]].concat()
}

#[test]
fn texts_are_joined_by_end_of_text() {
    let n = Node::new(true);
    let files = [n.file("b.txt", "second"), n.file("a.txt", "first é\n")];
    let (tokens, weights) = all(&n.open(json!({"train": files, "sequence_length": 1})));
    assert_eq!(tokens, [doc("second"), doc("first é\n")].concat());
    assert!(weights.iter().all(|w| *w == 1.0));
    // A glob takes the files by name.
    let glob = n.path().join("*.txt");
    let data = n.prepare(json!({"train": glob, "sequence_length": 1})).unwrap();
    assert_eq!(all(&data.open().unwrap()).0, [doc("first é\n"), doc("second")].concat());
    assert_eq!((data.kind, data.train.documents, data.has_mask), (DataKind::Cache, 2, false));
}

#[test]
fn long_texts_are_one_document() {
    let n = Node::new(true);
    // Three-byte characters, so that pieces are cut inside of them.
    let text = "鯨は大きい。\n".repeat(60_000);
    let file = n.file("long.txt", &text);
    let data = n.open(json!({"train": file, "sequence_length": 1000}));
    let expected = doc(&text);
    let (tokens, _) = all(&data);
    assert_eq!(tokens.len(), (expected.len() - 1) / 1000 * 1000 + 1);
    assert!(tokens == expected[..tokens.len()]);
}

#[test]
fn text_that_is_not_utf8_is_named_with_its_byte() {
    let n = Node::new(true);
    let long = "é".repeat(400_000);
    for (content, offset) in [
        (b"abc\xff".to_vec(), 3),
        (b"ab\xc3".to_vec(), 2),
        ([long.as_bytes(), b"\xc3"].concat(), 800_000),
        ([&long.as_bytes()[..600_000], b"\xa9", long.as_bytes()].concat(), 600_000),
        ([&long.as_bytes()[..262_144], b"\xff", long.as_bytes()].concat(), 262_144),
    ] {
        let e = n.error(json!({"train": n.file("bad.txt", content)}));
        assert!(e.contains("bad.txt: not UTF-8 at byte") && e.contains(&format!("byte {offset};")), "{e}");
    }
}

#[test]
fn lines_are_documents() {
    let n = Node::new(true);
    let file = n.file("d.jsonl", "\u{feff}{\"text\": \"a\\u00e9\", \"id\": 7}\r\n\n{\"text\": \"\"}\n  {\"text\":\"b\"}");
    let (tokens, _) = all(&n.open(json!({"format": "jsonl", "train": file, "sequence_length": 1})));
    assert_eq!(tokens, [doc("aé"), doc("b")].concat());
}

#[test]
fn broken_lines_are_named() {
    let n = Node::new(true);
    for (line, what) in [
        ("{\"text\": \"a\"", "d.jsonl:2: not valid JSON at column 12: EOF"),
        ("{\"text\": 5}", "d.jsonl:2: `text` is a number, not a string"),
        ("{\"txt\": \"a\"}", "d.jsonl:2: has neither `text` nor `messages`"),
        ("[1]", "d.jsonl:2: not a JSON object"),
        ("\"a\"", "d.jsonl:2: not a JSON object"),
        ("{\"text\": \"a\"} x", "d.jsonl:2: not valid JSON at column 15: trailing"),
        ("{\"messages\": []}", "d.jsonl:2: `messages` is empty"),
        ("{\"messages\": [{\"content\": \"a\"}]}", "d.jsonl:2: message 0 has no `role`"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": 5}]}", "d.jsonl:2: chat template: "),
    ] {
        let e = n.error(json!({"format": "jsonl", "train": n.file("d.jsonl", format!("{{\"text\": \"good\"}}\n{line}\n"))}));
        assert!(e.contains(what), "{e}");
    }
    let e = n.error(json!({"format": "jsonl", "train": n.file("d.jsonl", b"{\"text\": \"good\"}\n{\"text\": \"\xff\"}")}));
    assert!(e.contains("d.jsonl:2: not UTF-8 at byte 10 of the line"), "{e}");
}

#[test]
fn the_first_broken_line_is_reported_whatever_the_threads_do() {
    let n = Node::new(true);
    let mut lines = vec!["{\"text\": \"a\"}"; 5000];
    lines[1234] = "{";
    lines[1235] = "}";
    lines[4999] = "x";
    let e = n.error(json!({"format": "jsonl", "train": n.file("d.jsonl", lines.join("\n"))}));
    assert!(e.contains("d.jsonl:1235:"), "{e}");
}

#[test]
fn templates_may_refuse_a_role() {
    let n = Node::new(true);
    let template = format!(
        "{{% for m in messages %}}{{% if m.role not in ['user', 'assistant'] %}}{{{{ raise_exception('unknown role ' + m.role) }}}}{{% endif %}}{{% endfor %}}{CHATML}"
    );
    write(&n.path().join("model"), "chat_template.jinja", template);
    let file = n.file("d.jsonl", json!({"messages": [{"role": "narrator", "content": "x"}]}).to_string());
    let e = n.error(json!({"format": "jsonl", "train": file}));
    assert!(e.contains("d.jsonl:1: chat template: unknown role narrator"), "{e}");
}

fn conversation() -> Value {
    json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
}

/// Tokens of [`conversation`], and whether each counts as a target.
fn conversation_tokens() -> (Vec<u32>, Vec<f32>) {
    let user = [&[IM_START][..], &bytes("user\nHi"), &[IM_END, 10]].concat();
    let header = [&[IM_START][..], &bytes("assistant\n")].concat();
    let tokens = [&user[..], &header, &bytes("Yo"), &[IM_END, 10]].concat();
    let mut weights = vec![0.0; tokens.len()];
    weights[user.len() + header.len()..].fill(1.0);
    (tokens, weights)
}

#[test]
fn conversations_have_loss_on_the_assistant_alone() {
    let n = Node::new(true);
    let line = json!({"messages": conversation()}).to_string();
    let data = n.prepare(json!({"format": "jsonl", "train": n.file("d.jsonl", format!("{line}\n{line}")), "sequence_length": 1})).unwrap();
    let (tokens, weights) = conversation_tokens();
    // No begin- or end-of-text: the template brings all that the model wants to see.
    let (got, got_weights) = all(&data.open().unwrap());
    assert_eq!(got, [&tokens[..], &tokens].concat());
    assert_eq!(got_weights, [&weights[1..], &weights].concat());
    assert!(data.has_mask);
    assert_eq!((data.train.loss_tokens, data.train.documents), (8, 2));
}

#[test]
fn conversations_without_an_assistant_teach_nothing() {
    let n = Node::new(true);
    let line = json!({"messages": [{"role": "user", "content": "Hi"}]}).to_string();
    let e = n.error(json!({"format": "jsonl", "train": n.file("d.jsonl", line)}));
    assert!(e.contains("`data.train`") && e.contains("assistant"), "{e}");
}

#[test]
fn conversations_need_a_template() {
    let n = Node::new(true);
    std::fs::remove_file(n.path().join("model/chat_template.jinja")).unwrap();
    let model = TokenizerSource::find(&n.path().join("model")).unwrap();
    let file = n.file("d.jsonl", json!({"messages": conversation()}).to_string());
    let spec = n.spec(json!({"format": "jsonl", "train": file}));
    let e = prepare(&spec, Some(&model), None, n.path(), &|_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("d.jsonl:1:") && e.contains("chat_template.jinja"), "{e}");
}

fn parquet_file(schema: &str, write: impl FnOnce(&mut SerializedFileWriter<&mut Vec<u8>>)) -> Vec<u8> {
    let mut out = Vec::new();
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(&mut out, schema, Arc::new(WriterProperties::builder().build())).unwrap();
    write(&mut writer);
    writer.close().unwrap();
    out
}

fn texts(column: &str, groups: &[&[Option<&str>]]) -> Vec<u8> {
    parquet_file(&format!("message m {{ optional int64 id; optional byte_array {column} (UTF8); }}"), |w| {
        for rows in groups {
            let mut group = w.next_row_group().unwrap();
            let mut c = group.next_column().unwrap().unwrap();
            c.typed::<Int64Type>().write_batch(&vec![1; rows.len()], Some(&vec![1; rows.len()]), None).unwrap();
            c.close().unwrap();
            let mut c = group.next_column().unwrap().unwrap();
            let values: Vec<_> = rows.iter().flatten().map(|s| ByteArray::from(*s)).collect();
            let levels: Vec<i16> = rows.iter().map(|r| r.is_some().into()).collect();
            c.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            c.close().unwrap();
            group.close().unwrap();
        }
    })
}

#[test]
fn parquet_rows_are_documents() {
    let n = Node::new(true);
    let file = n.file("d.parquet", texts("text", &[&[Some("aé"), Some("")], &[Some("b")]]));
    let (tokens, _) = all(&n.open(json!({"format": "parquet", "train": file, "sequence_length": 1})));
    assert_eq!(tokens, [doc("aé"), doc("b")].concat());
    let file = n.file("e.parquet", texts("body", &[&[Some("c")]]));
    let (tokens, _) = all(&n.open(json!({"format": "parquet", "train": file, "column": "body", "sequence_length": 1})));
    assert_eq!(tokens, doc("c"));
}

#[test]
fn parquet_conversations() {
    let n = Node::new(true);
    let schema = "message m { optional group messages (LIST) { repeated group list { optional group element { optional byte_array content (UTF8); optional byte_array role (UTF8); } } } }";
    let bytes = parquet_file(schema, |w| {
        let mut group = w.next_row_group().unwrap();
        for values in [["Hi", "Yo"], ["user", "assistant"]] {
            let mut c = group.next_column().unwrap().unwrap();
            c.typed::<ByteArrayType>().write_batch(&values.map(ByteArray::from), Some(&[4, 4]), Some(&[0, 1])).unwrap();
            c.close().unwrap();
        }
        group.close().unwrap();
    });
    let data = n.open(json!({"format": "parquet", "train": n.file("d.parquet", bytes), "sequence_length": 1}));
    let (tokens, weights) = conversation_tokens();
    assert_eq!(all(&data), (tokens, weights[1..].to_vec()));
}

#[test]
fn wrong_parquet_files_are_named() {
    let n = Node::new(true);
    let error =
        |bytes: Vec<u8>, column: Option<&str>| n.error(json!({"format": "parquet", "train": n.file("d.parquet", bytes), "column": column}));
    let good = texts("text", &[&[Some("a"), Some("b")]]);
    assert!(error(good.clone(), Some("body")).contains("d.parquet: has no column `body`; its columns are: id, text"));
    assert!(error(good.clone(), Some("id")).contains("column `id` is INT64, neither text nor a list of messages"));
    assert!(error(texts("body", &[&[Some("a")]]), None).contains("name one in `data.column`"));
    assert!(error(texts("text", &[&[Some("a"), None]]), None).contains("d.parquet: row 1: column `text` is null"));
    assert!(error(b"PAR1 nonsense PAR1".to_vec(), None).contains("d.parquet: not a sound Parquet file"));
    assert!(error(good[..good.len() - 9].to_vec(), None).contains("not a sound Parquet file"));
    assert!(error(texts("text", &[&[]]), None).contains("0 tokens are too few"));
    // Damage anywhere in the data is an error or goes unnoticed, but never ends the process.
    for i in (4..good.len()).step_by(3) {
        let mut bad = good.clone();
        bad[i] ^= 0xff;
        let file = n.file("x.parquet", bad);
        let _ = n.prepare(json!({"format": "parquet", "train": file}));
    }
}

#[test]
fn ready_tokens_are_taken_as_they_are() {
    let n = Node::new(true);
    let files = [n.file("1.bin", token_bytes(0..6)), n.file("2.bin", token_bytes(6..13))];
    let spec = n.spec(json!({"format": "tokens", "train": files}));
    let data = prepare(&spec, None, Some(13), n.path(), &|_, _, _| {}).unwrap();
    assert_eq!((data.train_sequences, data.validation_sequences, data.kind, data.has_mask), (3, 0, DataKind::Tokens, false));
    let open = data.open().unwrap();
    let (mut x, mut y, mut w, mut s) = ([0; 4], [0; 4], [0.0; 4], [0; 4]);
    open.train().unwrap().sequence(1, &mut x, &mut y, &mut w, Some(&mut s)).unwrap();
    assert_eq!((x, y, w, s), ([4, 5, 6, 7], [5, 6, 7, 8], [1.0; 4], [0, 0, 2, 2]));
    assert_eq!(n.caches(), 0);
}

#[test]
fn wrong_token_files_are_named() {
    let n = Node::new(true);
    let mut ids: Vec<u32> = (0..50_000).map(|i| i % 200).collect();
    ids[40_000] = 261;
    ids[40_001] = 9999;
    let e = n.error(json!({"format": "tokens", "train": [n.file("ok.bin", token_bytes(0..9)), n.file("t.bin", token_bytes(ids))]}));
    assert!(e.contains("t.bin: token 40000 (byte 160000) is 261, but the model's vocabulary ends at 260"), "{e}");
    let e = n.error(json!({"format": "tokens", "train": n.file("t.bin", [0; 21])}));
    assert!(e.contains("t.bin: 21 bytes are not a whole number of tokens"), "{e}");
    let e = n.error(json!({"format": "tokens", "train": n.file("t.bin", token_bytes(0..4))}));
    assert!(e.contains("training data: 4 tokens are too few for one sequence of 4 (it needs 5)"), "{e}");
    let e =
        n.error(json!({"format": "tokens", "train": n.file("t.bin", token_bytes(0..5)), "validation": n.file("v.bin", token_bytes(0..2))}));
    assert!(e.contains("validation data: 2 tokens are too few"), "{e}");
}

#[test]
fn files_that_are_not_there_are_named() {
    let n = Node::new(true);
    let e = n.prepare(json!({"train": "/nowhere/a.txt"})).unwrap_err();
    assert_eq!(e.kind(), DataErrorKind::Input);
    assert_eq!(e.to_string(), "`data.train`: /nowhere/a.txt: there is no such file");
    assert!(n.error(json!({"train": "/nowhere/*.txt"})).contains("no file matches this pattern"));
    assert!(n.error(json!({"train": "/nowhere/***"})).contains("not a valid glob"));
    assert!(n.error(json!({"train": n.path()})).contains("this is a folder"));
    assert!(n.error(json!({"train": n.file("e.txt", "")})).contains("e.txt: the file is empty"));
    let e = n.error(json!({"train": n.file("a.txt", "abcdefgh"), "validation": "/nowhere/v"}));
    assert!(e.contains("`data.validation`"), "{e}");
    // A name with wildcards in it is a file first.
    n.open(json!({"train": n.file("[x]*.txt", "abcdefgh")}));
}

#[test]
fn validation_comes_from_the_end_or_from_files_of_its_own() {
    let n = Node::new(true);
    let file = n.file("t.bin", token_bytes(0..101));
    for (fraction, expected) in [(0.0, (25, 0)), (0.2, (20, 5)), (0.001, (24, 1)), (0.999, (1, 24))] {
        let data = n.prepare(json!({"format": "tokens", "train": file, "validation_fraction": fraction})).unwrap();
        assert_eq!((data.train_sequences, data.validation_sequences), expected);
        let open = data.open().unwrap();
        assert_eq!((open.train().unwrap().len(), open.validation().unwrap().len()), expected);
        if expected.1 > 0 {
            let (mut x, mut y, mut w) = ([0; 4], [0; 4], [0.0; 4]);
            open.validation().unwrap().sequence(0, &mut x, &mut y, &mut w, None).unwrap();
            assert_eq!(x[0] as u64, expected.0 * 4);
        }
    }
    let own = n.file("v.bin", token_bytes(100..120));
    let data = n.prepare(json!({"format": "tokens", "train": file, "validation": own, "validation_fraction": 0.5})).unwrap();
    assert_eq!((data.train_sequences, data.validation_sequences), (25, 4));
    let one = n.file("o.bin", token_bytes(0..5));
    assert!(n.error(json!({"format": "tokens", "train": one, "validation_fraction": 0.5})).contains("only 1 sequence"));
}

#[test]
fn documents_can_be_kept_apart() {
    let n = Node::new(false);
    let file = n.file("d.jsonl", "{\"text\": \"ab\"}\n{\"text\": \"cdefg\"}");
    let starts = |fields: Value| {
        let data = n.open(fields);
        let (mut x, mut y, mut w, mut s) = ([0; 7], [0; 7], [0.0; 7], [0; 7]);
        data.train().unwrap().sequence(0, &mut x, &mut y, &mut w, Some(&mut s)).unwrap();
        (s, w)
    };
    let text = json!({"format": "jsonl", "train": file, "sequence_length": 7, "document_mask": true});
    assert_eq!(starts(text), ([0, 0, 0, 3, 3, 3, 3], [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]));
    // The same in ready tokens, where the tokenizer's end-of-text token is the boundary.
    let ids = [&bytes("ab")[..], &[EOS], &bytes("cdefg")].concat();
    let ready = json!({"format": "tokens", "train": n.file("t.bin", token_bytes(ids)), "sequence_length": 7, "document_mask": true});
    assert_eq!(starts(ready.clone()), ([0, 0, 0, 3, 3, 3, 3], [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]));
    let e = prepare(&n.spec(ready), None, None, n.path(), &|_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("`data.document_mask`"), "{e}");
}

#[test]
fn tensors_of_several_files() {
    let n = Node::new(true);
    let f32s = |v: &[f32]| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let file = |name: &str, width: usize, class: i64| {
        let (x, y) = (f32s(&vec![class as f32; 3 * width]), [class; 3].iter().flat_map(|c| c.to_le_bytes()).collect::<Vec<_>>());
        let view = |d, shape: Vec<usize>, data| safetensors::tensor::TensorView::new(d, shape, data).unwrap();
        let tensors =
            [("inputs", view(safetensors::Dtype::F32, vec![3, width], &x)), ("targets", view(safetensors::Dtype::I64, vec![3], &y))];
        n.file(name, safetensors::serialize(tensors, None).unwrap())
    };
    let files = [file("a", 2, 0), file("b", 2, 9)];
    let spec = n.spec(json!({"format": "tensors", "train": files, "validation_fraction": 0.34}));
    let data = prepare(&spec, None, Some(10), n.path(), &|_, _, _| {}).unwrap();
    assert_eq!((data.train_sequences, data.validation_sequences, data.sequence_length), (4, 2, 1));
    let json = serde_json::to_string(&data).unwrap();
    let open = serde_json::from_str::<Dataset>(&json).unwrap().open().unwrap();
    let (train, validation) = (open.train_tensors().unwrap(), open.validation_tensors().unwrap());
    assert_eq!((train.rows(), validation.rows(), train.input_width(), train.target()), (4, 2, 2, TargetLayout::Classes));
    let (mut x, mut class) = ([0.0; 2], 0);
    validation.row(1, &mut x, TargetRow::Class(&mut class));
    assert_eq!((x, class), ([9.0; 2], 9));
    let e = prepare(&spec, None, Some(9), n.path(), &|_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("/b: row 0: class 9"), "{e}");
    let spec = n.spec(json!({"format": "tensors", "train": [file("a", 2, 0), file("c", 3, 0)]}));
    let e = prepare(&spec, None, None, n.path(), &|_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("/c: its tensors are inputs [N, 3]"), "{e}");
}

#[test]
fn a_cache_is_found_by_content() {
    let n = Node::new(true);
    let fields = |name: &str, length: usize| json!({"train": n.path().join(name), "sequence_length": length});
    n.file("a.txt", "some text to learn");
    let first = n.prepare(fields("a.txt", 4)).unwrap();
    // Another sequence length, another name, another time: the same tokens.
    n.file("b.txt", "some text to learn");
    assert_eq!(n.prepare(fields("b.txt", 5)).unwrap().train, first.train);
    assert_eq!(n.caches(), 1);
    // The same name and length with other content is something else, even with the old time on it.
    let time = n.path().join("a.txt").metadata().unwrap().modified().unwrap();
    n.file("a.txt", "some text to LEARN");
    std::fs::File::options().write(true).open(n.path().join("a.txt")).unwrap().set_modified(time).unwrap();
    let second = n.prepare(fields("a.txt", 4)).unwrap();
    assert_ne!(second.train.files, first.train.files);
    assert_eq!(all(&second.open().unwrap()).0[14..17], bytes("LEA"));
    // So is another tokenizer or template.
    let model = n.path().join("model");
    for name in ["chat_template.jinja", "tokenizer.json"] {
        let mut text = std::fs::read_to_string(model.join(name)).unwrap();
        text.push('\n');
        write(&model, name, text);
        n.prepare(fields("a.txt", 4)).unwrap();
    }
    assert_eq!(n.caches(), 4);
}

#[test]
fn damaged_caches_are_made_again() {
    let n = Node::new(true);
    let fields = json!({"train": n.file("a.txt", "some text to learn")});
    let data = n.prepare(fields.clone()).unwrap();
    let path = &data.train.files[0].path;
    let good = std::fs::read(path).unwrap();
    for damage in [good[..good.len() - 1].to_vec(), vec![7; good.len()], Vec::new()] {
        std::fs::write(path, damage).unwrap();
        let again = n.prepare(fields.clone()).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), good);
        again.open().unwrap();
    }
}

#[test]
fn data_that_changed_after_preparing_is_not_opened() {
    let n = Node::new(true);
    let path = n.file("t.bin", token_bytes(0..20));
    let data = n.prepare(json!({"format": "tokens", "train": path})).unwrap();
    // Written again with the same content: fine.
    n.file("t.bin", token_bytes(0..20));
    data.open().unwrap();
    n.file("t.bin", token_bytes(1..21));
    assert!(data.open().unwrap_err().to_string().contains("its content is different"));
    n.file("t.bin", token_bytes(0..19));
    assert!(data.open().unwrap_err().to_string().contains("76 bytes long instead of 80"));
    std::fs::remove_file(&path).unwrap();
    assert!(data.open().unwrap_err().to_string().contains("cannot read"));
}

#[test]
fn two_processes_prepare_the_same_data_at_once() {
    let n = Node::new(true);
    let fields = json!({"train": n.file("a.txt", "some text to learn ".repeat(20_000))});
    let data: Vec<_> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..4).map(|_| s.spawn(|| n.prepare(fields.clone()).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    for d in &data {
        assert_eq!(d.train.files[0].blake3, data[0].train.files[0].blake3);
        d.open().unwrap();
    }
    assert_eq!(n.caches(), 1);
}

#[test]
fn tokenizers_of_other_models_are_refused() {
    let n = Node::new(true);
    let spec = n.spec(json!({"train": n.file("a.txt", "plain text")}));
    let with = |vocab| prepare(&spec, Some(&n.model), Some(vocab), &n.path().join("cache"), &|_, _, _| {});
    assert!(with(200).unwrap_err().to_string().contains("makes token id 255, but the model's vocabulary ends at 199"));
    // Added tokens may be missing in the model as long as no document has them; here each has <bos> and <eos>.
    let e = with(257).unwrap_err().to_string();
    assert!(e.contains("tokenizer.json") && e.contains("token id 257"), "{e}");
    with(258).unwrap();
    // With the cache there is nothing to tokenise, but the ids are still too large.
    assert!(with(257).unwrap_err().to_string().contains("token id 257"));
    let e = prepare(&spec, None, None, n.path(), &|_, _, _| {}).unwrap_err().to_string();
    assert!(e.contains("needs a tokenizer") && e.contains("tokenizer.json"), "{e}");
}

#[test]
fn progress_reaches_the_end_and_never_passes_it() {
    let n = Node::new(true);
    let (last, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let spec = n.spec(json!({"train": [n.file("a.txt", "x".repeat(1_000_000)), n.file("b.txt", "y")]}));
    prepare(&spec, Some(&n.model), None, &n.path().join("cache"), &|what, done, of| {
        assert!(done <= of, "{what} {done} of {of}");
        if what == "tokenising" {
            last.store(done, Ordering::Relaxed);
            total.store(of, Ordering::Relaxed);
        }
    })
    .unwrap();
    assert_eq!((last.into_inner(), total.into_inner()), (1_000_001, 1_000_001));
}
