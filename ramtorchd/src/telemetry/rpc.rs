//! Counts of calls and of their times.

use super::exposition::{Kind, Page};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::Code;

/// Calls that are told by name; whatever else somebody calls is `other`.
const METHODS: [&str; 17] = [
    "/ramtorch.v1.Jobs/Submit",
    "/ramtorch.v1.Jobs/Get",
    "/ramtorch.v1.Jobs/List",
    "/ramtorch.v1.Jobs/Watch",
    "/ramtorch.v1.Jobs/Cancel",
    "/ramtorch.v1.Jobs/Checkpoint",
    "/ramtorch.v1.Jobs/Logs",
    "/ramtorch.v1.Jobs/Trace",
    "/ramtorch.v1.Jobs/Generate",
    "/ramtorch.v1.Jobs/Eval",
    "/ramtorch.v1.Jobs/Export",
    "/ramtorch.v1.Jobs/Inspect",
    "/ramtorch.v1.Node/Info",
    "/ramtorch.v1.Node/Plan",
    "/ramtorch.v1.Node/Shutdown",
    "/grpc.health.v1.Health/Check",
    "other",
];

/// Status codes of gRPC.
const CODES: usize = 17;
/// Upper bounds of the times, in seconds; the first answer of a stream counts as its time.
const BOUNDS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.25, 1.0, 10.0];

/// A call whose answer is awaited.
#[derive(Debug, Clone, Copy)]
pub struct Call(usize);

#[derive(Debug, Default)]
struct Counts {
    codes: [AtomicU64; CODES],
    buckets: [AtomicU64; BOUNDS.len() + 1],
    micros: AtomicU64,
}

/// Counts of all calls.
#[derive(Debug, Default)]
pub struct RpcCounters {
    methods: [Counts; METHODS.len()],
}

impl RpcCounters {
    /// A call has come.
    pub fn begin(&self, path: &str) -> Call {
        Call(METHODS.iter().position(|m| *m == path).unwrap_or(METHODS.len() - 1))
    }

    /// It was answered.
    pub fn answered(&self, call: Call, code: Code, took: Duration) {
        let counts = &self.methods[call.0];
        let code = usize::try_from(i32::from(code)).unwrap_or(2).min(CODES - 1);
        counts.codes[code].fetch_add(1, Ordering::Relaxed);
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|b| seconds <= *b).unwrap_or(BOUNDS.len());
        counts.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        counts.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Puts them on a page; calls that nobody has made yet are left out.
    pub fn write(&self, p: &mut Page) {
        const CALLS: &str = "ramtorch_rpc_calls_total";
        const TIMES: &str = "ramtorch_rpc_seconds";
        p.family(CALLS, Kind::Counter, "Calls, by method and gRPC status.");
        p.family(TIMES, Kind::Histogram, "Time to the answer; of streams, to the first.");
        for (path, counts) in METHODS.iter().zip(&self.methods) {
            // Service and method, without the package.
            let method = path.rsplit('.').next().unwrap_or(path);
            for (code, n) in counts.codes.iter().enumerate().map(|(c, n)| (c, n.load(Ordering::Relaxed))).filter(|(_, n)| *n > 0) {
                let code = format!("{:?}", Code::from_i32(i32::try_from(code).unwrap_or(2)));
                p.sample(CALLS, &[("method", method), ("code", &code)], n as f64);
            }
            let buckets: Vec<u64> = counts.buckets.iter().map(|b| b.load(Ordering::Relaxed)).collect();
            let total: u64 = buckets.iter().sum();
            if total == 0 {
                continue;
            }
            let mut below = 0;
            for (bound, n) in BOUNDS.iter().map(f64::to_string).chain(["+Inf".to_string()]).zip(buckets) {
                below += n;
                p.part(TIMES, "_bucket", &[("method", method), ("le", &bound)], below as f64);
            }
            p.part(TIMES, "_sum", &[("method", method)], counts.micros.load(Ordering::Relaxed) as f64 / 1e6);
            p.part(TIMES, "_count", &[("method", method)], total as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn every_call_of_the_protocol_has_a_name() {
        let set = prost_types::FileDescriptorSet::decode(ramtorch_proto::FILE_DESCRIPTOR_SET).unwrap();
        for file in set.file {
            for service in file.service.iter().filter(|s| s.name() != "Worker") {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    assert!(METHODS.contains(&path.as_str()), "{path}");
                }
            }
        }
    }

    #[test]
    fn calls_are_counted_by_status_and_time() {
        let c = RpcCounters::default();
        c.answered(c.begin("/ramtorch.v1.Jobs/Get"), Code::Ok, Duration::from_millis(3));
        c.answered(c.begin("/ramtorch.v1.Jobs/Get"), Code::NotFound, Duration::from_secs(60));
        c.answered(c.begin("/no/such"), Code::Unimplemented, Duration::ZERO);
        let mut p = Page::default();
        c.write(&mut p);
        let text = p.finish();
        for line in [
            "ramtorch_rpc_calls_total{method=\"Jobs/Get\",code=\"Ok\"} 1",
            "ramtorch_rpc_calls_total{method=\"Jobs/Get\",code=\"NotFound\"} 1",
            "ramtorch_rpc_calls_total{method=\"other\",code=\"Unimplemented\"} 1",
            "ramtorch_rpc_seconds_bucket{method=\"Jobs/Get\",le=\"0.0025\"} 0",
            "ramtorch_rpc_seconds_bucket{method=\"Jobs/Get\",le=\"0.005\"} 1",
            "ramtorch_rpc_seconds_bucket{method=\"Jobs/Get\",le=\"+Inf\"} 2",
            "ramtorch_rpc_seconds_sum{method=\"Jobs/Get\"} 60.003",
            "ramtorch_rpc_seconds_count{method=\"Jobs/Get\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(!text.contains("Jobs/List"));
    }
}
