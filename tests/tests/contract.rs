//! What other programs rely on: the metrics file, exit codes, the model folder, where paths start.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{
    Binary, Fixture, JobFile, MetricsLine, Sandbox, assert_same_tensors, bits, exit, fixture_path, read_metrics, read_tensors,
    relative_difference,
};
use serde_json::Value;
use std::path::Path;

fn llama(steps: usize) -> JobFile {
    Fixture::load("llama").job("contract").set("train.steps", steps).set("schedule.warmup_steps", 0)
}

#[test]
fn every_line_of_the_metrics_file_has_its_keys() {
    let sandbox = Sandbox::new();
    sandbox.run_job("job", &llama(4), "cpu:2").expect_success();
    let text = std::fs::read_to_string(sandbox.path("metrics.jsonl")).unwrap();
    let keys = [
        "step",
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "tokens_total",
        "epoch",
        "tflops",
        "bytes_to_device",
        "bytes_from_device",
        "copy_wait_seconds",
        "optimizer_wait_seconds",
        "checkpoint_wait_seconds",
        "optimizer_seconds",
        "optimizer_pages_cpu",
        "optimizer_pages_device",
    ];
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        for key in keys {
            assert!(value[key].is_number(), "{key} in {line}");
        }
        assert!(value["tokens_per_second"].as_f64() > Some(0.0) && value["bytes_to_device"].as_u64() > Some(0), "{line}");
    }
    let lines = read_metrics(&sandbox.path("metrics.jsonl"));
    assert_eq!(lines.iter().map(|l| l.step).collect::<Vec<_>>(), [1, 2, 3, 4]);
    assert_eq!(lines.iter().map(|l| l.tokens_total).collect::<Vec<_>>(), [204, 408, 612, 816]);
}

/// Numbers have enough digits to be the number that was computed: reading and writing them again changes nothing.
#[test]
fn numbers_are_written_at_full_precision() {
    let sandbox = Sandbox::new();
    sandbox.run_job("job", &llama(3), "cpu:1").expect_success();
    let text = std::fs::read_to_string(sandbox.path("metrics.jsonl")).unwrap();
    let digits = |text: &str, key: &str| -> usize {
        let rest = text.split_once(&format!("\"{key}\":")).unwrap().1;
        let number = rest.trim_start().split([',', '}']).next().unwrap().trim();
        assert_eq!(number.parse::<f64>().unwrap().to_string().parse::<f64>().unwrap(), number.parse::<f64>().unwrap());
        number.split(['e', 'E']).next().unwrap().chars().filter(char::is_ascii_digit).count()
    };
    let most = |key| text.lines().map(|l| digits(l, key)).max().unwrap();
    // 9 digits tell any two fp32 numbers apart, 17 any two fp64.
    assert!(most("loss") >= 9 && most("grad_norm") >= 9 && most("lr") >= 15, "{text}");
}

/// The file grows as steps commit; it is not written at the end.
#[test]
fn metrics_are_written_as_steps_commit() {
    let sandbox = Sandbox::new();
    let mut process = sandbox.start_job("job", &llama(20_000), "cpu:1");
    let path = sandbox.path("metrics.jsonl");
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let count = || std::fs::read_to_string(&path).unwrap_or_default().lines().count();
    while count() < 2 {
        assert!(!process.has_ended(), "ended early:\n{}", process.stderr());
        assert!(std::time::Instant::now() < end, "no metrics after a minute");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(!process.has_ended());
    // SIGINT ends the run in order, and not with success.
    process.signal(nix::sys::signal::Signal::SIGINT);
    let finished = process.wait(std::time::Duration::from_secs(30));
    assert_ne!(finished.code, exit::OK, "{}", finished.stderr);
    assert!(count() < 20_000);
    read_metrics(&path);
    sandbox.assert_clean();
}

/// A run that starts anew does not append to the file of an older one.
#[test]
fn a_new_run_writes_a_new_metrics_file() {
    let sandbox = Sandbox::new();
    for _ in 0..2 {
        sandbox.run_job("job", &llama(3), "cpu:1").expect_success();
        assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 3);
    }
}

#[test]
fn relative_paths_start_at_the_job_file() {
    let sandbox = Sandbox::new();
    let folder = sandbox.path("a/b");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::copy(fixture_path("tokens.bin"), folder.join("tokens.bin")).unwrap();
    sandbox.copy_model("llama", "a/model");
    let job = llama(2).set("model.path", "../model").set("data.train", "tokens.bin").set("output.path", "../out/model");
    let path = job.set("output.metrics", "../out/deep/metrics.jsonl").write(folder.join("job.toml"));
    sandbox.run(Binary::Daemon, ["run".as_ref(), path.as_os_str(), "--devices".as_ref(), "cpu:1".as_ref()]).expect_success();
    assert!(sandbox.path("a/out/model/config.json").is_file());
    assert_eq!(read_metrics(&sandbox.path("a/out/deep/metrics.jsonl")).len(), 2);
}

