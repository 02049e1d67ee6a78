//! The daemon and its client: submit, watch, list, cancel, checkpoint, and work on models, as a user does it.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::Signal;
use ramtorch_tests::{
    Daemon, Finished, Fixture, JobFile, Sandbox, exit, fixture_path, inference, read_metrics, read_tensors, relative_difference,
};
use serde_json::Value;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

fn llama(steps: usize) -> JobFile {
    let job = Fixture::load("llama").job("tiny").set("train.steps", steps).set("output.path", "model");
    if steps < 30 { job.set("schedule.warmup_steps", 0) } else { job }
}

/// A job that runs until it is stopped.
fn endless() -> JobFile {
    llama(1_000_000).set("name", "endless").set("output.metrics", "endless.jsonl").set("output.path", "endless")
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap_or_else(|e| panic!("not JSON ({e}): {l}"))).collect()
}

#[track_caller]
fn wait_for_steps(daemon: &Daemon<'_>, id: &str, steps: u64) -> Value {
    daemon.wait_for(id, "steps", |j| j["step"].as_u64() >= Some(steps))
}

#[test]
fn a_job_from_submit_to_success() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("tiny", &llama(30));
    // Following it to its end is success.
    let watched = daemon.client(["--output", "json", "watch", &id]).expect_success();
    let events = lines(&watched.stdout);
    assert!(events.len() > 30, "{}", watched.stdout);
    let job = daemon.job(&id);
    for (key, value) in [("state", "succeeded"), ("name", "tiny"), ("id", id.as_str())] {
        assert_eq!(job[key], value, "{job:#}");
    }
    for (key, value) in [("step", 30), ("steps", 30), ("world_size", 2), ("exit_code", 0), ("restarts", 0)] {
        assert_eq!(job[key], value, "{job:#}");
    }
    assert!(job["plan"]["segment_bytes"].as_u64() > Some(0), "{job:#}");
    // The numbers are those of `ramtorchd run`, and of PyTorch.
    let reference = Fixture::load("llama");
    let metrics = read_metrics(&sandbox.path("metrics.jsonl"));
    for (line, loss) in metrics.iter().zip(&reference.loss) {
        assert!(relative_difference(line.loss, *loss) < 1e-5, "step {}", line.step);
    }
    assert_eq!(job["last_metrics"]["loss"].as_f64(), Some(metrics[29].loss), "the API gives every digit of the file");
    assert!(sandbox.path("model/model.safetensors").is_file() || sandbox.path("model/model.safetensors.index.json").is_file());
    daemon.stop();
}

#[test]
fn the_list_shows_active_jobs_and_on_request_ended_ones() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let ids = |arguments: &[&str]| -> Vec<String> {
        let answer = daemon.ask(arguments);
        let jobs = answer.get("jobs").unwrap_or(&answer).as_array().unwrap_or_else(|| panic!("no list: {answer}")).clone();
        jobs.iter().map(|j| j["id"].as_str().unwrap().to_owned()).collect()
    };
    assert!(ids(&["list"]).is_empty());
    let done = daemon.submit("done", &llama(2));
    daemon.wait_for_state(&done, "succeeded");
    let running = daemon.submit("endless", &endless());
    wait_for_steps(&daemon, &running, 1);
    assert_eq!(ids(&["list"]), std::slice::from_ref(&running));
    let mut all = ids(&["list", "--all"]);
    let mut expected = vec![done, running.clone()];
    all.sort();
    expected.sort();
    assert_eq!(all, expected);
    // For people: a table with the name.
    assert!(daemon.client(["list"]).expect_success().stdout.contains("endless"));
    daemon.client(["cancel", &running]).expect_success();
    daemon.wait_for_state(&running, "cancelled");
    daemon.stop();
}

#[test]
fn cancelling_a_running_job() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("endless", &endless());
    let job = wait_for_steps(&daemon, &id, 3);
    assert_eq!(job["state"], "running");
    let segment = job["segment"].as_str().unwrap().trim_start_matches('/').to_owned();
    let in_memory = std::path::Path::new("/dev/shm").join(&segment);
    assert!(in_memory.exists(), "{segment}");
    assert_eq!(in_memory.metadata().unwrap().len(), job["segment_bytes"].as_u64().unwrap(), "the segment is what the plan says");
    assert_eq!(job["segment_bytes"], job["plan"]["segment_bytes"]);
    assert_eq!(job["workers"].as_array().unwrap().len(), 2);
    let watching = daemon.start_client(["watch", &id]);
    daemon.client(["cancel", &id]).expect_success();
    watching.wait(LIMIT).expect_code(exit::CANCELLED);
    let job = daemon.wait_for_state(&id, "cancelled");
    assert_eq!(job["exit_code"], exit::CANCELLED);
    assert!(!in_memory.exists(), "the segment is gone with the job");
    assert!(!sandbox.path("endless").exists());
    daemon.stop();
}

