//! Lines of metrics over deaths, gaps, full disks, and files that are somebody else's.

use super::*;
use crate::api::{Command, RankTrace};
use std::cell::RefCell;
use std::collections::HashMap;

thread_local! {
    /// Bytes that still go into a file whose disk is full.
    static ROOM: RefCell<HashMap<PathBuf, usize>> = RefCell::default();
}

/// Fails as a full disk does.
pub(super) fn room_for(path: &Path, bytes: usize) -> std::io::Result<()> {
    ROOM.with_borrow(|room| match room.get(path) {
        Some(room) if *room < bytes => Err(nix::errno::Errno::ENOSPC.into()),
        _ => Ok(()),
    })
}

/// What of a write goes into the file nevertheless.
pub(super) fn take_room(path: &Path) -> usize {
    ROOM.with_borrow_mut(|room| room.get_mut(path).map_or(0, std::mem::take))
}

fn full(path: &Path, room: usize) {
    ROOM.with_borrow_mut(|rooms| rooms.insert(path.into(), room));
}

fn has_room_again(path: &Path) {
    ROOM.with_borrow_mut(|rooms| rooms.remove(path));
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl Control for Heard {
    fn heartbeat(&self, _: u64, _: &'static str) {}
    fn metrics(&self, _: &StepMetrics, _: &str) {}
    fn event(&self, _: Level, text: &str) {
        self.0.lock().unwrap().push(text.into());
    }
    fn progress(&self, _: &str, _: u64, _: u64) {}
    fn token(&self, _: usize, _: &str) {}
    fn checkpoint(&self, _: &Path, _: u64, _: u64, _: Option<&str>) {}
    fn trace(&self, _: u64, _: RankTrace) {}
    fn command(&self) -> Option<Command> {
        None
    }
}

fn numbers(step: u64) -> StepNumbers {
    StepNumbers { step, loss: 1.0 / step as f64, tokens: 7, tokens_total: 7 * step, validation_loss: f64::NAN, ..Default::default() }
}

fn line(step: u64) -> String {
    String::from_utf8(encode(&numbers(step).metrics()).unwrap()).unwrap()
}

fn lines(steps: impl IntoIterator<Item = u64>) -> String {
    steps.into_iter().map(line).collect()
}

/// A folder with both files; `None` where one is not there.
fn folder(own: Option<&str>, user: Option<&str>) -> (tempfile::TempDir, History, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let (history, path) = (History { path: dir.path().join("own"), told: 0 }, dir.path().join("m/user"));
    std::fs::create_dir(dir.path().join("m")).unwrap();
    for (path, text) in [(&history.path, own), (&path, user)] {
        text.into_iter().for_each(|text| std::fs::write(path, text).unwrap());
    }
    (dir, history, path)
}

fn kept(text: &str, committed: u64) -> Option<(String, u64)> {
    let kept = survey(text.as_bytes(), committed, true).ok()?;
    Some((text[..kept.bytes].to_string(), kept.last))
}

#[test]
fn only_lines_past_the_committed_step_and_torn_ones_go() {
    for first in [1, 101] {
        let whole = lines(first..first + 3);
        for tail in [String::new(), line(first + 3)[..9].into(), line(first + 3).trim_end().into(), "\0\0\0".into(), "{\"st".into()] {
            let text = whole.clone() + &tail;
            for committed in first - 1..first + 4 {
                let last = if committed < first { 0 } else { committed.min(first + 2) };
                let expected = lines(first..=committed.min(first + 2));
                assert_eq!(kept(&text, committed), Some((expected, last)), "{committed} of {text:?}");
            }
        }
    }
    assert_eq!(kept("", 9), Some((String::new(), 0)));
}

/// A run that goes on from a checkpoint of step 100 with a file that ends with step 2 writes 101 next.
#[test]
fn lines_after_a_gap_are_kept() {
    let text = lines([1, 2, 101, 102]);
    assert_eq!(kept(&text, 102), Some((text.clone(), 102)));
    assert_eq!(kept(&text, 101), Some((lines([1, 2, 101]), 101)));
}

#[test]
fn what_is_not_ours_is_refused() {
    let not_ours = ["hello\n", "hello", "{\"step\":1}\n", "{\"step\":1,\"loss\":2.0,\"learning_rate\":3}\n", "\n", "{\"step\":x", "[]"];
    for text in not_ours {
        for before in [String::new(), lines(1..4)] {
            for committed in [0, 2, 9] {
                assert_eq!(kept(&(before.clone() + text), committed), None, "{text:?}");
            }
        }
    }
    assert_eq!(kept(&lines([1, 2, 2]), 9), None);
    let (_dir, history, path) = folder(None, Some("# my results\nloss 2\n"));
    let (e, heard) = (check(&path, 9).unwrap_err(), Heard::default());
    assert_eq!(e.kind, ErrorKind::Output);
    let mut metrics = Metrics::open(Some(&path), &history, 9, &heard).unwrap();
    metrics.write(&numbers(10).metrics(), &heard).unwrap();
    assert_eq!(std::fs::read_to_string(&history.path).unwrap(), line(10));
    for text in [&e.message, &heard.0.lock().unwrap()[0]] {
        assert!(text.contains(path.to_str().unwrap()) && text.contains("# my results"), "{text}");
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "# my results\nloss 2\n");
}

#[test]
fn a_death_before_a_line_costs_none() {
    // The step was committed; died before the first write, before the second, and after both.
    for (own, user) in [(15, 15), (16, 15), (16, 16)] {
        let (_dir, history, path) = folder(Some(&lines(13..=own)), Some(&lines(1..=user)));
        let mut metrics = Metrics::open(Some(&path), &history, 16, &Heard::default()).unwrap();
        assert_eq!(metrics.lacks(&numbers(16)), own == 15);
        metrics.add_missing(&numbers(16), &Heard::default()).unwrap();
        let told: Vec<u64> = metrics.untold(14, 16).iter().map(|(m, _)| m.step).collect();
        assert_eq!(told, [15, 16]);
        metrics.write(&numbers(17).metrics(), &Heard::default()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=17));
        assert_eq!(std::fs::read_to_string(&history.path).unwrap(), lines(13..=17));
    }
    // The very first line of a run that goes on with an empty file, or none.
    let (_dir, history, path) = folder(None, None);
    let mut metrics = Metrics::open(Some(&path), &history, 13, &Heard::default()).unwrap();
    metrics.add_missing(&numbers(13), &Heard::default()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), line(13));
    assert_eq!(metrics.untold(0, 13).len(), 1);
}

