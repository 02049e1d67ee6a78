//! What the daemon tells Prometheus.
//!
//! One prefix, base units, `_total` for what only grows. Labels have few values: jobs that have ended are not told one by
//! one, and of active ones at most [`JOBS_MAX`]. The label is `job_id`: `job` is Prometheus's own, for what it scrapes.
//! Clocks, temperatures and power of GPUs are dcgm-exporter's.

pub mod exposition;
pub mod http;
pub mod rpc;

use crate::supervisor::telemetry::{JobSample, Snapshot};
use exposition::{Kind, Page};
use rpc::RpcCounters;
use std::collections::BTreeMap;

/// Active jobs that are told one by one, the oldest first: those that run are among them.
pub const JOBS_MAX: usize = 64;

/// A number of a job, by the name of its metric.
type JobMetric = (&'static str, Kind, &'static str, fn(&JobSample) -> Option<f64>);

const JOB_METRICS: [JobMetric; 19] = [
    ("ramtorch_job_step", Kind::Gauge, "Last committed step.", |j| Some(j.step as f64)),
    ("ramtorch_job_steps", Kind::Gauge, "Steps of the whole job, 0 while unknown.", |j| Some(j.steps as f64)),
    ("ramtorch_job_loss", Kind::Gauge, "Training loss of the last step.", |j| j.last.as_ref().map(|m| m.loss)),
    ("ramtorch_job_validation_loss", Kind::Gauge, "Validation loss, at the last step that had one.", |j| j.validation_loss),
    ("ramtorch_job_grad_norm", Kind::Gauge, "Gradient norm of the last step, before clipping.", |j| j.last.as_ref().map(|m| m.grad_norm)),
    ("ramtorch_job_learning_rate", Kind::Gauge, "Learning rate of the last step.", |j| j.last.as_ref().map(|m| m.lr)),
    ("ramtorch_job_epoch", Kind::Gauge, "Passes over the data so far.", |j| j.last.as_ref().map(|m| m.epoch)),
    ("ramtorch_job_tokens_total", Kind::Counter, "Target tokens trained on, padding not counted.", |j| {
        j.last.as_ref().map(|m| m.tokens_total as f64)
    }),
    ("ramtorch_job_tokens_per_second", Kind::Gauge, "Target tokens a second, in the last step.", |j| {
        j.last.as_ref().map(|m| m.tokens_per_second)
    }),
    ("ramtorch_job_step_seconds", Kind::Gauge, "Duration of the last step.", |j| j.last.as_ref().map(|m| m.step_seconds)),
    ("ramtorch_job_copy_wait_seconds", Kind::Gauge, "Time in the last step that arithmetic waited for copies.", |j| {
        j.last.as_ref().map(|m| m.copy_wait_seconds)
    }),
    ("ramtorch_job_optimizer_wait_seconds", Kind::Gauge, "Time in the last step that arithmetic waited for updated weights.", |j| {
        j.last.as_ref().map(|m| m.optimizer_wait_seconds)
    }),
    (
        "ramtorch_job_flops",
        Kind::Gauge,
        "Floating-point operations a second of the whole job, in the last step, nothing recomputed counted.",
        |j| j.last.as_ref().map(|m| m.tflops * 1e12),
    ),
    ("ramtorch_job_segment_bytes", Kind::Gauge, "Bytes of the parameter store.", |j| Some(j.segment_bytes as f64)),
    ("ramtorch_job_restarts_total", Kind::Counter, "Gangs started again after a failure.", |j| Some(f64::from(j.restarts))),
    ("ramtorch_job_checkpoints_total", Kind::Counter, "Checkpoints that became durable since the daemon started.", |j| {
        Some(j.checkpoints as f64)
    }),
    ("ramtorch_job_checkpoint_failures_total", Kind::Counter, "Checkpoints that could not be written since the daemon started.", |j| {
        Some(j.checkpoint_failures as f64)
    }),
    ("ramtorch_job_checkpoint_step", Kind::Gauge, "Step of the newest durable checkpoint.", |j| j.checkpoint_step.map(|s| s as f64)),
    (
        "ramtorch_job_checkpoint_timestamp_seconds",
        Kind::Gauge,
        "When it became durable, seconds since 1970; before the first one, when the job started.",
        |j| j.checkpoint_unix_ms.map(|t| t as f64 / 1000.0),
    ),
];

