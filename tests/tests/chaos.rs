//! Random processes of the tree are killed or stopped at random times, and the run cannot be told from an undisturbed one.
//!
//! ```text
//! RAMTORCH_CHAOS_KILLS=500 RAMTORCH_CHAOS_SEED=7 cargo test -p ramtorch-tests --test chaos -- --nocapture
//! ```
//! The seed decides who gets which signal after which pause; the machine decides what they were doing then.
//! `RAMTORCH_CHAOS_STEPS` is the length of each run, `RAMTORCH_CHAOS_DEVICES` what it runs on (`cpu:2`; `cuda:0`, say, on a machine
//! that has one), `RAMTORCH_CHAOS_PATIENCE` the seconds that a recovery may take before the next death comes in any case, and
//! `RAMTORCH_CHAOS_SUMMARY` a file for the summary. With `RAMTORCH_CHAOS_EARLY=1` pages are updated beside the backward
//! pass; with `RAMTORCH_CHAOS_HELD=N` state is held on the devices and written back at every N-th step.
#![allow(clippy::unwrap_used)]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ramtorch_tests::chance::{Random, setting, text};
use ramtorch_tests::disturbed::{Immortal, Outcome, TWO_CPUS, everything};
use ramtorch_tests::{Daemon, Sandbox};
use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A death whose end is waited for.
struct Death {
    of: &'static str,
    at: Instant,
    /// Workers of that time.
    gang: Vec<Pid>,
    /// Length of the metrics file once all of them were gone.
    bytes: Option<u64>,
}

#[derive(Default)]
struct Tally {
    /// Signals sent, by kind.
    sent: BTreeMap<&'static str, u64>,
    /// Seconds from a death to the first new step, by who died.
    recovered: BTreeMap<&'static str, Vec<f64>>,
    kills: u64,
    daemons: usize,
}

struct Chaos<'a> {
    random: &'a mut Random,
    tally: &'a mut Tally,
    metrics: PathBuf,
    /// Seconds that it may take to recover.
    patience: u64,
    next: Instant,
    death: Option<Death>,
}

impl Chaos<'_> {
    /// Called every few milliseconds.
    fn turn(&mut self, sandbox: &Sandbox, daemon: &mut Daemon<'_>) {
        let now = Instant::now();
        let workers = || -> Vec<Pid> {
            let running = sandbox.processes();
            running.iter().filter(|(_, line)| line.trim_end().ends_with(" worker")).map(|(pid, _)| Pid::from_raw(*pid)).collect()
        };
        let length = || std::fs::metadata(&self.metrics).map_or(0, |m| m.len());
        if let Some(death) = self.death.as_mut().filter(|d| d.bytes.is_none()) {
            let now = workers();
            if !death.gang.iter().any(|pid| now.contains(pid)) {
                death.bytes = Some(length());
            }
        }
        // What was written before that may be the old gang's.
        if let Some(death) = self.death.take_if(|d| d.bytes.is_some_and(|bytes| lines_from(&self.metrics, bytes) > 0)) {
            self.tally.recovered.entry(death.of).or_default().push(death.at.elapsed().as_secs_f64());
            self.next = now + self.random.pause(150);
        }
        // Mostly it may recover first; sometimes the next death comes while it does.
        let early = self.random.below(130 * self.patience.max(1)) == 0;
        let patience = if early { Duration::ZERO } else { Duration::from_secs(self.patience) };
        if now < self.next || self.death.as_ref().is_some_and(|d| d.at.elapsed() < patience) {
            return;
        }
        let supervisor = daemon.process().pid();
        let workers = workers();
        let strike_supervisor = workers.is_empty() || self.random.below(3) == 0;
        let victim = if strike_supervisor { supervisor } else { workers[self.random.below(workers.len() as u64) as usize] };
        if self.random.below(8) == 0 {
            // It may be dead already: then this was no fault.
            if kill(victim, Signal::SIGSTOP).is_ok() {
                let pause = self.random.pause(1500);
                std::thread::spawn(move || {
                    std::thread::sleep(pause);
                    let _ = kill(victim, Signal::SIGCONT);
                });
                *self.tally.sent.entry(if strike_supervisor { "supervisor stopped" } else { "worker stopped" }).or_default() += 1;
            }
            self.next = now + self.random.pause(600);
            return;
        }
        if kill(victim, Signal::SIGKILL).is_ok() {
            let of = if strike_supervisor { "supervisor killed" } else { "worker killed" };
            *self.tally.sent.entry(of).or_default() += 1;
            self.tally.kills += 1;
            self.death = Some(Death { of, at: Instant::now(), gang: workers, bytes: None });
        }
        self.next = now + self.random.pause(150);
    }
}

