//! Bytes of every message that a daemon takes: no message, or one that is written as it is read. What a daemon does with
//! them is in `requests` and `worker_reports`, whose inputs take far longer.
//!
//! Input: number of the message (u8), its bytes.
#![no_main]

use prost::Message;
use ramtorch_proto::v1 as pb;

fn one<M: Message + Default>(bytes: &[u8]) {
    let Ok(message) = M::decode(bytes) else { return };
    let written = message.encode_to_vec();
    // Compared as bytes: a NaN is not equal to itself.
    let again = M::decode(&written[..]).expect("what was written is read");
    assert_eq!(again.encode_to_vec(), written);
}

const MESSAGES: [fn(&[u8]); 16] = [
    one::<pb::SubmitRequest>,
    one::<pb::GetJobRequest>,
    one::<pb::ListJobsRequest>,
    one::<pb::WatchRequest>,
    one::<pb::CancelRequest>,
    one::<pb::CheckpointRequest>,
    one::<pb::LogsRequest>,
    one::<pb::TraceRequest>,
    one::<pb::GenerateRequest>,
    one::<pb::EvalRequest>,
    one::<pb::ExportRequest>,
    one::<pb::InspectRequest>,
    one::<pb::NodeInfoRequest>,
    one::<pb::ShutdownRequest>,
    one::<pb::RegisterRequest>,
    one::<pb::WorkerReport>,
];

fn seeds() -> Vec<Vec<u8>> {
    let source = pb::model_source::Source::Job("j".into());
    let model = || Some(pb::ModelSource { source: Some(source.clone()) });
    let of = |number: u8, bytes: Vec<u8>| [vec![number], bytes].concat();
    let submit = pb::SubmitRequest { job_toml: "name = \"a\"".into(), base_dir: "/b".into(), file_name: "f".into(), dry_run: true };
    let generate = pb::GenerateRequest { model: model(), prompts: vec!["p".into(), "q".into()], max_new_tokens: 9, ..Default::default() };
    let eval = pb::EvalRequest { model: model(), files: vec!["/f".into()], sequence_length: 8, ..Default::default() };
    let span = pb::TraceSpan { row: 1, name: "n".into(), ..Default::default() };
    let part = pb::TracePart { rank: 1, steps: 2, spans: vec![span.clone(), span], ..Default::default() };
    let trace = pb::worker_report::Report::Trace(pb::TraceReport { request: 4, part: Some(part) });
    let metrics =
        pb::worker_report::Report::Metrics(pb::Metrics { step: 1, loss: f64::NAN, validation_loss: Some(1.0), ..Default::default() });
    let report = |report| pb::WorkerReport { token: "t".into(), report: Some(report) }.encode_to_vec();
    vec![
        of(0, submit.encode_to_vec()),
        of(6, pb::LogsRequest { id: "i".into(), rank: Some(3), follow: true, tail_lines: 2 }.encode_to_vec()),
        of(8, generate.encode_to_vec()),
        of(9, eval.encode_to_vec()),
        of(15, report(trace)),
        of(15, report(metrics)),
    ]
}

libfuzzer_sys::fuzz_target!(init: ramtorch_fuzz::seeds(seeds), |data: &[u8]| {
    let Some((number, bytes)) = data.split_first() else { return };
    MESSAGES[usize::from(*number) % MESSAGES.len()](bytes);
});
