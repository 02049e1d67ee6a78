//! Bad input: each kind gets one clear message that says what is wrong and where, a documented exit code, and leaves
//! nothing behind (which [`Sandbox`] checks after every run).
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{Binary, Finished, Fixture, JobFile, Sandbox, Tensor, exit, fixture_path, read_tensors, write_tensors};
use std::collections::BTreeMap;
use std::path::Path;

fn llama() -> JobFile {
    Fixture::load("llama").job("bad").set("train.steps", 3).set("schedule.warmup_steps", 0).set("output.path", "model")
}

fn stack() -> JobFile {
    Fixture::load("stack-relu-mse").job("bad").set("train.steps", 3).set("schedule.warmup_steps", 0)
}

/// Runs a job that must be refused; the output folder must not have come into being.
#[track_caller]
fn refused(sandbox: &Sandbox, job: &JobFile, code: i32, words: &[&str]) -> Finished {
    let finished = sandbox.run_job("bad", job, "cpu:2").expect_refusal(code, words);
    assert!(!sandbox.path("model").exists(), "a model folder was written");
    finished
}

/// A case: what to do to a copy of the llama fixture's folder (named `m`), and what the message must say.
fn refused_model(damage: impl FnOnce(&Path), words: &[&str]) {
    let sandbox = Sandbox::new();
    let folder = sandbox.copy_model("llama", "m");
    damage(&folder);
    refused(&sandbox, &llama().set("model.path", folder), exit::INPUT, words);
}