/// Whole lines of a file from an offset.
fn lines_from(path: &Path, offset: u64) -> usize {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(path)?;
        file.seek(SeekFrom::Start(offset))?;
        let mut bytes = Vec::new();
        file.take(1 << 16).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().unwrap_or_default().iter().filter(|b| **b == b'\n').count()
}

fn summary(seed: u64, steps: u64, runs: u64, devices: &str, tally: &Tally, elapsed: Duration) -> String {
    let mut text = format!(
        "chaos: seed {seed}, {} kills in {:.0} s over {runs} runs of {steps} steps on {devices}, {} daemons\n",
        tally.kills,
        elapsed.as_secs_f64(),
        tally.daemons
    );
    for (kind, count) in &tally.sent {
        text += &format!("  {kind}: {count}\n");
    }
    for (kind, times) in &tally.recovered {
        let mut times = times.clone();
        times.sort_by(f64::total_cmp);
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        text += &format!(
            "  {kind}, to the first new step: median {:.2} s, 95 % {:.2} s, most {:.2} s ({} measured)\n",
            at(0.5),
            at(0.95),
            at(1.0),
            times.len()
        );
    }
    text + &format!("  steps compared: {}, lost: 0; bytes lost: 0; processes, segments, files left: 0\n", steps * runs)
}

#[test]
fn random_deaths_leave_no_trace() {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let (seed, kills) = (setting("RAMTORCH_CHAOS_SEED", clock), setting("RAMTORCH_CHAOS_KILLS", 12));
    let (steps, patience) = (setting("RAMTORCH_CHAOS_STEPS", 600), setting("RAMTORCH_CHAOS_PATIENCE", 3));
    let devices = text("RAMTORCH_CHAOS_DEVICES", TWO_CPUS);
    // Shown when the test fails, too.
    eprintln!("RAMTORCH_CHAOS_SEED={seed} RAMTORCH_CHAOS_KILLS={kills} RAMTORCH_CHAOS_STEPS={steps}");
    let mut job = everything(steps as usize).set("checkpoint.every_steps", 150u64).set("train.validate_every", 100u64);
    if setting("RAMTORCH_CHAOS_EARLY", 0) > 0 {
        job = job.set("optimizer.clip_norm", 0.0).set("optimizer.early_updates", true);
    }
    let held = setting("RAMTORCH_CHAOS_HELD", 0);
    if held > 0 {
        job = job.set("train.precision", "bf16").set("train.gather_weights", true);
    }
    let whole = Outcome::undisturbed_on(&job, &devices);
    if held > 0 {
        job = job.set("train.held_state_gib", 1).set("train.write_back_steps", held);
    }
    let (mut random, mut tally, mut runs) = (Random(seed), Tally::default(), 0);
    let begun = Instant::now();
    while tally.kills < kills {
        let sandbox = Sandbox::new();
        let mut daemon = Immortal::start_on(&sandbox, &devices, &[]);
        let id = daemon.submit(&job);
        let first = Instant::now() + random.pause(300);
        let metrics = sandbox.path("metrics.jsonl");
        let mut chaos = Chaos { random: &mut random, tally: &mut tally, metrics, patience, next: first, death: None };
        let end = daemon.wait(&id, Duration::from_secs(600), |d| chaos.turn(&sandbox, d));
        assert_eq!(end["state"], "succeeded", "{end:#}");
        tally.daemons += daemon.lives;
        daemon.stop();
        Outcome::read(&sandbox).assert_same(&whole, &format!("run {runs} of seed {seed}"));
        runs += 1;
        eprintln!("run {runs}: {} kills so far", tally.kills);
        // After each run: what was survived counts, too, where the next is ended by a time limit.
        let text = summary(seed, steps, runs, &devices, &tally, begun.elapsed());
        if let Some(path) = std::env::var_os("RAMTORCH_CHAOS_SUMMARY") {
            std::fs::write(path, &text).unwrap();
        }
        if tally.kills >= kills {
            eprint!("{text}");
        }
    }
}