/// The page in the text format, version 0.0.4.
pub fn page(s: &Snapshot, calls: &RpcCounters) -> String {
    let mut p = Page::default();
    p.family("ramtorch_build_info", Kind::Gauge, "Version of the daemon; always 1.");
    p.sample("ramtorch_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0);
    p.one("ramtorch_start_time_seconds", Kind::Gauge, "When the daemon started, seconds since 1970.", s.started_unix_ms as f64 / 1000.0);
    p.family("ramtorch_jobs", Kind::Gauge, "Jobs in the books, by state.");
    for (state, count) in &s.jobs_by_state {
        p.sample("ramtorch_jobs", &[("state", state)], *count as f64);
    }
    let shown: Vec<&JobSample> = s.jobs.iter().take(JOBS_MAX).collect();
    p.family("ramtorch_job_info", Kind::Gauge, "An active job; always 1.");
    for j in &shown {
        p.sample("ramtorch_job_info", &[("job_id", &j.id), ("name", &j.name), ("state", &j.state)], 1.0);
    }
    for (name, kind, help, value) in JOB_METRICS {
        p.family(name, kind, help);
        for j in &shown {
            if let Some(v) = value(j) {
                p.sample(name, &[("job_id", &j.id)], v);
            }
        }
    }
    p.family("ramtorch_worker_failures_total", Kind::Counter, "First causes of the failures of gangs, by kind.");
    for (cause, count) in &s.failures_by_cause {
        p.sample("ramtorch_worker_failures_total", &[("cause", cause)], *count as f64);
    }
    p.family("ramtorch_restarts_total", Kind::Counter, "Gangs started again after a failure, by kind of its first cause.");
    for (cause, count) in &s.restarts_by_cause {
        p.sample("ramtorch_restarts_total", &[("cause", cause)], *count as f64);
    }
    p.family("ramtorch_gpu_errors_total", Kind::Counter, "Errors of GPUs, as CUDA and the driver (Xid) told them.");
    for ((device, source, code), count) in &all_gpu_errors(s) {
        p.sample("ramtorch_gpu_errors_total", &[("device", device), ("source", source), ("code", code)], *count as f64);
    }
    p.family("ramtorch_device_quarantined", Kind::Gauge, "1 while a device is out of use.");
    p.family("ramtorch_device_memory_bytes", Kind::Gauge, "Memory of a device that plans may use.");
    p.family("ramtorch_device_busy", Kind::Gauge, "1 while a job or a call holds a device.");
    for d in &s.devices {
        let device = [("device", d.name.as_str())];
        p.sample("ramtorch_device_quarantined", &device, f64::from(u8::from(d.state == "quarantined")));
        p.sample("ramtorch_device_memory_bytes", &device, d.memory_bytes as f64);
        p.sample("ramtorch_device_busy", &device, f64::from(u8::from(!d.job.is_empty())));
    }
    p.one("ramtorch_node_memory_bytes", Kind::Gauge, "RAM, or the daemon's cgroup limit if that is less.", s.memory.total as f64);
    p.one("ramtorch_node_memory_available_bytes", Kind::Gauge, "RAM that can be taken without swapping.", s.memory.available as f64);
    p.one("ramtorch_node_shm_bytes", Kind::Gauge, "Size of /dev/shm.", s.memory.shm_total as f64);
    p.one("ramtorch_node_shm_available_bytes", Kind::Gauge, "Free bytes of /dev/shm.", s.memory.shm_free as f64);
    p.one("ramtorch_segments_bytes", Kind::Gauge, "Bytes of all parameter stores.", s.reserved_bytes as f64);
    p.one("ramtorch_worker_processes", Kind::Gauge, "Worker processes in the books.", s.processes as f64);
    p.one("ramtorch_one_off_calls", Kind::Gauge, "Generate, eval, export, inspect and plan calls under way.", s.one_offs as f64);
    calls.write(&mut p);
    p.finish()
}

/// Errors of every GPU, those that it never had included: what is not there before it is 1 has not increased, for Prometheus.
fn all_gpu_errors(s: &Snapshot) -> BTreeMap<(String, &'static str, String), u64> {
    let mut all = s.gpu_errors.clone();
    for device in s.devices.iter().filter(|d| d.name.starts_with("cuda")) {
        for (source, label) in crate::faults::labels() {
            all.entry((device.name.clone(), source, label)).or_default();
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::telemetry::tests::full;
    use std::collections::BTreeSet;

    /// Names of all families on a page.
    pub fn names(page: &str) -> BTreeSet<String> {
        page.lines().filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_string)).collect()
    }

    #[test]
    fn a_page_is_well_formed() {
        let page = page(&full(), &RpcCounters::default());
        let mut family = String::new();
        let mut seen = BTreeSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                family = rest.split(' ').next().unwrap().to_string();
                assert!(seen.insert(family.clone()), "{family} is there twice");
                continue;
            }
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(name, family);
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                continue;
            }
            let name = line.split(['{', ' ']).next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
            assert!(name == family || base == family, "{line} below {family}");
            let value = line.rsplit(' ').next().unwrap();
            assert!(value.parse::<f64>().is_ok() || ["NaN", "+Inf", "-Inf"].contains(&value), "{line}");
        }
        assert!(page.contains("ramtorch_job_loss{job_id=\"abc\"} NaN\n"), "{page}");
        assert!(page.contains("ramtorch_job_info{job_id=\"abc\",name=\"one\",state=\"running\"} 1\n"), "{page}");
        assert!(page.contains("ramtorch_gpu_errors_total{device=\"cuda:0\",source=\"xid\",code=\"79\"} 2\n"), "{page}");
    }

    /// `increase()` sees the first error of a GPU only where there was a 0 before it, under the same labels.
    #[test]
    fn errors_are_counted_from_zero() {
        use crate::faults::{GpuError, Source};
        let mut s = full();
        s.devices.push(ramtorch_proto::v1::DeviceInfo { name: "cuda:1".into(), ..s.devices[0].clone() });
        s.devices.push(ramtorch_proto::v1::DeviceInfo { name: "cpu:0".into(), ..s.devices[0].clone() });
        let page = page(&s, &RpcCounters::default());
        for (source, code) in [(Source::Xid, 48), (Source::Xid, 79), (Source::Cuda, 700), (Source::Cuda, 123_456)] {
            for device in [0, 1] {
                let label = GpuError { device, source, code }.label();
                let count = if (device, code) == (0, 79) { 2 } else { 0 };
                let line = format!(
                    "ramtorch_gpu_errors_total{{device=\"cuda:{device}\",source=\"{}\",code=\"{label}\"}} {count}\n",
                    source.name()
                );
                assert!(page.contains(&line), "{line} is not in {page}");
            }
        }
        assert!(!page.contains("ramtorch_gpu_errors_total{device=\"cpu"));
        assert!(page.lines().filter(|l| l.contains("ramtorch_gpu_errors_total{")).count() < 400, "few series a GPU");
        assert!(page.contains("ramtorch_job_checkpoint_timestamp_seconds{job_id=\"abc\"} 0.001\n"), "{page}");
    }

    #[test]
    fn many_jobs_do_not_make_many_series() {
        let mut s = full();
        let job = s.jobs[0].clone();
        s.jobs = (0..1000).map(|i| JobSample { id: format!("j{i}"), ..job.clone() }).collect();
        let page = page(&s, &RpcCounters::default());
        assert_eq!(page.lines().filter(|l| l.starts_with("ramtorch_job_step{")).count(), JOBS_MAX);
    }

    /// A series' name and its labels, without their values.
    fn shape(series: &str) -> (String, BTreeSet<String>) {
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        (name.to_string(), labels.split(',').filter_map(|l| Some(l.split_once('=')?.0.to_string())).collect())
    }

    /// Series in the cases of the alerts that no page has, but for what Prometheus adds to all.
    fn series_that_are_not_exported(page: &str) -> Vec<String> {
        let exported: BTreeSet<_> = page.lines().filter(|l| !l.starts_with('#')).map(|l| shape(l.rsplit_once(' ').unwrap().0)).collect();
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/alerts.yml");
        let cases = std::fs::read_to_string(path).unwrap();
        let series = cases.lines().filter_map(|l| l.split_once("series: '")?.1.split_once('\'')).map(|(series, _)| series);
        let strange = |series: &&str| {
            let (name, mut labels) = shape(series);
            let scraped = labels.remove("job") && labels.remove("instance");
            !(scraped && (name == "up" || exported.contains(&(name, labels))))
        };
        series.filter(strange).map(String::from).collect()
    }

    /// Every metric that a file of `deploy/` names is one that is exported.
    #[test]
    fn dashboard_and_alerts_name_what_is_there() {
        let calls = RpcCounters::default();
        calls.answered(calls.begin("/ramtorch.v1.Jobs/Get"), tonic::Code::Ok, std::time::Duration::ZERO);
        let page = page(&full(), &calls);
        let known = names(&page);
        for file in ["grafana-dashboard.json", "prometheus-rules.yml"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':' || c == '-'));
            let used: BTreeSet<&str> = words.filter(|w| w.starts_with("ramtorch_")).collect();
            assert!(used.len() > 5, "{file} names {used:?}");
            for name in used {
                let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).unwrap_or(name);
                assert!(known.contains(name) || known.contains(base), "{file} names {name}, which is not exported");
            }
        }
        assert_eq!(series_that_are_not_exported(&page), Vec::<String>::new());
        let dashboard = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/grafana-dashboard.json")).unwrap();
        let dashboard: serde_json::Value = serde_json::from_slice(&dashboard).unwrap();
        assert!(dashboard["panels"].as_array().unwrap().len() >= 10);
    }
}