#[test]
fn cancelling_a_waiting_job() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let first = daemon.submit("endless", &endless());
    let second = daemon.submit("tiny", &llama(3));
    daemon.client(["cancel", &second]).expect_success();
    daemon.wait_for_state(&second, "cancelled");
    daemon.client(["cancel", &first]).expect_success();
    daemon.wait_for_state(&first, "cancelled");
    assert!(!sandbox.path("metrics.jsonl").exists());
    daemon.stop();
}

/// Ctrl-C on a watch detaches; the job goes on.
#[test]
fn detaching_leaves_the_job_alone() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let id = daemon.submit("endless", &endless());
    let watching = daemon.start_client(["watch", &id]);
    let before = wait_for_steps(&daemon, &id, 3)["step"].as_u64().unwrap();
    watching.signal(Signal::SIGINT);
    watching.wait(LIMIT).expect_code(exit::NOT_FINISHED);
    let job = wait_for_steps(&daemon, &id, before + 5);
    assert_eq!(job["state"], "running");
    daemon.client(["cancel", &id]).expect_success();
    daemon.wait_for_state(&id, "cancelled");
    daemon.stop();
}

#[test]
fn jobs_are_found_by_id_prefix_and_name_or_not_at_all() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let id = daemon.submit("tiny", &llama(2));
    daemon.wait_for_state(&id, "succeeded");
    for name in [id.as_str(), "tiny", &id[..id.len() - 1]] {
        assert_eq!(daemon.ask(["describe", name])["id"], id.as_str(), "{name}");
    }
    for command in ["describe", "watch", "cancel", "logs"] {
        daemon.client([command, "nobody"]).expect_refusal(exit::NOT_FOUND, &["nobody"]);
    }
    daemon.stop();
}

#[test]
fn a_failed_job_says_why() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let path = sandbox.write_job("bad", &llama(3).set("model.path", "nowhere"));
    // Found out when it is submitted, or when it is prepared: the same code and message either way.
    let submitted = daemon.client(["--output", "json", "submit", path.to_str().unwrap()]);
    if submitted.code == exit::OK {
        let id = submitted.json()["id"].as_str().unwrap().to_owned();
        let job = daemon.wait_for_state(&id, "failed");
        assert_eq!(job["exit_code"], exit::INPUT, "{job:#}");
        assert!(job["message"].as_str().unwrap().contains("nowhere"), "{job:#}");
        daemon.client(["watch", &id]).expect_code(exit::INPUT);
    } else {
        submitted.expect_code(exit::INPUT);
    }
    daemon.stop();
}

#[test]
fn logs_of_every_rank() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("tiny", &llama(5));
    daemon.wait_for_state(&id, "succeeded");
    for rank in ["0", "1"] {
        let log = daemon.client(["logs", &id, "--rank", rank]).expect_success();
        assert!(!log.stdout.is_empty(), "rank {rank} has logged nothing");
    }
    assert!(!daemon.client(["logs", &id]).expect_success().stdout.is_empty());
    daemon.stop();
}

#[test]
fn a_plan_is_made_without_a_job() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let path = sandbox.write_job("tiny", &llama(2));
    let plan = daemon.ask(["plan".as_ref(), path.as_os_str()]);
    let parameters: usize = read_tensors(&Fixture::model_path("llama")).values().map(|t| t.shape.iter().product::<usize>()).sum();
    assert_eq!(plan["parameters"].as_u64(), Some(parameters as u64), "{plan:#}");
    // Weights and two moments, 12 bytes a parameter, and gradients.
    assert!(plan["segment_bytes"].as_u64() > Some(12 * parameters as u64), "{plan:#}");
    assert!(daemon.client(["plan".as_ref(), path.as_os_str()]).expect_success().stdout.contains("segment"));
    assert!(daemon.client(["list", "--all"]).expect_success().stdout.lines().count() <= 1, "nothing was submitted");
    daemon.stop();
}