fn edit_config(folder: &Path, from: &str, to: &str) {
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

fn edit_tensors(folder: &Path, edit: impl FnOnce(&mut BTreeMap<String, Tensor>)) {
    let path = folder.join("model.safetensors");
    let mut tensors = read_tensors(&path);
    edit(&mut tensors);
    write_tensors(&path, &tensors);
}

fn edit_bytes(path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    edit(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_model_folder_that_is_not_there_or_not_whole() {
    let sandbox = Sandbox::new();
    refused(&sandbox, &llama().set("model.path", "no/such/model"), exit::INPUT, &["no/such/model"]);
    refused_model(|m| std::fs::remove_file(m.join("config.json")).unwrap(), &["config.json"]);
    refused_model(|m| std::fs::remove_file(m.join("model.safetensors")).unwrap(), &["safetensors"]);
    let sandbox = Sandbox::new();
    let folder = sandbox.copy_model("qwen2", "m");
    std::fs::remove_file(folder.join("model-00002-of-00005.safetensors")).unwrap();
    refused(&sandbox, &llama().set("model.path", folder), exit::INPUT, &["model-00002-of-00005.safetensors"]);
}

#[test]
fn a_configuration_that_cannot_be_used() {
    refused_model(|m| std::fs::write(m.join("config.json"), "{\"model_type\": ").unwrap(), &["config.json"]);
    refused_model(|m| edit_config(m, "\"llama\"", "\"mamba\""), &["config.json", "mamba"]);
    refused_model(|m| edit_config(m, "\"hidden_size\": 48", "\"hidden_size\": \"wide\""), &["config.json", "hidden_size"]);
    refused_model(|m| edit_config(m, "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3"), &["num_key_value_heads"]);
    refused_model(|m| edit_config(m, "\"hidden_size\": 48", "\"hidden_size\": 0"), &["hidden_size"]);
    refused_model(|m| edit_config(m, "\"hidden_size\": 48", "\"hidden_size\": 18446744073709551615"), &["hidden_size"]);
    refused_model(|m| edit_config(m, "\"silu\"", "\"mish\""), &["hidden_act", "mish"]);
    refused_model(|m| edit_config(m, "\"rope_type\": \"default\"", "\"rope_type\": \"spiral\""), &["spiral"]);
}

#[test]
fn damaged_weights() {
    let file = |m: &Path| m.join("model.safetensors");
    refused_model(|m| edit_bytes(&file(m), |b| b.truncate(b.len() - 100)), &["model.safetensors"]);
    refused_model(|m| edit_bytes(&file(m), |b| b.truncate(5)), &["model.safetensors"]);
    refused_model(|m| edit_bytes(&file(m), Vec::clear), &["model.safetensors"]);
    // The length of the header, as large as can be; then a header that is not JSON.
    refused_model(|m| edit_bytes(&file(m), |b| b[..8].fill(0xff)), &["model.safetensors"]);
    refused_model(|m| edit_bytes(&file(m), |b| b[8..40].fill(b'x')), &["model.safetensors"]);
    refused_model(|m| std::fs::write(file(m), "version https://git-lfs.github.com/spec/v1\n").unwrap(), &["model.safetensors"]);
}

#[test]
fn tensors_that_do_not_fit_the_configuration() {
    const NAME: &str = "model.layers.1.mlp.up_proj.weight";
    refused_model(|m| edit_tensors(m, |t| drop(t.remove(NAME).unwrap())), &[NAME, "missing"]);
    refused_model(
        |m| edit_tensors(m, |t| drop(t.insert("model.layers.2.odd".into(), Tensor::f32(&[2], &[0.0; 2])))),
        &["model.layers.2.odd"],
    );
    let shape = |m: &Path| edit_tensors(m, |t| drop(t.insert(NAME.into(), Tensor::f32(&[92, 48], &[0.0; 92 * 48]))));
    refused_model(shape, &[NAME, "92", "93"]);
    let integers = |m: &Path| edit_tensors(m, |t| drop(t.insert(NAME.into(), Tensor::i64(&[93, 48], &[0; 93 * 48]))));
    refused_model(integers, &[NAME, "type"]);
    // The whole model against another configuration.
    refused_model(|m| edit_config(m, "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3"), &["model.layers.2."]);
}

#[test]
fn tokenizers() {
    let text = |s: &Sandbox| {
        s.file("text.txt", "w1 w2 w3 ".repeat(400));
        llama().set("data.format", "text").set("data.train", "text.txt").set("model.path", "m")
    };
    let case = |damage: &dyn Fn(&Path), words: &[&str]| {
        let sandbox = Sandbox::new();
        damage(&sandbox.copy_model("llama", "m"));
        refused(&sandbox, &text(&sandbox), exit::INPUT, words);
    };
    case(&|m| std::fs::remove_file(m.join("tokenizer.json")).unwrap(), &["tokenizer.json"]);
    case(&|m| std::fs::write(m.join("tokenizer.json"), "{}").unwrap(), &["tokenizer.json"]);
    case(&|m| edit_bytes(&m.join("tokenizer.json"), |b| b.truncate(b.len() / 2)), &["tokenizer.json"]);
    // One that belongs to a model with a larger vocabulary.
    let larger = |m: &Path| {
        let path = m.join("tokenizer.json");
        let json = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, json.replace("\"w3\":3,", "\"w3\":50000,")).unwrap();
    };
    case(&larger, &["tokenizer.json", "50000", "vocabulary"]);
}

#[test]
fn token_files() {
    let sandbox = Sandbox::new();
    let case = |bytes: Vec<u8>, words: &[&str]| {
        sandbox.file("t.bin", bytes);
        refused(&sandbox, &llama().set("data.train", "t.bin"), exit::INPUT, words);
    };
    let tokens = std::fs::read(fixture_path("tokens.bin")).unwrap();
    case(vec![], &["t.bin", "empty"]);
    case(tokens[..1001].to_vec(), &["t.bin", "4"]);
    case(tokens[..17 * 4].to_vec(), &["17", "sequence"]);
    let mut outside = tokens.clone();
    outside[300 * 4..301 * 4].copy_from_slice(&199u32.to_le_bytes());
    case(outside, &["t.bin", "300", "199"]);
    refused(&sandbox, &llama().set("data.train", "nothing.bin"), exit::INPUT, &["nothing.bin"]);
    refused(&sandbox, &llama().set("data.train", "nothing-*.bin"), exit::INPUT, &["nothing-*.bin"]);
    refused(&sandbox, &llama().set("data.train", sandbox.root()), exit::INPUT, &[]);
    refused(&sandbox, &llama().set("data.validation", "absent.bin"), exit::INPUT, &["absent.bin"]);
}

#[test]
fn text_files() {
    let sandbox = Sandbox::new();
    let case = |format: &str, bytes: &[u8], words: &[&str]| {
        sandbox.file("data", bytes);
        refused(&sandbox, &llama().set("data.format", format).set("data.train", "data"), exit::INPUT, words);
    };
    case("text", b"", &["data", "empty"]);
    case("text", b"w1 w2 \xff\xfe w3", &["data", "UTF-8", "6"]);
    case("text", b"w1 w2 w3", &["17", "sequence"]);
    case("jsonl", b"{\"text\": \"w1 w2\"}\n{\"text\": \n", &["data", "2"]);
    case("jsonl", b"{\"text\": \"w1 w2\"}\n{\"body\": \"w3\"}\n", &["data", "2", "text"]);
    case("jsonl", b"{\"text\": 5}\n", &["data", "1", "text"]);
    case("jsonl", b"[1, 2]\n", &["data", "1"]);
    // Messages for a model without a chat template.
    case(
        "jsonl",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"w1\"}, {\"role\": \"assistant\", \"content\": \"w2\"}]}\n",
        &["chat template"],
    );
    case("parquet", b"PAR1 this is not a parquet file PAR1", &["data"]);
    case("parquet", b"", &["data"]);
}

#[test]
fn tensor_files() {
    let sandbox = Sandbox::new();
    let good = read_tensors(&fixture_path("stack/mse.safetensors"));
    let case = |edit: &dyn Fn(&mut BTreeMap<String, Tensor>), words: &[&str]| {
        let mut tensors = good.clone();
        edit(&mut tensors);
        write_tensors(&sandbox.path("d.safetensors"), &tensors);
        refused(&sandbox, &stack().set("data.train", "d.safetensors"), exit::INPUT, words);
    };
    case(&|t| drop(t.remove("inputs")), &["d.safetensors", "inputs"]);
    case(&|t| drop(t.remove("targets")), &["d.safetensors", "targets"]);
    case(&|t| drop(t.insert("inputs".into(), Tensor::f32(&[120, 11], &[0.5; 1320]))), &["inputs", "11", "10"]);
    case(&|t| drop(t.insert("targets".into(), Tensor::f32(&[119, 5], &[0.5; 595]))), &["119", "120"]);
    case(&|t| drop(t.insert("targets".into(), Tensor::i64(&[120], &[1; 120]))), &["targets"]);
    let classes = |last: i64| {
        let mut tensors = good.clone();
        let mut values = [4i64; 120];
        values[77] = last;
        tensors.insert("targets".into(), Tensor::i64(&[120], &values));
        write_tensors(&sandbox.path("c.safetensors"), &tensors);
        stack().set("model.loss", "cross-entropy").set("data.train", "c.safetensors")
    };
    refused(&sandbox, &classes(5), exit::INPUT, &["c.safetensors", "77", "5"]);
    refused(&sandbox, &classes(-1), exit::INPUT, &["c.safetensors", "77", "-1"]);
    let mut weights = read_tensors(&fixture_path("stack/weights.safetensors"));
    weights.remove("2.bias");
    write_tensors(&sandbox.path("w.safetensors"), &weights);
    refused(&sandbox, &stack().set("model.weights", "w.safetensors"), exit::INPUT, &["w.safetensors", "2.bias"]);
}

#[test]
fn job_files() {
    let sandbox = Sandbox::new();
    for (job, words) in [
        (llama().set("train.stepz", 3), vec!["stepz", "line"]),
        (llama().set("optimiser.lr", 3), vec!["optimiser", "line"]),
        (llama().set("train.steps", "many"), vec!["steps", "line"]),
        (llama().set("train.steps", 0), vec!["train.steps", "line"]),
        (llama().unset("train.steps"), vec!["steps", "epochs"]),
        (llama().set("train.epochs", 1.0), vec!["steps", "epochs"]),
        (llama().unset("train.batch_size"), vec!["batch_size"]),
        (llama().set("train.micro_batch_size", 13), vec!["train.micro_batch_size", "12"]),
        (llama().unset("model.path"), vec!["model"]),
        (llama().set("model.config", "c.json"), vec!["path", "config"]),
        (llama().set("data.format", "csv"), vec!["csv", "tokens"]),
        (llama().set("data.format", "tensors"), vec!["data.format"]),
        (llama().set("data.validation_fraction", 1.5), vec!["data.validation_fraction", "1.5"]),
        (llama().set("optimizer.lr", -1.0), vec!["optimizer.lr", "-1"]),
        (llama().set("optimizer.betas", [0.9, 1.0]), vec!["optimizer.betas"]),
        (llama().set("schedule.kind", "exponential"), vec!["exponential", "cosine"]),
        (llama().set("schedule.warmup_steps", 4), vec!["schedule.warmup_steps", "3"]),
        (llama().set("checkpoint.every_steps", 2), vec!["checkpoint.path"]),
        (llama().set("train.precision", "fp8"), vec!["fp8", "bf16"]),
        (llama().set("name", "a/b"), vec!["name", "a/b"]),
        (stack().set("data.format", "tokens"), vec!["data.format"]),
        (llama().set("schedule.warmup_steps", -1), vec!["warmup_steps", "line"]),
    ] {
        refused(&sandbox, &job, exit::JOB_FILE, &words);
    }
    let run = |path: &Path| sandbox.run(Binary::Daemon, ["run".as_ref(), path.as_os_str(), "--devices".as_ref(), "cpu".as_ref()]);
    let broken = sandbox.file("broken.toml", "name = \"a\n[model\n");
    run(&broken).expect_refusal(exit::JOB_FILE, &["broken.toml", "line "]);
    let binary = sandbox.file("binary.toml", [0xff, 0xfe, 0x00]);
    run(&binary).expect_refusal(exit::JOB_FILE, &["binary.toml", "UTF-8"]);
    run(&sandbox.file("empty.toml", "")).expect_refusal(exit::JOB_FILE, &["name"]);
    run(&sandbox.path("absent.toml")).expect_refusal(exit::JOB_FILE, &["absent.toml"]);
    run(sandbox.root()).expect_refusal(exit::JOB_FILE, &[]);
}

/// A sequence that is longer than the model's position table.
#[test]
fn sequences_longer_than_the_model_allows() {
    let sandbox = Sandbox::new();
    let job = llama().set("model.path", Fixture::model_path("gpt2")).set("data.sequence_length", 65);
    let finished = sandbox.run_job("bad", &job, "cpu:1");
    assert!([exit::JOB_FILE, exit::INPUT].contains(&finished.code), "{}: {}", finished.code, finished.text());
    assert!(finished.text().contains("65") && finished.text().contains("64"), "{}", finished.text());
}

#[test]
fn a_model_that_does_not_fit() {
    let sandbox = Sandbox::new();
    let job = llama().set("device.memory_bytes", 50_000);
    refused(&sandbox, &job, exit::RESOURCES, &["50000", "byte"]);
    // More devices than there are.
    refused(&sandbox, &llama().set("device.ranks", 5), exit::RESOURCES, &["5", "2"]);
    // A model of some tens of TiB: no node has that RAM. Refused before anything is reserved, so at once.
    let config = std::fs::read_to_string(Fixture::model_path("llama").join("config.json")).unwrap();
    let huge = config
        .replace("\"hidden_size\": 48", "\"hidden_size\": 65536")
        .replace("\"intermediate_size\": 93", "\"intermediate_size\": 262144")
        .replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 200");
    sandbox.file("huge/config.json", huge);
    let job = llama().unset("model.path").set("model.config", "huge/config.json");
    let finished = refused(&sandbox, &job, exit::RESOURCES, &[]);
    assert!(finished.elapsed < std::time::Duration::from_secs(30), "{:?}", finished.elapsed);
}

#[test]
fn outputs_that_cannot_be_written() {
    // Found out before the first step, not after the last.
    let case = |prepare: &dyn Fn(&Sandbox), job: JobFile, words: &[&str]| {
        let sandbox = Sandbox::new();
        prepare(&sandbox);
        refused(&sandbox, &job, exit::OUTPUT, words);
        let metrics = std::fs::read_to_string(sandbox.path("metrics.jsonl")).unwrap_or_default();
        assert_eq!(metrics, "", "steps were trained for an output that cannot be written: {words:?}");
        sandbox
    };
    let in_the_way = |s: &Sandbox| drop(s.file("file", "in the way"));
    case(&in_the_way, llama().set("output.path", "file/model"), &["file/model"]);
    case(&in_the_way, llama().set("output.metrics", "file/metrics.jsonl"), &["file/metrics.jsonl"]);
    // A folder with somebody's files in it is not replaced.
    let somebodys = case(&|s| drop(s.file("mine/precious.txt", "keep")), llama().set("output.path", "mine"), &["mine"]);
    assert_eq!(std::fs::read(somebodys.path("mine/precious.txt")).unwrap(), b"keep");
    let checkpoints = llama().set("checkpoint.path", "file/checkpoints").set("checkpoint.every_steps", 1);
    case(&in_the_way, checkpoints, &["file/checkpoints"]);
    // A disk that is full ends nothing: every write there says "no space left on device", and so does the job.
    let said = Sandbox::new().run_job("full", &llama().set("output.metrics", "/dev/full"), "cpu:2").expect_success().text();
    assert!(said.contains("metrics file /dev/full: cannot write it: No space left") && said.contains("Training goes on"), "{said}");
    assert!(said.contains("metrics file /dev/full has no step after 0"), "{said}");
}

/// A real file system that runs full, where this user may mount one in a namespace of its own.
#[test]
fn a_full_disk() {
    let sandbox = Sandbox::new();
    let path = sandbox.path("small");
    std::fs::create_dir(&path).unwrap();
    let mount = "mount -t tmpfs -o size=128k none small";
    if !sandbox.can_mount(mount) {
        return;
    }
    let run = |job: JobFile| {
        let file = sandbox.write_job("full", &job);
        let daemon = ramtorch_tests::binary(Binary::Daemon);
        let command = sandbox.namespace(&format!("{mount}; {} run {} --devices cpu:2", daemon.display(), file.display()));
        let finished = sandbox.start(command).wait(std::time::Duration::from_secs(120));
        sandbox.assert_clean();
        finished
    };
    run(llama().set("output.path", "small/model")).expect_refusal(exit::OUTPUT, &["small/model", "free"]);
    // A checkpoint on the way that cannot be written ends nothing, but it is told; one that was asked for as a result does.
    let on_the_way = run(llama().set("checkpoint.path", "small/c").set("checkpoint.every_steps", 1)).expect_success();
    assert!(on_the_way.text().contains("small/c") && on_the_way.text().contains("free"), "{}", on_the_way.text());
    assert!(sandbox.path("model/config.json").is_file());
    let at_end = llama().set("checkpoint.path", "small/c").set("checkpoint.at_end", true).unset("output.path");
    run(at_end).expect_code(exit::OUTPUT);
}

/// Two jobs that together need more memory than there is: the second waits or is refused, and never breaks the first.
#[test]
fn two_jobs_at_once_beyond_the_memory() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &["--device-memory", "64MiB"]);
    let long = llama().set("train.steps", 5_000).set("output.metrics", "first.jsonl").set("output.path", "first");
    let first = daemon.submit("first", &long);
    daemon.wait_for(&first, "its first step", |j| j["step"].as_u64() > Some(0));
    // The devices are taken: this one waits, and says for what.
    let second = daemon.submit("second", &llama().set("output.metrics", "second.jsonl"));
    let waiting = daemon.job(&second);
    assert_eq!(waiting["state"], "queued", "{waiting:#}");
    assert!(!waiting["message"].as_str().unwrap().is_empty(), "{waiting:#}");
    // This one can never run here.
    let third = llama().set("device.ranks", 2).set("output.metrics", "third.jsonl").set("output.path", "third");
    let path = sandbox.write_job("third", &third);
    daemon.client(["submit".as_ref(), path.as_os_str()]).expect_refusal(exit::RESOURCES, &["2"]);
    daemon.client(["cancel", &first]).expect_success();
    daemon.wait_for_state(&first, "cancelled");
    daemon.wait_for_state(&second, "succeeded");
    daemon.stop();
}

