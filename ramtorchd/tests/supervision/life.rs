//! Jobs that go as they should.

use crate::bench::{Bench, wait_for, wait_state, watch};
use crate::fake::Script;
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::{exit, v1};
use v1::JobState;
use v1::watch_event::Event;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_job_from_submit_to_success", || async {
            let (bench, mut client) = Bench::start(2, Script::quick()).await;
            let job = client.submit(bench.job("one", 20, "")).await.unwrap();
            let seen = watch(&mut client, &job.id).await;
            let steps: Vec<u64> = seen.iter().filter_map(|e| if let Event::Metrics(m) = e { Some(m.step) } else { None }).collect();
            assert_eq!(steps, (1..=20).collect::<Vec<_>>());
            let mut states: Vec<JobState> =
                seen.iter().filter_map(|e| if let Event::Job(j) = e { Some(j.state()) } else { None }).collect();
            states.dedup();
            use JobState::*;
            let expected = [Preparing, Starting, Running, Succeeded];
            // The watch may begin when the first of them are past.
            assert!(expected.ends_with(&states) && states.ends_with(&[Succeeded]), "{states:?}");
            let notes = seen.iter().filter(|e| matches!(e, Event::Note(n) if n.text.contains("attached at step 0"))).count();
            assert_eq!(notes, 2);
            let end = client.get("one").await.unwrap();
            assert_eq!((end.step, end.steps, end.world_size, end.restarts, end.exit_code), (20, 20, 2, 0, 0));
            assert_eq!((end.model.as_str(), end.sample.as_str()), ("a fake", "text"));
            assert!(end.segment.is_empty() && end.ended_unix_ms >= end.started_unix_ms && end.started_unix_ms >= end.created_unix_ms);
            assert!(bench.segments().is_empty(), "the segment goes before the job counts as ended");
            bench.end().await;
        }),
        trial("while_a_job_runs_its_books_are_open", || async {
            let (bench, mut client) = Bench::start(2, Script::endless()).await;
            let id = client.submit(bench.job("one", 100_000, "")).await.unwrap().id;
            let job = wait_for(&mut client, &id, "a step", |j| j.step > 2).await;
            assert_eq!(job.state(), JobState::Running);
            assert_eq!(job.segment_bytes, job.plan.as_ref().unwrap().segment_bytes);
            assert!(std::path::Path::new("/dev/shm").join(job.segment.trim_start_matches('/')).exists());
            let workers: Vec<_> = job.workers.iter().map(|w| (w.rank, w.device.as_str())).collect();
            assert_eq!(workers, [(0, "cpu:0"), (1, "cpu:1")]);
            for worker in &job.workers {
                let group = std::fs::read_to_string(format!("/proc/{}/stat", worker.pid)).unwrap();
                let group: i32 = group.rsplit_once(')').unwrap().1.split_whitespace().nth(2).unwrap().parse().unwrap();
                assert_eq!(group, worker.pid, "its own process group");
                assert!(std::path::Path::new(&worker.log_path).exists());
            }
            let info = client.info().await.unwrap();
            assert!(info.devices.iter().all(|d| d.job == id && d.state == "busy"), "{info:?}");
            assert_eq!((info.jobs_active, info.reserved_bytes), (1, job.segment_bytes));
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            let info = client.info().await.unwrap();
            assert!(info.devices.iter().all(|d| d.state == "free") && info.reserved_bytes == 0, "{info:?}");
            bench.end().await;
        }),
        trial("jobs_wait_their_turn", || async {
            let (bench, mut client) = Bench::start(2, Script::quick()).await;
            let mut ids = Vec::new();
            for name in ["a", "b", "c"] {
                ids.push(client.submit(bench.job(name, 30, "")).await.unwrap().id);
            }
            for (name, why) in [("b", "devices"), ("c", "turn after job")] {
                let waiting = client.get(name).await.unwrap();
                assert_eq!(waiting.state(), JobState::Queued);
                assert!(waiting.message.contains(why), "{}", waiting.message);
            }
            let mut started = Vec::new();
            for id in &ids {
                started.push(wait_state(&mut client, id, JobState::Succeeded).await);
            }
            assert!(started.windows(2).all(|w| w[0].ended_unix_ms <= w[1].started_unix_ms), "one after the other");
            bench.end().await;
        }),
        trial("small_jobs_run_side_by_side_and_do_not_overtake", || async {
            let (bench, mut client) = Bench::start(2, Script::endless()).await;
            let one = "[device]\nranks = 1\n";
            let a = client.submit(bench.job("a", 100_000, one)).await.unwrap().id;
            wait_for(&mut client, &a, "a step", |j| j.step > 0).await;
            let both = client.submit(bench.job("both", 10, "")).await.unwrap().id;
            let late = client.submit(bench.job("late", 10, one)).await.unwrap().id;
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            assert_eq!(client.get(&late).await.unwrap().state(), JobState::Queued, "a small job does not starve a large one");
            client.cancel(&both).await.unwrap();
            wait_state(&mut client, &late, JobState::Succeeded).await;
            assert_eq!(client.get(&a).await.unwrap().state(), JobState::Running, "beside it");
            client.cancel(&a).await.unwrap();
            wait_state(&mut client, &a, JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("memory_that_others_hold_is_waited_for", || async {
            let mut bench = Bench::new(2, Script::endless());
            let shm = nix::sys::statvfs::statvfs("/dev/shm").unwrap();
            let free_mib = (shm.blocks_available() * shm.fragment_size()) >> 20;
            let mut client = bench.up().await;
            let one = "[device]\nranks = 1\n";
            // A sparse file takes no memory: the books alone decide. So the first has to take it really.
            let size = free_mib / 2 + 64;
            let first = client.submit(bench.job(&format!("big-{size}"), 100_000, one)).await.unwrap().id;
            let job = wait_for(&mut client, &first, "a step", |j| j.step > 0).await;
            let never = client.submit(bench.job(&format!("big-{}", (free_mib + 1024) * 64), 5, one)).await.unwrap().id;
            let failed = wait_state(&mut client, &never, JobState::Failed).await;
            assert_eq!(failed.exit_code, u32::from(exit::RESOURCES));
            assert!(failed.message.contains("do not fit"), "{}", failed.message);
            assert_eq!(job.segment_bytes, size << 20);
            client.cancel(&first).await.unwrap();
            wait_state(&mut client, &first, JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("ended_jobs_are_known_to_the_next_daemon", || async {
            let (mut bench, mut client) = Bench::start(1, Script::quick()).await;
            let id = client.submit(bench.job("kept", 25, "")).await.unwrap().id;
            wait_state(&mut client, &id, JobState::Succeeded).await;
            bench.down().await;
            let mut client = bench.up().await;
            assert!(client.list(false).await.unwrap().is_empty());
            let all = client.list(true).await.unwrap();
            assert_eq!((all.len(), all[0].step, all[0].state()), (1, 25, JobState::Succeeded));
            assert_eq!(all[0].last_metrics.as_ref().map(|m| m.loss), Some(1.0 / 25.0));
            let steps: Vec<u64> =
                watch(&mut client, &id).await.iter().filter_map(|e| if let Event::Metrics(m) = e { Some(m.step) } else { None }).collect();
            assert_eq!(steps, (1..=25).collect::<Vec<_>>(), "its history is on disk");
            bench.end().await;
        }),
        trial("the_oldest_ended_jobs_are_forgotten", || async {
            let mut bench = Bench::new(1, Script::quick());
            bench.settings.jobs.ended_max = 2;
            let mut client = bench.up().await;
            for name in ["a", "b", "c"] {
                let id = client.submit(bench.job(name, 1, "")).await.unwrap().id;
                wait_state(&mut client, &id, JobState::Succeeded).await;
            }
            let names: Vec<String> = client.list(true).await.unwrap().into_iter().map(|j| j.name).collect();
            assert_eq!(names, ["b", "c"]);
            bench.down().await;
            assert_eq!(std::fs::read_dir(bench.settings.state_dir.join("jobs")).unwrap().count(), 2);
            bench.assert_clean();
        }),
    ]
}