#[test]
fn a_checkpoint_on_request_and_an_export_from_the_live_job() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:2", &[]);
    let id = daemon.submit("endless", &endless().set("checkpoint.path", "checkpoints"));
    wait_for_steps(&daemon, &id, 2);
    let checkpoint = daemon.ask(["checkpoint", &id]);
    assert!(std::path::Path::new(checkpoint["path"].as_str().unwrap()).is_dir(), "{checkpoint}");
    let exported = sandbox.path("exported");
    daemon.client(["export".as_ref(), checkpoint["path"].as_str().unwrap().as_ref(), exported.as_os_str()]).expect_success();
    assert_eq!(read_tensors(&exported).keys().collect::<Vec<_>>(), read_tensors(&Fixture::model_path("llama")).keys().collect::<Vec<_>>());
    let tensors = daemon.ask(["inspect", &id, "model.norm.weight"]);
    assert_eq!(tensors["tensors"][0]["name"], "model.norm.weight", "{tensors:#}");
    assert_eq!(tensors["tensors"][0]["shape"], serde_json::json!([48]));
    daemon.client(["cancel", &id]).expect_success();
    daemon.wait_for_state(&id, "cancelled");
    daemon.stop();
}

/// A link on the way is followed when the export is asked for; one that somebody puts there while it writes is not.
#[test]
#[cfg_attr(not(debug_assertions), ignore = "release builds have no fail points")]
fn an_export_follows_no_link_that_comes_later() {
    use ramtorch_failpoint::{MARKS_VARIABLE, VARIABLE};
    let sandbox = Sandbox::new();
    for folder in ["marks", "mine", "theirs"] {
        std::fs::create_dir(sandbox.path(folder)).unwrap();
    }
    let link = |target: &str, name: &str| std::os::unix::fs::symlink(sandbox.path(target), sandbox.path(name)).unwrap();
    link("mine", "way");
    let marks = sandbox.path("marks");
    let environment = [(VARIABLE, "file.change=sleep(2000)"), (MARKS_VARIABLE, marks.to_str().unwrap())];
    let daemon = Daemon::try_start(&sandbox, "cpu:1", &[], &environment.map(|(k, v)| (k.to_string(), v.to_string()))).unwrap();
    let model = Fixture::model_path("llama");
    let (arguments, out) = (["export".into(), model.clone().into_os_string()], sandbox.path("way/model").into_os_string());
    let client = daemon.start_client(arguments.into_iter().chain([out.clone()]));
    let end = std::time::Instant::now() + LIMIT;
    while std::fs::read_dir(&marks).unwrap().next().is_none() {
        assert!(std::time::Instant::now() < end, "the export does not begin");
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::rename(sandbox.path("mine"), sandbox.path("aside")).unwrap();
    link("theirs", "mine");
    client.wait(LIMIT).expect_success();
    assert_eq!(read_tensors(&sandbox.path("aside/model")).len(), read_tensors(&model).len(), "where it was meant to be");
    assert_eq!(std::fs::read_dir(sandbox.path("theirs")).unwrap().count(), 0, "nothing went through the link");
    daemon.stop();
}

#[test]
fn perplexity_of_every_family_is_pytorchs() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let held_out = fixture_path("held-out.bin");
    for (model, reference) in inference() {
        let folder = Fixture::model_path(&model);
        let length = reference.eval_sequence_length.to_string();
        let arguments = ["eval".as_ref(), folder.as_os_str(), "--data".as_ref(), held_out.as_os_str()];
        let options = ["--format", "tokens", "--sequence-length", &length, "--precision", "fp32"].map(std::ffi::OsStr::new);
        let result = daemon.ask(arguments.into_iter().chain(options));
        let (loss, perplexity) = (result["loss"].as_f64().unwrap(), result["perplexity"].as_f64().unwrap());
        assert!(relative_difference(loss, reference.eval_loss) < 1e-5, "{model}: {loss} instead of {}", reference.eval_loss);
        assert!(relative_difference(perplexity, reference.eval_loss.exp()) < 1e-4, "{model}: {perplexity}");
        assert_eq!(result["tokens"].as_u64(), Some(reference.eval_tokens), "{model}");
    }
    daemon.stop();
}

/// Greedy continuations of three prompts of different lengths at once, with the KV cache, past the sliding window.
#[test]
fn greedy_continuations_of_every_family_are_pytorchs() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    for (model, reference) in inference() {
        let folder = Fixture::model_path(&model);
        let tokens = reference.max_new_tokens.to_string();
        let mut arguments =
            vec!["generate", folder.to_str().unwrap(), "--temperature", "0", "--max-new-tokens", &tokens, "--precision", "fp32"];
        for prompt in &reference.prompts {
            arguments.extend(["--prompt", prompt]);
        }
        let answer = daemon.client(["--output", "json"].into_iter().chain(arguments)).expect_success();
        let done = lines(&answer.stdout).pop().unwrap_or_else(|| answer.json());
        let texts: Vec<_> = done["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().trim().to_owned()).collect();
        assert_eq!(texts, reference.texts, "{model}");
    }
    daemon.stop();
}

