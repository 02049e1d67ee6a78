//! Connections that nobody uses.

use crate::bench::{Bench, LIMIT, wait_for};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::v1::{JobState, watch_event::Event};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// What a client of HTTP/2 begins with: the preface, and settings without a setting.
const BEGINNING: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Says this to the daemon and nothing more, until it closes the connection.
async fn until_closed(bench: &Bench, bytes: &[u8]) {
    let mut stream = UnixStream::connect(&bench.settings.socket).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut said = Vec::new();
    // A connection that is closed with bytes unread is reset.
    let _ = tokio::time::timeout(LIMIT, stream.read_to_end(&mut said)).await.expect("the connection is closed");
}

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_connection_without_a_call_is_closed_and_a_quiet_watch_is_not", || async {
            let mut bench = Bench::new(1, Script::endless());
            bench.settings.service.limits.connection_idle_seconds = 1.0;
            let mut client = bench.up().await;
            let first = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            wait_for(&mut client, &first, "a step", |j| j.step > 1).await;
            // Nothing happens to a job that waits.
            let waiting = client.submit(bench.job("two", 5, "")).await.unwrap().id;
            let mut watcher = bench.client().await;
            let mut quiet = watcher.watch(&waiting, 0).await.unwrap();
            let Some(Event::Job(job)) = quiet.next().await.unwrap().unwrap().event else { panic!("the job comes first") };
            assert_eq!(job.state(), JobState::Queued);
            let mut idle = bench.client().await;
            idle.info().await.unwrap();
            // They are closed after the watch was quiet for longer than they.
            for bytes in [&b""[..], &BEGINNING[..10], BEGINNING] {
                until_closed(&bench, bytes).await;
            }
            client.cancel(&waiting).await.unwrap();
            let mut states = Vec::new();
            while let Some(event) = quiet.next().await.unwrap() {
                if let Some(Event::Job(job)) = event.event {
                    states.push(job.state());
                }
            }
            assert_eq!(states.last(), Some(&JobState::Cancelled), "{states:?}");
            idle.info().await.expect("a client connects again with its next call");
            bench.end().await;
        }),
        trial("who_sends_no_calls_but_other_things_is_closed_all_the_same", || async {
            let mut bench = Bench::new(1, Script::quick());
            bench.settings.service.limits.connection_idle_seconds = 1.0;
            let _client = bench.up().await;
            let (mut read, mut write) = UnixStream::connect(&bench.settings.socket).await.unwrap().into_split();
            write.write_all(BEGINNING).await.unwrap();
            let pinging = tokio::spawn(async move {
                // A ping of eight bytes.
                let ping = b"\0\0\x08\x06\0\0\0\0\0ramtorch";
                while write.write_all(ping).await.is_ok() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
            let mut said = Vec::new();
            let _ = tokio::time::timeout(LIMIT, read.read_to_end(&mut said)).await.expect("the connection is closed");
            assert!(said.windows(8).any(|w| w == b"ramtorch"), "pings are answered meanwhile");
            tokio::time::timeout(LIMIT, pinging).await.unwrap().unwrap();
            bench.end().await;
        }),
    ]
}