#[test]
fn a_second_daemon() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let limit = std::time::Duration::from_secs(30);
    // The same socket and state folder, the same socket alone, the same state folder alone.
    daemon.spawn("cpu:1", &[]).wait(limit).expect_refusal(exit::ALREADY_RUNNING, &["stop it"]);
    let mut other_state = sandbox.command(Binary::Daemon);
    other_state.args(["start", "--devices", "cpu:1", "--socket"]).arg(daemon.socket()).arg("--state-dir").arg(sandbox.path("other"));
    sandbox.start(other_state).wait(limit).expect_refusal(exit::ALREADY_RUNNING, &["test.sock"]);
    let mut other_socket = sandbox.command(Binary::Daemon);
    other_socket.args(["start", "--devices", "cpu:1", "--socket"]).arg(sandbox.path("run/other.sock"));
    other_socket.arg("--state-dir").arg(daemon.state_dir());
    sandbox.start(other_socket).wait(limit).expect_refusal(exit::ALREADY_RUNNING, &["state"]);
    // The first is none the worse for it.
    daemon.ask(["node"]);
    daemon.stop();
}

#[test]
fn a_socket_path_that_is_taken() {
    let sandbox = Sandbox::new();
    let start = |socket: &Path| {
        let mut command = sandbox.command(Binary::Daemon);
        command.args(["start", "--devices", "cpu:1", "--socket"]).arg(socket).arg("--state-dir").arg(sandbox.path("state"));
        sandbox.start(command).wait(std::time::Duration::from_secs(30))
    };
    let taken = sandbox.path("run/taken.sock");
    let listener = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    start(&taken).expect_refusal(exit::ALREADY_RUNNING, &["taken.sock"]);
    drop(listener);
    std::fs::remove_file(&taken).unwrap();
    let file = sandbox.file("run/file.sock", "not a socket");
    let finished = start(&file);
    assert_ne!(finished.code, exit::OK);
    assert!(finished.stderr.contains("file.sock"), "{}", finished.stderr);
    assert_eq!(std::fs::read(&file).unwrap(), b"not a socket", "what is not ours is left alone");
}

/// The socket of a daemon that was killed is no obstacle to the next one.
#[test]
fn a_stale_socket_is_replaced() {
    let sandbox = Sandbox::new();
    let stale = sandbox.path("run/test.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    sandbox.start_daemon("cpu:1", &[]).stop();
}

#[test]
fn no_daemon() {
    let sandbox = Sandbox::new();
    let mut command = sandbox.command(Binary::Client);
    command.env("RAMTORCH_SOCKET", sandbox.path("run/nobody.sock")).arg("list");
    let finished = sandbox.start(command).wait(std::time::Duration::from_secs(30));
    finished.expect_refusal(exit::UNREACHABLE, &["nobody.sock", "ramtorchd start"]);
}