/// One command on a daemon whose device has `memory` bytes for plans, or all.
fn with_memory(memory: Option<u64>, arguments: &[&str]) -> Finished {
    let sandbox = Sandbox::new();
    let bytes = memory.map(|m| m.to_string());
    let more: Vec<&str> = bytes.iter().flat_map(|m| ["--device-memory", m.as_str()]).collect();
    let daemon = sandbox.start_daemon("cpu:1", &more);
    let finished = daemon.client(arguments);
    daemon.stop();
    finished
}

fn json<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["--output", "json"][..], arguments].concat()
}

/// The bytes that a refusal asks for: the largest number in it.
fn asked_for(arguments: &[&str]) -> u64 {
    let refusal = with_memory(Some(1024), arguments).expect_refusal(exit::RESOURCES, &["bytes of device memory"]).text();
    refusal.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok()).max().unwrap()
}

/// With the least memory all layers are streamed, with a little more several parts of the input go through each of them together:
/// what comes out is the same, to the bit.
#[test]
fn streamed_layers_give_the_same_texts_and_losses() {
    let held_out = fixture_path("held-out.bin");
    for model in ["llama"] {
        let folder = Fixture::model_path(model);
        let folder = folder.to_str().unwrap();
        let eval = ["eval", folder, "--data", held_out.to_str().unwrap(), "--format", "tokens", "--sequence-length", "17"];
        let eval = [&eval[..], &["--micro-batch-size", "2"]].concat();
        let loss = |memory| with_memory(memory, &json(&eval)).expect_success().json()["loss"].as_f64().unwrap().to_bits();
        let (whole, least) = (loss(None), asked_for(&eval));
        with_memory(Some(least - 1), &eval).expect_refusal(exit::RESOURCES, &["bytes of device memory"]);
        for more in [0, 20_000, 60_000] {
            assert_eq!(loss(Some(least + more)), whole, "{model}: eval with {more} bytes more than the least");
        }
        let generate = ["generate", folder, "-p", "It is a truth", "-p", "a", "-p", "the", "--max-new-tokens", "12", "--seed", "3"];
        let texts = |memory| {
            let finished = with_memory(memory, &json(&generate)).expect_success();
            let done = lines(&finished.stdout).pop().unwrap();
            assert!(done["decode_tokens"].as_u64() > Some(0) && done["decode_seconds"].as_f64() > Some(0.0), "{done:#}");
            assert!(done["prefill_seconds"].as_f64() > Some(0.0), "{done:#}");
            done["texts"].clone()
        };
        assert_eq!(texts(Some(asked_for(&generate))), texts(None), "{model}");
    }
}

#[test]
fn the_node_tells_its_devices() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:3", &[]);
    let node = daemon.ask(["node"]);
    let names: Vec<_> = node["devices"].as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, ["cpu:0", "cpu:1", "cpu:2"]);
    assert!(node["memory_total_bytes"].as_u64() > Some(0) && node["shm_total_bytes"].as_u64() > Some(0));
    daemon.stop();
}

/// SIGTERM and SIGINT end the daemon in bounded time with a job under way: no process or socket is left, and of the job what the
/// next daemon goes on from.
#[test]
fn signals_stop_the_daemon_whatever_it_does() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let sandbox = Sandbox::new();
        let daemon = sandbox.start_daemon("cpu:2", &[]);
        let id = daemon.submit("endless", &endless());
        let segment = wait_for_steps(&daemon, &id, 1)["segment"].as_str().unwrap().trim_start_matches('/').to_owned();
        let process = daemon.into_process();
        process.signal(signal);
        process.wait(Duration::from_secs(30)).expect_success();
        assert!(std::path::Path::new("/dev/shm").join(&segment).exists(), "the job writes no checkpoints");
        assert!(ramtorch_tests::settled(|| sandbox.processes()).is_empty());
        let daemon = sandbox.start_daemon("cpu:2", &[]);
        daemon.client(["cancel", &id]).expect_success();
        daemon.wait_for_state(&id, "cancelled");
        daemon.stop();
    }
}

/// Ended jobs are remembered by the next daemon.
#[test]
fn a_new_daemon_knows_the_old_ones_jobs() {
    let sandbox = Sandbox::new();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let id = daemon.submit("tiny", &llama(2));
    daemon.wait_for_state(&id, "succeeded");
    daemon.stop();
    let daemon = sandbox.start_daemon("cpu:1", &[]);
    let job = daemon.job(&id);
    assert_eq!((job["state"].as_str(), job["step"].as_u64()), (Some("succeeded"), Some(2)), "{job:#}");
    daemon.stop();
}
