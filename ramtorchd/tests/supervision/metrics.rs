//! The Prometheus endpoint of a daemon at work.

use crate::bench::{Bench, wait_for, wait_state};
use crate::fake::{Act, At, Script, fault};
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::v1::JobState;
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

async fn get(address: SocketAddr, request: &str) -> String {
    let mut io = TcpStream::connect(address).await.unwrap();
    io.write_all(format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut text = String::new();
    io.read_to_string(&mut text).await.unwrap();
    text
}

fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find(|l| l.strip_prefix(series).is_some_and(|r| r.starts_with(' ')));
    line.unwrap_or_else(|| panic!("{series} is not in\n{page}")).rsplit(' ').next().unwrap().parse().unwrap()
}

pub fn trials() -> Vec<Trial> {
    vec![trial("metrics_of_a_job_that_had_a_failure", || async {
        let mut bench = Bench::new(2, Script::endless().with(fault(At::Step(3), Act::Exit(7)).rank(1).generation(1)));
        bench.settings.service.metrics.listen = Some("127.0.0.1:0".parse().unwrap());
        let mut client = bench.up().await;
        let address = bench.metrics.unwrap();
        let id = client.submit(bench.job("one", 100_000, "[checkpoint]\npath = \"c\"\n")).await.unwrap().id;
        wait_for(&mut client, &id, "some steps", |j| j.step > 5).await;
        client.checkpoint(&id).await.unwrap();
        assert!(client.get("nobody").await.is_err());
        let page = get(address, "GET /metrics").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("content-type: text/plain; version=0.0.4"), "{page}");
        assert!(value(&page, &format!("ramtorch_job_step{{job_id=\"{id}\"}}")) > 5.0);
        assert_eq!(value(&page, &format!("ramtorch_job_info{{job_id=\"{id}\",name=\"one\",state=\"running\"}}")), 1.0);
        assert_eq!(value(&page, &format!("ramtorch_job_checkpoints_total{{job_id=\"{id}\"}}")), 1.0);
        assert_eq!(value(&page, "ramtorch_jobs{state=\"running\"}"), 1.0);
        assert_eq!(value(&page, "ramtorch_restarts_total{cause=\"exited\"}"), 1.0);
        assert_eq!(value(&page, "ramtorch_segments_bytes"), f64::from(1 << 20));
        assert_eq!(value(&page, "ramtorch_device_busy{device=\"cpu:0\"}"), 1.0);
        assert_eq!(value(&page, "ramtorch_rpc_calls_total{method=\"Jobs/Get\",code=\"NotFound\"}"), 1.0);
        assert_eq!(value(&page, "ramtorch_rpc_seconds_count{method=\"Jobs/Submit\"}"), 1.0);
        for (request, status) in [("GET /", "404"), ("POST /metrics", "405"), ("GET /metrics/x", "404")] {
            assert!(get(address, request).await.starts_with(&format!("HTTP/1.1 {status}")), "{request}");
        }
        client.cancel(&id).await.unwrap();
        wait_state(&mut client, &id, JobState::Cancelled).await;
        let page = get(address, "GET /metrics").await;
        assert!(!page.contains(&id), "ended jobs make no series");
        assert_eq!(value(&page, "ramtorch_jobs{state=\"cancelled\"}"), 1.0);
        // One who opens a connection and says nothing holds up nobody.
        let _silent = TcpStream::connect(address).await.unwrap();
        assert!(get(address, "GET /metrics").await.starts_with("HTTP/1.1 200"));
        bench.end().await;
    })]
}
