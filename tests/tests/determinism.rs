//! The same job on the same devices gives the same bits; on other numbers of ranks the same numbers to 1e-5.
#![allow(clippy::unwrap_used)]

use ramtorch_tests::{
    Fixture, JobFile, MetricsLine, Sandbox, assert_same_tensors, bits, fixture_path, losses, read_metrics, read_tensors,
    worst_relative_difference,
};

const TOLERANCE: f64 = 1e-5;

fn run(job: &JobFile, ranks: usize) -> (Sandbox, Vec<MetricsLine>) {
    let sandbox = Sandbox::new();
    sandbox.run_job("determinism", job, &format!("cpu:{ranks}")).expect_success();
    let lines = read_metrics(&sandbox.path("metrics.jsonl"));
    (sandbox, lines)
}

fn weights(sandbox: &Sandbox) -> std::collections::BTreeMap<String, ramtorch_tests::Tensor> {
    read_tensors(&sandbox.path("model"))
}

fn job() -> JobFile {
    let job = Fixture::load("llama").job("determinism").set("output.path", "model");
    // Everything that could depend on timing at once: shuffling, an uneven batch, several micro-batches.
    job.set("data.shuffle", true).set("data.seed", 5).set("train.batch_size", 7).set("train.micro_batch_size", 2).set("train.steps", 12)
}

#[test]
fn two_runs_are_bit_identical() {
    for ranks in [1, 3] {
        let (first, again) = (run(&job(), ranks), run(&job(), ranks));
        assert_eq!(first.1.len(), 12);
        assert_eq!(bits(&first.1), bits(&again.1), "{ranks} ranks");
        assert_same_tensors(&weights(&first.0), &weights(&again.0), &format!("{ranks} ranks"));
    }
}

#[test]
fn stochastic_rounding_is_bit_identical_too() {
    let job = job().set("optimizer.moments", "bf16").set("train.precision", "bf16");
    let (first, again) = (run(&job, 2), run(&job, 2));
    assert_eq!(bits(&first.1), bits(&again.1));
    assert_same_tensors(&weights(&first.0), &weights(&again.0), "two runs");
}

#[test]
fn the_number_of_ranks_does_not_matter() {
    let norms = |lines: &[MetricsLine]| lines.iter().map(|l| l.grad_norm).collect::<Vec<_>>();
    let (_, one) = run(&job(), 1);
    for ranks in [2, 4] {
        let (_, many) = run(&job(), ranks);
        let (loss, norm) =
            (worst_relative_difference(&losses(&many), &losses(&one)), worst_relative_difference(&norms(&many), &norms(&one)));
        assert!(loss.1 < TOLERANCE && norm.1 < TOLERANCE, "{ranks} ranks: loss off by {:.1e}, norm by {:.1e}", loss.1, norm.1);
    }
}

#[test]
fn seeds_decide() {
    let run = |job: JobFile| bits(&run(&job, 1).1);
    let base = run(job());
    assert_ne!(run(job().set("data.seed", 6)), base, "another order of the data");
    let config = Fixture::model_path("llama").join("config.json");
    let fresh = job().unset("model.path").set("model.config", config).set("model.seed", 1).unset("output.path");
    let seeded = run(fresh.clone());
    assert_ne!(seeded, base);
    assert_eq!(run(fresh.clone()), seeded, "seeded initial weights are the same each time");
    assert_ne!(run(fresh.set("model.seed", 2)), seeded);
}

/// Initial weights from a seed do not depend on the number of ranks either.
#[test]
fn seeded_weights_are_the_same_on_any_number_of_ranks() {
    let config = Fixture::model_path("gpt2").join("config.json");
    let job = JobFile::new("seeded")
        .set("model.config", config)
        .set("model.seed", 3)
        .set("data.format", "tokens")
        .set("data.train", fixture_path("tokens.bin"))
        .set("data.sequence_length", 17)
        .set("train.steps", 1)
        .set("train.batch_size", 4)
        .set("train.precision", "fp32")
        .set("optimizer.lr", 0.0)
        .set("output.path", "model")
        .set("output.metrics", "metrics.jsonl");
    let (one, three) = (run(&job, 1), run(&job, 3));
    assert_same_tensors(&weights(&one.0), &weights(&three.0), "two runs");
}