#[test]
fn the_line_of_a_loaded_step_is_written_where_all_before_it_are() {
    let loaded = StepNumbers { loaded: true, ..numbers(10) };
    for (own, user, expected) in [("", "", ""), ("", &lines(1..=9)[..], &lines(1..=10)[..]), ("", &lines(1..=8)[..], &lines(1..=8)[..])] {
        let (_dir, history, path) = folder(Some(own), Some(user));
        let heard = Heard::default();
        let mut metrics = Metrics::open(Some(&path), &history, 10, &heard).unwrap();
        metrics.add_missing(&loaded, &heard).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), expected);
        assert_eq!(std::fs::read_to_string(&history.path).unwrap(), "", "another job ran it");
        assert_eq!(heard.0.lock().unwrap().len(), usize::from(user == lines(1..=8)), "a gap is told");
    }
}

#[test]
fn the_jobs_own_file_brings_back_what_the_users_lost() {
    let (_dir, history, path) = folder(Some(&(lines(3..=8) + &line(9)[..20])), None);
    let mut metrics = Metrics::open(Some(&path), &history, 8, &Heard::default()).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(3..=8));
    assert!(!metrics.lacks(&numbers(8)));
    assert_eq!(metrics.untold(8, 8), []);
    metrics.durable().sync(&Heard::default());
    assert_eq!(metrics.durable().files().len(), 2);
}

/// Lines of an earlier version's daemon had steps twice where they were run again.
#[test]
fn the_jobs_own_file_is_never_refused() {
    for (text, committed, left) in [
        (lines([1, 2, 3, 2, 3]), 2, lines([1, 2, 3, 2])),
        ("what is this".to_string(), 2, String::new()),
        (line(1) + "x\n" + &line(2), 2, line(1) + "x\n" + &line(2)),
    ] {
        let (_dir, history, _) = folder(Some(&text), None);
        let mut metrics = Metrics::open(None, &history, committed, &Heard::default()).unwrap();
        assert_eq!(std::fs::read_to_string(&history.path).unwrap(), left);
        metrics.untold(0, committed);
    }
    let history = History { path: "/proc/none/own".into(), told: 0 };
    let heard = Heard::default();
    let mut metrics = Metrics::open(None, &history, 1, &heard).unwrap();
    assert!(heard.0.lock().unwrap()[0].contains("/proc/none/own"));
    metrics.write(&numbers(2).metrics(), &heard).unwrap();
}