/// Without `--devices` on a machine without GPUs the run takes one CPU device and says so.
#[test]
fn without_devices_it_takes_one_and_says_which() {
    let sandbox = Sandbox::new();
    let path = sandbox.write_job("job", &llama(1));
    let finished = sandbox.run(Binary::Daemon, ["run".as_ref(), path.as_os_str()]).expect_success();
    if !Path::new("/proc/driver/nvidia/gpus").exists() {
        let said = finished.text().to_ascii_lowercase();
        assert!(said.contains("cpu"), "{said}");
    }
}

#[test]
fn the_model_folder_is_a_hugging_face_folder() {
    for model in ["llama", "llama-tied-llama3", "mistral", "qwen2", "qwen2-untied", "qwen3", "gpt2"] {
        let sandbox = Sandbox::new();
        let job = Fixture::load(model).job(model).set("train.steps", 1).set("schedule.warmup_steps", 0).set("output.path", "model");
        sandbox.run_job("job", &job.set("optimizer.lr", 0.0), "cpu:2").expect_success();
        let (folder, original) = (sandbox.path("model"), Fixture::model_path(model));
        let config = |folder: &Path| -> Value { serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap() };
        let (ours, theirs) = (config(&folder), config(&original));
        for (key, value) in theirs.as_object().unwrap() {
            assert!(ours[key] == *value || key == "dtype" || key == "torch_dtype", "{model}: {key} is {} and was {value}", ours[key]);
        }
        assert_eq!(std::fs::read(folder.join("tokenizer.json")).unwrap(), std::fs::read(original.join("tokenizer.json")).unwrap());
        // Nothing was learned at a rate of zero: every bit of every tensor has come through the store unchanged.
        assert_same_tensors(&read_tensors(&folder), &read_tensors(&original), model);
    }
}

/// The number format of the folder can be chosen.
#[test]
fn the_model_folder_in_bf16() {
    let sandbox = Sandbox::new();
    let job = llama(1).set("optimizer.lr", 0.0).set("output.path", "model").set("output.dtype", "bf16");
    sandbox.run_job("job", &job, "cpu:1").expect_success();
    let (ours, original) = (read_tensors(&sandbox.path("model")), read_tensors(&Fixture::model_path("llama")));
    for (name, tensor) in &ours {
        assert_eq!(tensor.dtype, safetensors::Dtype::BF16, "{name}");
        for (a, b) in tensor.values().iter().zip(original[name].values()) {
            assert!((a - b).abs() <= b.abs() / 256.0, "{name}: {a} for {b}");
        }
    }
}

/// A trained folder is a model to go on from: the first loss is what the last weights give.
#[test]
fn the_model_folder_can_be_trained_again() {
    let sandbox = Sandbox::new();
    sandbox.run_job("first", &llama(10).set("output.path", "model"), "cpu:1").expect_success();
    let again = |model: &str, metrics: &str| -> Vec<MetricsLine> {
        let job = llama(2).set("model.path", model).set("output.metrics", metrics);
        sandbox.run_job("again", &job, "cpu:1").expect_success();
        read_metrics(&sandbox.path(metrics))
    };
    let trained = again("model", "trained.jsonl");
    assert!(trained[0].loss < read_metrics(&sandbox.path("metrics.jsonl"))[0].loss, "the loss on the same tokens went down");
}

#[test]
fn validation_losses_are_reported() {
    let sandbox = Sandbox::new();
    let job = llama(4)
        .set("optimizer.lr", 0.0)
        .set("data.validation", fixture_path("held-out.bin"))
        .set("train.validate_every", 2)
        .set("train.micro_batch_size", 3);
    sandbox.run_job("job", &job, "cpu:2").expect_success();
    let reference = &ramtorch_tests::inference()["llama"];
    let losses: Vec<_> = read_metrics(&sandbox.path("metrics.jsonl")).iter().filter_map(|l| l.validation_loss).collect();
    // Before the first step, after the second and after the last.
    assert!(losses.len() >= 2, "{losses:?}");
    for loss in losses {
        assert!(relative_difference(loss, reference.eval_loss) < 1e-5, "{loss} instead of {}", reference.eval_loss);
    }
}

