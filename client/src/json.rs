//! The JSON form of the protocol's messages: the field names of the `.proto` files, every key always there.
//!
//! - An absent optional value, and a number that is not finite, is `null`.
//! - A job's `state` is its name in lower case: `queued`, `preparing`, `starting`, `running`, `restarting`,
//!   `stopping`, `succeeded`, `failed`, `cancelled`.
//! - Fields named `json` hold JSON themselves and are nested, not quoted.

use ramtorch_proto::v1;
use serde_json::{Value, json};

/// Lower-case name of a job state; `unknown` for one that this version does not know.
pub fn state_name(state: i32) -> &'static str {
    use v1::JobState::*;
    match v1::JobState::try_from(state) {
        Ok(Queued) => "queued",
        Ok(Preparing) => "preparing",
        Ok(Starting) => "starting",
        Ok(Running) => "running",
        Ok(Restarting) => "restarting",
        Ok(Stopping) => "stopping",
        Ok(Succeeded) => "succeeded",
        Ok(Failed) => "failed",
        Ok(Cancelled) => "cancelled",
        Ok(Unspecified) | Err(_) => "unknown",
    }
}

/// Text that is JSON, nested; `null` where empty, the text itself where it is not JSON after all.
fn nested(text: &str) -> Value {
    if text.is_empty() {
        return Value::Null;
    }
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

/// A job, whole.
pub fn job(j: &v1::Job) -> Value {
    json!({
        "id": j.id, "name": j.name, "state": state_name(j.state), "message": j.message, "exit_code": j.exit_code,
        "step": j.step, "steps": j.steps, "world_size": j.world_size, "restarts": j.restarts,
        "created_unix_ms": j.created_unix_ms, "started_unix_ms": j.started_unix_ms, "ended_unix_ms": j.ended_unix_ms,
        "model": j.model, "output_path": j.output_path, "metrics_path": j.metrics_path,
        "segment": j.segment, "segment_bytes": j.segment_bytes,
        "last_metrics": j.last_metrics.as_ref().map(metrics),
        "workers": j.workers.iter().map(worker).collect::<Vec<_>>(),
        "plan": j.plan.as_ref().map(plan),
        "spec_toml": j.spec_toml, "uid": j.uid, "sample": j.sample,
    })
}

/// One worker of a job.
pub fn worker(w: &v1::WorkerInfo) -> Value {
    json!({
        "rank": w.rank, "device": w.device, "pid": w.pid, "phase": w.phase, "step": w.step,
        "heartbeat_unix_ms": w.heartbeat_unix_ms, "log_path": w.log_path,
    })
}

/// The metrics of one step.
pub fn metrics(m: &v1::Metrics) -> Value {
    json!({
        "step": m.step, "loss": m.loss, "grad_norm": m.grad_norm, "lr": m.lr, "tokens": m.tokens,
        "tokens_per_second": m.tokens_per_second, "validation_loss": m.validation_loss, "step_seconds": m.step_seconds,
        "tokens_total": m.tokens_total, "tflops": m.tflops, "bytes_to_device": m.bytes_to_device,
        "bytes_from_device": m.bytes_from_device, "copy_wait_seconds": m.copy_wait_seconds,
        "optimizer_wait_seconds": m.optimizer_wait_seconds, "epoch": m.epoch,
        "initial_validation_loss": m.initial_validation_loss, "json": nested(&m.json),
    })
}

/// A plan.
pub fn plan(p: &v1::Plan) -> Value {
    json!({
        "parameters": p.parameters, "segment_bytes": p.segment_bytes, "device_bytes": p.device_bytes,
        "host_bytes": p.host_bytes, "step_seconds": p.step_seconds, "bound_by": p.bound_by, "text": p.text,
        "json": nested(&p.json),
    })
}

/// Something that happened to a job.
pub fn event(e: &v1::Event) -> Value {
    json!({ "unix_ms": e.unix_ms, "level": e.level, "text": e.text, "rank": e.rank })
}

/// The node.
pub fn node(n: &v1::NodeInfo) -> Value {
    json!({
        "version": n.version, "hostname": n.hostname, "pid": n.pid, "started_unix_ms": n.started_unix_ms,
        "memory_total_bytes": n.memory_total_bytes, "memory_available_bytes": n.memory_available_bytes,
        "shm_total_bytes": n.shm_total_bytes, "shm_available_bytes": n.shm_available_bytes,
        "reserved_bytes": n.reserved_bytes, "devices": n.devices.iter().map(device).collect::<Vec<_>>(),
        "jobs_active": n.jobs_active, "cpus": n.cpus, "state_dir": n.state_dir,
    })
}

/// One device of the node.
pub fn device(d: &v1::DeviceInfo) -> Value {
    json!({ "name": d.name, "model": d.model, "memory_bytes": d.memory_bytes, "job": d.job, "state": d.state })
}

/// Where and at which step a checkpoint was written.
pub fn checkpoint(c: &v1::CheckpointResponse) -> Value {
    json!({ "path": c.path, "step": c.step })
}

/// The end of sampling.
pub fn generated(g: &v1::GenerateDone) -> Value {
    json!({
        "texts": g.texts,
        "prompt_tokens": g.prompt_tokens,
        "new_tokens": g.new_tokens,
        "seconds": g.seconds,
        "prefill_seconds": g.prefill_seconds,
        "decode_seconds": g.decode_seconds,
        "decode_tokens": g.decode_tokens
    })
}

/// An evaluation.
pub fn evaluation(e: &v1::EvalResponse) -> Value {
    json!({ "loss": e.loss, "perplexity": e.perplexity, "tokens": e.tokens, "seconds": e.seconds })
}

/// An exported folder.
pub fn exported(e: &v1::ExportResponse) -> Value {
    json!({ "path": e.path, "step": e.step, "bytes": e.bytes })
}

/// Described tensors.
pub fn inspected(i: &v1::InspectResponse) -> Value {
    json!({ "step": i.step, "tensors": i.tensors.iter().map(tensor).collect::<Vec<_>>() })
}

/// One described tensor.
pub fn tensor(t: &v1::TensorInfo) -> Value {
    json!({
        "name": t.name, "shape": t.shape, "dtype": t.dtype, "block": t.block, "parameters": t.parameters,
        "mean": t.mean, "std": t.std, "min": t.min, "max": t.max, "nonfinite": t.nonfinite,
        "values": t.values, "pages": t.pages,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    /// Field names of a message, from the descriptor that the daemon serves over reflection.
    fn fields(message: &str) -> Vec<String> {
        let set = prost_types::FileDescriptorSet::decode(ramtorch_proto::FILE_DESCRIPTOR_SET).unwrap();
        let found = set.file.iter().flat_map(|f| &f.message_type).find(|m| m.name() == message);
        found.unwrap_or_else(|| panic!("no message {message}")).field.iter().map(|f| f.name().to_owned()).collect()
    }

    #[test]
    fn keys_are_the_protocols_fields_in_any_order() {
        let forms = [
            ("Job", job(&Default::default())),
            ("WorkerInfo", worker(&Default::default())),
            ("Metrics", metrics(&Default::default())),
            ("Plan", plan(&Default::default())),
            ("Event", event(&Default::default())),
            ("NodeInfo", node(&Default::default())),
            ("DeviceInfo", device(&Default::default())),
            ("CheckpointResponse", checkpoint(&Default::default())),
            ("GenerateDone", generated(&Default::default())),
            ("EvalResponse", evaluation(&Default::default())),
            ("ExportResponse", exported(&Default::default())),
            ("InspectResponse", inspected(&Default::default())),
            ("TensorInfo", tensor(&Default::default())),
        ];
        for (message, form) in forms {
            let mut keys: Vec<String> = form.as_object().unwrap().keys().cloned().collect();
            let mut expected = fields(message);
            keys.sort();
            expected.sort();
            assert_eq!(keys, expected, "{message}");
        }
    }

    #[test]
    fn state_names_are_those_of_the_protocol() {
        let set = prost_types::FileDescriptorSet::decode(ramtorch_proto::FILE_DESCRIPTOR_SET).unwrap();
        let states = set.file.iter().flat_map(|f| &f.enum_type).find(|e| e.name() == "JobState").unwrap();
        for value in states.value.iter().filter(|v| v.number() != 0) {
            assert_eq!(value.name(), format!("JOB_STATE_{}", state_name(value.number()).to_uppercase()));
        }
        assert_eq!(state_name(0), "unknown");
        assert_eq!(state_name(99), "unknown");
    }

    #[test]
    fn what_is_not_a_number_is_null_and_what_is_json_is_nested() {
        let m = v1::Metrics { loss: f64::NAN, lr: f64::INFINITY, json: r#"{"step":1}"#.into(), ..Default::default() };
        let value = metrics(&m);
        assert!(value["loss"].is_null() && value["lr"].is_null() && value["validation_loss"].is_null());
        assert_eq!(value["json"]["step"], 1);
        assert_eq!(metrics(&v1::Metrics { json: "{oops".into(), ..Default::default() })["json"], "{oops");
    }
}
