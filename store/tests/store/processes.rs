//! Several processes on one segment, killed at any time. A test starts itself again as the other process: the entry point
//! is [`child`], and what it is to do stands in the environment.

use crate::common::*;
use ramtorch_store::*;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

const ROLE: &str = "RAMTORCH_STORE_TEST_ROLE";
const SEGMENT: &str = "RAMTORCH_STORE_TEST_SEGMENT";
const ARGUMENT: &str = "RAMTORCH_STORE_TEST_ARGUMENT";

/// Another process, killed when this is dropped.
struct Other(Child);

impl Other {
    /// Starts one and waits until it says that it is ready.
    fn start(role: &str, segment: &str, argument: &str) -> Other {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "processes::child", "--nocapture"]);
        command.env(ROLE, role).env(SEGMENT, segment).env(ARGUMENT, argument);
        let mut other = Other(command.stdout(Stdio::piped()).spawn().unwrap());
        let mut lines = BufReader::new(other.0.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().ends_with("ready")), "{role} ended early: {:?}", other.0.wait());
        // The pipe must stay open, and be read, for as long as the other process writes.
        std::thread::spawn(move || lines.for_each(drop));
        other
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        let status = self.0.wait().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "it ended by itself: {status}");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "entry point of the other processes"]
fn child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (segment, argument) = (std::env::var(SEGMENT).unwrap(), std::env::var(ARGUMENT).unwrap());
    match role.as_str() {
        "trainer" => train_for_ever(&segment, argument.parse().unwrap()),
        "holder" => {
            let store = Store::attach(&segment).unwrap();
            let _owner = store.claim(argument.parse().unwrap()).unwrap();
            println!("ready");
            wait_to_be_killed()
        }
        "maker" => {
            let registry = Registry::open(argument).unwrap();
            let spec = spec(1, MomentFormat::F32, GradientFormat::F32);
            registry.register(&segment, "job", 3, Layout::new(&spec).unwrap().bytes()).unwrap();
            let _store = Store::create(&segment, &spec).unwrap();
            println!("ready");
            wait_to_be_killed()
        }
        "echo" => {
            let store = Store::attach(&segment).unwrap();
            println!("ready");
            let words = store.control();
            for n in 1..=1000 {
                while words[0].load(Ordering::Acquire) != n {
                    std::thread::yield_now();
                }
                words[64].store(n, Ordering::Release);
            }
        }
        other => panic!("unknown role {other}"),
    }
}

fn wait_to_be_killed() -> ! {
    // Ends with the parent, too, whose end of standard input this is not: bounded, in case nobody kills it.
    std::thread::sleep(Duration::from_secs(120));
    panic!("nobody came")
}

/// Updates the pages of a rank step by step, slowly, checking each old page; goes on from whatever it finds.
fn train_for_ever(segment: &str, rank: u32) -> ! {
    let store = Store::attach(segment).unwrap();
    let mut owner = store.claim(rank).unwrap();
    let started = Instant::now();
    println!("ready");
    loop {
        assert!(started.elapsed() < Duration::from_secs(120), "nobody came");
        let step = owner.pages().map(|p| store.entry(p).step).min().unwrap() + 1;
        for page in owner.pages() {
            owner
                .update(page, step, |old, mut new, _| {
                    assert!(is_at(&old, step - 1), "page {page} is not at step {}", step - 1);
                    let n = new.hi.len();
                    for from in (0..n).step_by(64) {
                        fill_part(&mut new, step, from, (from + 64).min(n));
                        // Slow enough to be killed in the middle.
                        (0..2000).for_each(|_| std::hint::spin_loop());
                    }
                })
                .unwrap();
        }
    }
}

/// Every page is wholly at the step of its entry, in weights and moments. Returns the steps.
fn check_whole(store: &Store) -> Vec<u64> {
    let check = |page| {
        let range = store.layout().page_range(page);
        let mut out = vec![0.0; (range.end - range.start) as usize];
        let step = store.entry(page).step;
        store.read_at_step(range.start, Part::Weight, step, &mut out).unwrap();
        assert!(out.iter().zip(range.clone()).all(|(x, p)| *x == weight(p, step)), "page {page} is torn at step {step}");
        for (part, second) in [(Part::Moment1, false), (Part::Moment2, true)] {
            store.read_at_step(range.start, part, step, &mut out).unwrap();
            assert!(out.iter().zip(range.clone()).all(|(x, p)| *x == moment(p, step, second)), "page {page}, {part:?}, step {step}");
        }
        step
    };
    (0..store.layout().page_count()).map(check).collect()
}

/// A spare page holds the beginning of one state and the end of another: its writer was stopped in the middle.
fn has_half_written_spare(store: &Store) -> bool {
    let layout = store.layout();
    let live: Vec<u32> = (0..layout.page_count()).map(|p| store.entry(p).physical).collect();
    (0..layout.physical_count()).filter(|p| !live.contains(p)).any(|spare| {
        let at = store.page_ptrs(spare);
        // SAFETY: a whole page of bf16 halves that nobody writes, as all its writers are dead.
        let hi = unsafe { std::slice::from_raw_parts(at.hi, layout.page_parameters() as usize) };
        let is_of =
            |step, i: usize| (0..layout.page_count()).any(|p| hi[i] == split::split(weight(u64::from(p) * 1024 + i as u64, step)).0);
        let last = hi.len() - 1;
        let steps = live.iter().enumerate().map(|(p, _)| store.entry(p as u32).step).max().unwrap_or(0);
        let of = |i: usize| (0..=steps + 1).rev().find(|s| is_of(*s, i));
        of(0) != of(last)
    })
}