#[test]
fn a_full_disk_costs_the_users_file_no_line() {
    for room in [0, 1, 30] {
        let (_dir, history, path) = folder(None, None);
        let heard = Heard::default();
        let mut metrics = Metrics::open(Some(&path), &history, 0, &heard).unwrap();
        let write = |metrics: &mut Metrics, step| metrics.write(&numbers(step).metrics(), &heard).map(drop).unwrap();
        (1..=3).for_each(|step| write(&mut metrics, step));
        full(&path, room);
        (4..=6).for_each(|step| write(&mut metrics, step));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=3), "nothing torn");
        has_room_again(&path);
        write(&mut metrics, 7);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=7));
        write(&mut metrics, 8);
        full(&path, room);
        write(&mut metrics, 9);
        // Another gang, on a disk that is still full, and a third.
        for committed in [9, 10] {
            drop(metrics);
            metrics = Metrics::open(Some(&path), &history, committed, &heard).unwrap();
            metrics.add_missing(&numbers(committed), &heard).unwrap();
            metrics.untold(0, committed);
            write(&mut metrics, committed + 1);
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=8));
        has_room_again(&path);
        metrics.close(&heard);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=11));
        assert_eq!(std::fs::read_to_string(&history.path).unwrap(), lines(1..=11));
        let heard = heard.0.lock().unwrap();
        assert_eq!(heard.len(), 6, "once for the worse in each gang, once for the better: {heard:?}");
        assert!(heard[0].contains("No space left") && heard[0].contains("goes on") && heard[1].contains("again"), "{heard:?}");
    }
}

#[test]
fn a_file_that_cannot_be_made_yet_is_made_later() {
    let (_dir, history, path) = folder(Some(&lines(1..=3)), None);
    let heard = Heard::default();
    full(&path, 0);
    let mut metrics = Metrics::open(Some(&path), &history, 4, &heard).unwrap();
    assert!(metrics.lacks(&numbers(4)));
    metrics.add_missing(&numbers(4), &heard).unwrap();
    metrics.untold(0, 4);
    metrics.write(&numbers(5).metrics(), &heard).unwrap();
    assert_eq!(metrics.durable().files().len(), 1);
    metrics.close(&heard);
    has_room_again(&path);
    metrics.write(&numbers(6).metrics(), &heard).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=6));
    assert_eq!(metrics.durable().files().len(), 2, "made durable from now on");
    // What is wrong with the path, and not with the disk, is told before the first step.
    let none = History { told: 0, ..history };
    assert!(Metrics::open(Some(Path::new("/proc/none/user")), &none, 0, &heard).is_err());
    let told = History { told: 3, ..none };
    assert!(Metrics::open(Some(Path::new("/proc/none/user")), &told, 6, &heard).is_ok());
}

#[test]
fn the_jobs_own_file_gets_what_it_owes() {
    let (_dir, history, path) = folder(None, None);
    let heard = Heard::default();
    let mut metrics = Metrics::open(Some(&path), &history, 0, &heard).unwrap();
    let write = |metrics: &mut Metrics, step| metrics.write(&numbers(step).metrics(), &heard).map(drop).unwrap();
    write(&mut metrics, 1);
    full(&history.path, 5);
    write(&mut metrics, 2);
    full(&path, 9);
    (3..=5).for_each(|step| write(&mut metrics, step));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=2), "it needs the other only for what it lacks");
    has_room_again(&path);
    write(&mut metrics, 6);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), lines(1..=6), "from memory");
    has_room_again(&history.path);
    write(&mut metrics, 7);
    for path in [&path, &history.path] {
        assert_eq!(std::fs::read_to_string(path).unwrap(), lines(1..=7));
    }
    // What is owed is bounded; whole lines go.
    full(&history.path, 0);
    let own = metrics.own.as_mut().unwrap();
    own.owed = lines([8]).into_bytes().repeat(OWED_MAX / lines([8]).len() + 1);
    write(&mut metrics, 9);
    let own = metrics.own.as_ref().unwrap();
    assert!(own.owed.len() <= OWED_MAX && own.owed.starts_with(b"{\"step\":8,") && own.forgot);
}

/// More than is read at a time.
#[test]
fn much_that_is_missing_is_made_up_in_pieces() {
    let all = 1..=(3 * PIECE as usize / line(1).len()) as u64;
    let (_dir, history, path) = folder(Some(&lines(all.clone())), Some(&lines(1..=7)));
    Metrics::open(Some(&path), &history, *all.end(), &Heard::default()).unwrap();
    assert!(std::fs::read_to_string(&path).unwrap() == lines(all));
}

#[test]
fn a_pipe_has_no_lines() {
    let (_dir, history, _) = folder(None, None);
    let mut metrics = Metrics::open(Some(Path::new("/dev/null")), &history, 5, &Heard::default()).unwrap();
    metrics.write(&numbers(6).metrics(), &Heard::default()).unwrap();
    assert_eq!(metrics.durable().files().len(), 1);
}