/// A share of the training data is kept for validation: the last sequences, and they are not trained on.
#[test]
fn a_validation_fraction_is_taken_from_the_end() {
    let sandbox = Sandbox::new();
    let tokens = std::fs::read(fixture_path("tokens.bin")).unwrap();
    // 40 sequences of 17: 36 to train on, 4 to validate on.
    sandbox.file("all.bin", &tokens[..(40 * 17 + 1) * 4]);
    sandbox.file("train.bin", &tokens[..(36 * 17 + 1) * 4]);
    sandbox.file("last.bin", &tokens[36 * 17 * 4..(40 * 17 + 1) * 4]);
    let run = |job: JobFile, metrics: &str| -> Vec<MetricsLine> {
        sandbox.run_job("job", &job.set("output.metrics", metrics).set("train.validate_every", 3), "cpu:1").expect_success();
        read_metrics(&sandbox.path(metrics))
    };
    let fraction = run(llama(6).set("data.train", "all.bin").set("data.validation_fraction", 0.1), "fraction.jsonl");
    let named = run(llama(6).set("data.train", "train.bin").set("data.validation", "last.bin"), "named.jsonl");
    assert!(named.iter().any(|l| l.validation_loss.is_some()));
    assert_eq!(bits(&fraction), bits(&named));
}

/// `epochs` counts passes over the data.
#[test]
fn epochs_are_turned_into_steps() {
    let sandbox = Sandbox::new();
    let tokens = std::fs::read(fixture_path("tokens.bin")).unwrap();
    sandbox.file("train.bin", &tokens[..(36 * 17 + 1) * 4]);
    let job = llama(1).unset("train.steps").set("train.epochs", 2.0).set("data.train", "train.bin");
    sandbox.run_job("job", &job, "cpu:1").expect_success();
    assert_eq!(read_metrics(&sandbox.path("metrics.jsonl")).len(), 6, "36 sequences, 12 a step, twice");
}

/// A sample is printed at the end of a run that asks for one.
#[test]
fn a_sample_is_printed() {
    let sandbox = Sandbox::new();
    let reference = &ramtorch_tests::inference()["llama"];
    let job = llama(1)
        .set("optimizer.lr", 0.0)
        .set("sample.prompt", reference.prompts[0].as_str())
        .set("sample.max_new_tokens", reference.max_new_tokens)
        .set("sample.temperature", 0.0);
    let finished = sandbox.run_job("job", &job, "cpu:2").expect_success();
    assert!(finished.stdout.contains(&reference.texts[0]), "{} is not in\n{}", reference.texts[0], finished.stdout);
}

/// JSON Lines documents with a text each, tokenised with the model's own tokenizer: the tokens are those of the text.
#[test]
fn text_gives_the_same_tokens_as_a_token_file() {
    let sandbox = Sandbox::new();
    let bytes = std::fs::read(fixture_path("tokens.bin")).unwrap();
    let ids: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    sandbox.file("all.txt", words.join(" "));
    let fixture = Fixture::load("llama");
    let job = fixture.job("text").set("data.format", "text").set("data.train", "all.txt").set("train.steps", 8);
    sandbox.run_job("text", &job, "cpu:1").expect_success();
    let lines = read_metrics(&sandbox.path("metrics.jsonl"));
    // The schedule of a shorter run differs after the first steps of the warm-up, so only those are compared.
    for line in &lines[..5] {
        let reference = fixture.loss[line.step as usize - 1];
        assert!(relative_difference(line.loss, reference) < 1e-5, "step {}: {} instead of {reference}", line.step, line.loss);
    }
}

#[test]
fn usage_errors_have_a_code_of_their_own() {
    let sandbox = Sandbox::new();
    for (binary, arguments) in [
        (Binary::Daemon, vec!["run"]),
        (Binary::Daemon, vec!["dance"]),
        (Binary::Daemon, vec!["run", "job.toml", "--devices", "toaster"]),
        (Binary::Client, vec!["describe"]),
        (Binary::Client, vec!["--output", "xml", "list"]),
    ] {
        let finished = sandbox.run(binary, &arguments);
        assert_eq!(finished.code, exit::USAGE, "{arguments:?}: {}", finished.stderr);
        assert!(!finished.stderr.is_empty(), "{arguments:?}");
    }
}

#[test]
fn help_and_version_succeed() {
    let sandbox = Sandbox::new();
    for binary in [Binary::Daemon, Binary::Client] {
        for flag in ["--help", "--version"] {
            assert!(!sandbox.run(binary, [flag]).expect_success().stdout.is_empty());
        }
    }
}

/// A run that failed leaves the exit code of its cause.
#[test]
fn a_failure_is_not_a_success() {
    let sandbox = Sandbox::new();
    let job = llama(2).set("model.path", "nowhere");
    sandbox.run_job("job", &job, "cpu:2").expect_refusal(exit::INPUT, &["nowhere"]);
}
