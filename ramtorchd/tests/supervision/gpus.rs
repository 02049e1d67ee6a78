//! Errors of GPUs, as workers report them: restart, another device, or the end.

use crate::bench::{Bench, wait_for, wait_state};
use crate::fake::{Act, At, Script, fault};
use crate::trial;
use libtest_mimic::Trial;
use ramtorch_client::v1::JobState;
use ramtorch_client::{Client, exit};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_gpu_error_that_a_restart_mends", || async {
            let (bench, mut client) = Bench::start(2, Script::quick().with(fault(At::Step(5), Act::Cuda(719)).rank(1).generation(1))).await;
            let id = client.submit(bench.job("one", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (12, 1), "{}", job.message);
            assert!(client.info().await.unwrap().devices.iter().all(|d| d.state == "free"));
            bench.end().await;
        }),
        trial("a_gpu_that_is_broken_is_left_alone_and_a_spare_one_taken", || async {
            let script = Script::quick().with(fault(At::Step(5), Act::Cuda(214)).rank(1).generation(1));
            let (bench, mut client) = Bench::start(3, script).await;
            let id = client.submit(bench.job("one", 12, "[device]\nranks = 2\n")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (12, 1), "{}", job.message);
            let states: Vec<String> = client.info().await.unwrap().devices.into_iter().map(|d| d.state).collect();
            assert_eq!(states, ["free", "quarantined", "free"]);
            bench.end().await;
        }),
        trial("a_gpu_that_is_broken_stays_so_for_the_next_daemon", || async {
            let script = Script::quick().with(fault(At::Step(5), Act::Cuda(214)).rank(1).generation(1));
            let (mut bench, mut client) = Bench::start(3, script).await;
            let id = client.submit(bench.job("one", 12, "[device]\nranks = 2\n")).await.unwrap().id;
            wait_state(&mut client, &id, JobState::Succeeded).await;
            let file = bench.settings.state_dir.join("quarantine.json");
            let text = std::fs::read_to_string(&file).unwrap();
            assert!(text.contains("cpu:1") && text.contains("214"), "{text}");
            let states =
                async |mut client: Client| -> Vec<String> { client.info().await.unwrap().devices.into_iter().map(|d| d.state).collect() };
            for _ in 0..2 {
                bench.down().await;
                assert_eq!(states(bench.up().await).await, ["free", "quarantined", "free"]);
            }
            // Of an earlier boot; and removed by an operator.
            let mut faults: serde_json::Value = serde_json::from_str(&text).unwrap();
            faults[0]["boot_id"] = "another".into();
            bench.down().await;
            std::fs::write(&file, faults.to_string()).unwrap();
            assert_eq!(states(bench.up().await).await, ["free", "free", "free"]);
            bench.down().await;
            std::fs::write(&file, &text).unwrap();
            assert_eq!(states(bench.up().await).await, ["free", "quarantined", "free"]);
            bench.down().await;
            std::fs::remove_file(&file).unwrap();
            assert_eq!(states(bench.up().await).await, ["free", "free", "free"]);
            bench.end().await;
        }),
        trial("a_job_waits_with_its_store_where_no_spare_gpu_is_left", || async {
            let script = Script::quick().with(fault(At::Step(5), Act::Cuda(214)).rank(0).generation(1));
            let (bench, mut client) = Bench::start(1, script).await;
            let id = client.submit(bench.job("one", 12, "")).await.unwrap().id;
            let job = wait_for(&mut client, &id, "a quarantine", |j| j.state() == JobState::Queued && j.restarts == 1).await;
            assert!(!job.segment.is_empty() && job.step == 4 && job.message.contains("quarantined"), "{}", job.message);
            client.cancel(&id).await.unwrap();
            wait_state(&mut client, &id, JobState::Cancelled).await;
            bench.end().await;
        }),
        trial("memory_that_a_killed_gang_has_not_given_back_yet_is_waited_for", || async {
            // The first gang is killed; the second finds the memory of the GPU taken, and the third does not any more.
            let script = Script::quick()
                .with(fault(At::Step(5), Act::Signal(9)).rank(1).generation(1))
                .with(fault(At::Load, Act::Cuda(2)).generation(2));
            let (bench, mut client) = Bench::start(2, script).await;
            let id = client.submit(bench.job("one", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Succeeded).await;
            assert_eq!((job.step, job.restarts), (12, 2), "{}", job.message);
            bench.end().await;
        }),
        trial("a_gpu_error_that_would_come_again_ends_the_job", || async {
            let (bench, mut client) = Bench::start(1, Script::quick().with(fault(At::Load, Act::Cuda(2)))).await;
            let id = client.submit(bench.job("one", 12, "")).await.unwrap().id;
            let job = wait_state(&mut client, &id, JobState::Failed).await;
            assert_eq!((job.exit_code, job.restarts), (u32::from(exit::RESOURCES), 0), "{}", job.message);
            assert!(
                job.message.contains("CUDA_ERROR_OUT_OF_MEMORY") && job.message.contains("restart would meet the same"),
                "{}",
                job.message
            );
            bench.end().await;
        }),
    ]
}