#[test]
fn processes_killed_in_the_middle_of_updates_leave_whole_pages() {
    let segment = Segment::new();
    let mut spec = spec(2, MomentFormat::Bf16, GradientFormat::None);
    spec.blocks.truncate(1);
    spec.blocks[0].tensors[0].shape = vec![6, 1024];
    let store = Store::create(&segment.name, &spec).unwrap();
    load_all(&store);
    let (mut uneven, mut half_written, mut reads) = (0, 0, 0u32);
    let mut last = check_whole(&store);
    let mut round = 0u64;
    // A busy machine may not let a process come far before it is killed: go on until enough were caught in the middle.
    while round < 20 || uneven < 5 || half_written < 5 {
        assert!(round < 400, "of {round} kills, {uneven} fell between pages, {half_written} within one");
        round += 1;
        let others = [Other::start("trainer", &segment.name, "0"), Other::start("trainer", &segment.name, "1")];
        let stop = Instant::now() + Duration::from_micros(500 + round * 7919 % 20_000);
        let mut out = vec![0.0; 1024];
        while Instant::now() < stop {
            let page = u64::from(reads % store.layout().page_count());
            reads += 1;
            match store.read(page * 1024, Part::Weight, &mut out) {
                Ok(step) => assert!(out.iter().zip(page * 1024..).all(|(x, p)| *x == weight(p, step)), "page {page} torn at step {step}"),
                Err(StoreError::Busy(_)) => {}
                Err(e) => panic!("{e}"),
            }
        }
        others.into_iter().for_each(Other::kill);
        let steps = check_whole(&store);
        assert!(steps.iter().zip(&last).all(|(now, before)| now >= before), "{last:?} → {steps:?}");
        uneven += u32::from(steps.iter().any(|s| *s != steps[0]));
        half_written += u32::from(has_half_written_spare(&store));
        // The claims died with their holders, and a successor finishes the step.
        let step = *steps.iter().max().unwrap();
        for rank in 0..2 {
            let mut owner = store.claim(rank).unwrap();
            for page in owner.pages() {
                for step in store.entry(page).step + 1..=step {
                    owner.update(page, step, |_, new, _| fill(new, step)).unwrap();
                }
            }
        }
        last = check_whole(&store);
        assert!(last.iter().all(|s| *s == step));
    }
    assert!(last[0] > 5, "{last:?}: hardly any step was made");
}

#[test]
fn a_claim_holds_against_other_processes_and_dies_with_its_own() {
    let segment = Segment::new();
    let store = Store::create(&segment.name, &spec(2, MomentFormat::None, GradientFormat::None)).unwrap();
    let other = Other::start("holder", &segment.name, "1");
    assert!(matches!(store.claim(1), Err(StoreError::Claimed { rank: 1, .. })));
    assert!(store.claim(0).is_ok());
    other.kill();
    assert!(store.claim(1).is_ok());
}

#[test]
fn two_processes_meet_in_the_control_words() {
    let segment = Segment::new();
    let store = Store::create(&segment.name, &spec(1, MomentFormat::None, GradientFormat::None)).unwrap();
    let mut other = Other::start("echo", &segment.name, "");
    let deadline = Instant::now() + Duration::from_secs(60);
    for n in 1..=1000 {
        store.control()[0].store(n, Ordering::Release);
        while store.control()[64].load(Ordering::Acquire) != n {
            assert!(Instant::now() < deadline, "no answer to {n}");
            std::thread::yield_now();
        }
    }
    assert!(other.0.wait().unwrap().success());
}

#[test]
fn a_sweep_removes_what_dead_processes_left_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let registry = Registry::open(folder.path()).unwrap();
    let (left, mine, unlisted) = (Segment::new(), Segment::new(), Segment::new());
    let spec = spec(1, MomentFormat::None, GradientFormat::None);
    registry.register(&mine.name, "mine", 1, 1).unwrap();
    let _stores = [&mine, &unlisted].map(|segment| Store::create(&segment.name, &spec).unwrap());
    let other = Other::start("maker", &left.name, folder.path().to_str().unwrap());
    assert!(registry.sweep(|r| r.owner.is_alive()).unwrap().is_empty());
    let pid = other.0.id();
    other.kill();
    assert!(left.path().exists());
    let removed = registry.sweep(|r| r.owner.is_alive()).unwrap();
    let seen: Vec<_> = removed.iter().map(|r| (r.name.as_str(), r.job.as_str(), r.generation, r.owner.pid)).collect();
    assert_eq!(seen, [(left.name.as_str(), "job", 3, pid)]);
    assert_eq!((left.path().exists(), mine.path().exists(), unlisted.path().exists()), (false, true, true));
    assert_eq!(registry.list().unwrap().len(), 1);
}

/// Runs all the other tests of this file in a process of their own, and looks for what they leave.
#[test]
fn no_segment_is_left_behind() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--skip", "no_segment_is_left_behind", "--skip", "processes_killed", "--skip", "never_crash"]);
    let mut tests = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let pid = tests.id();
    let mut output = String::new();
    tests.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert!(tests.wait().unwrap().success(), "{output}");
    assert_eq!(left_behind(pid), Vec::<String>::new());
}
