//! All jobs that are remembered, and ways to them that do not lead past every other one: a daemon remembers thousands that
//! have ended, and whatever happens to any job looks for those that have not.

use super::job::{Job, Phase};
use super::message::JobKey;
use std::collections::btree_map;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// Jobs by their place in the order of submission.
#[derive(Debug, Default)]
pub struct Jobs {
    all: BTreeMap<JobKey, Job>,
    by_id: HashMap<String, JobKey>,
    active: BTreeSet<JobKey>,
    /// How many of them each user has.
    by_user: HashMap<u32, usize>,
    /// Where those write.
    writers: HashMap<PathBuf, BTreeSet<JobKey>>,
    /// By the time of their end.
    ended: BTreeSet<(i64, JobKey)>,
    /// Those of them whose metrics are in memory.
    with_metrics: BTreeSet<(i64, JobKey)>,
}

impl Jobs {
    /// Takes a job in.
    pub fn insert(&mut self, job: Job) {
        let key = job.key;
        self.by_id.insert(job.record.id.clone(), key);
        if job.has_ended() {
            self.note_end(key, job.record.ended_unix_ms);
        } else {
            self.active.insert(key);
            *self.by_user.entry(job.record.uid).or_default() += 1;
            for output in &job.record.outputs {
                self.writers.entry(output.clone()).or_default().insert(key);
            }
        }
        self.all.insert(key, job);
    }

    /// A job is over, at the time in its record.
    pub fn end(&mut self, key: JobKey) {
        let Some(job) = self.all.get_mut(&key) else { return };
        job.phase = Phase::Ended;
        let at = job.record.ended_unix_ms;
        for output in &job.record.outputs {
            if let Some(keys) = self.writers.get_mut(output) {
                keys.remove(&key);
                if keys.is_empty() {
                    self.writers.remove(output);
                }
            }
        }
        if self.active.remove(&key) {
            let uid = job.record.uid;
            if let Some(own) = self.by_user.get_mut(&uid) {
                *own -= 1;
                if *own == 0 {
                    self.by_user.remove(&uid);
                }
            }
        }
        self.note_end(key, at);
    }

    fn note_end(&mut self, key: JobKey, at: i64) {
        self.ended.insert((at, key));
        self.with_metrics.insert((at, key));
    }

    /// Drops the metrics of all but the newest `recent` ended jobs, and forgets those beyond the newest `most`. Returns
    /// whom it forgot.
    pub fn forget_old(&mut self, recent: usize, most: usize) -> Vec<Job> {
        let kept = recent.checked_sub(1).and_then(|n| self.ended.iter().rev().nth(n).copied());
        while let Some(oldest) = self.with_metrics.first().copied() {
            if self.ended.len() <= recent || kept.is_some_and(|kept| oldest >= kept) {
                break;
            }
            self.with_metrics.remove(&oldest);
            if let Some(job) = self.all.get_mut(&oldest.1) {
                // The last step stays, for the list of jobs.
                while job.history.len() > 1 {
                    job.history.pop_front();
                }
                job.history.shrink_to_fit();
            }
        }
        let mut forgotten = Vec::new();
        while self.ended.len() > most {
            let Some(oldest) = self.ended.pop_first() else { break };
            self.with_metrics.remove(&oldest);
            if let Some(job) = self.all.remove(&oldest.1) {
                self.by_id.remove(&job.record.id);
                forgotten.push(job);
            }
        }
        forgotten
    }

    /// The job with exactly this id.
    pub fn by_id(&self, id: &str) -> Option<&Job> {
        self.by_id.get(id).and_then(|key| self.all.get(key))
    }

    /// A job that has not ended and writes to this path, or is another user's and writes to a folder above it.
    pub fn writer(&self, path: &Path, uid: u32) -> Option<&Job> {
        path.ancestors().enumerate().find_map(|(above, path)| {
            let mut jobs = self.writers.get(path)?.iter().filter_map(|key| self.all.get(key));
            jobs.find(|job| above == 0 || job.record.uid != uid)
        })
    }

    /// One job.
    pub fn get(&self, key: &JobKey) -> Option<&Job> {
        self.all.get(key)
    }

    /// One job. Its end is told with [`Jobs::end`].
    pub fn get_mut(&mut self, key: &JobKey) -> Option<&mut Job> {
        self.all.get_mut(key)
    }

    /// All of them, oldest first.
    pub fn values(&self) -> btree_map::Values<'_, JobKey, Job> {
        self.all.values()
    }

    /// Those that have not ended, oldest first.
    pub fn active(&self) -> impl DoubleEndedIterator<Item = &Job> {
        self.active.iter().filter_map(|key| self.all.get(key))
    }

    /// How many have not ended.
    pub fn active_count(&self) -> usize {
        self.active.len()
    }

    /// How many of a user's have not ended.
    pub fn active_count_of(&self, uid: u32) -> usize {
        self.by_user.get(&uid).copied().unwrap_or(0)
    }

    /// Keys of those that have not ended, oldest first.
    pub fn active_keys(&self) -> Vec<JobKey> {
        self.active.iter().copied().collect()
    }

    /// That every way leads to the same jobs.
    #[cfg(any(test, fuzzing))]
    pub fn check(&self) {
        let ended: BTreeSet<_> = self.all.values().filter(|j| j.has_ended()).map(|j| (j.record.ended_unix_ms, j.key)).collect();
        let active: BTreeSet<_> = self.all.values().filter(|j| !j.has_ended()).map(|j| j.key).collect();
        assert_eq!((&ended, &active), (&self.ended, &self.active));
        let mut by_user: HashMap<u32, usize> = HashMap::new();
        active.iter().for_each(|key| *by_user.entry(self.all[key].record.uid).or_default() += 1);
        assert_eq!(by_user, self.by_user);
        let writes = |key: &JobKey| self.all[key].record.outputs.iter().map(move |o| (o, *key)).collect::<Vec<_>>();
        let wanted: BTreeSet<_> = active.iter().flat_map(writes).collect();
        let listed: BTreeSet<_> = self.writers.iter().flat_map(|(o, keys)| keys.iter().map(move |k| (o, *k))).collect();
        assert_eq!((wanted, self.writers.values().any(BTreeSet::is_empty)), (listed, false));
        assert!(self.with_metrics.is_subset(&self.ended));
        assert_eq!(self.by_id.len(), self.all.len());
        assert!(self.all.iter().all(|(key, job)| job.key == *key && self.by_id.get(&job.record.id) == Some(key)));
    }
}

#[cfg(any(test, fuzzing))]
impl std::ops::Index<&JobKey> for Jobs {
    type Output = Job;
    fn index(&self, key: &JobKey) -> &Job {
        &self.all[key]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::record::{Record, State};
    use proptest::prelude::*;
    use ramtorch_job::JobSpec;
    use ramtorch_proto::v1 as pb;

    fn job(number: u64) -> Job {
        let text =
            "name = \"a\"\n[model]\npath = \"/m\"\n[data]\nformat = \"tokens\"\ntrain = \"/t\"\n[train]\nsteps = 3\nbatch_size = 2\n";
        let spec = JobSpec::parse(text, std::path::Path::new("/"), "j").unwrap();
        let mut job = Job::new(JobKey(number), Record::new(format!("id{number}"), &spec, 0, 0), spec);
        job.record.outputs = vec!["/shared/metrics".into(), format!("/own/{number}").into()];
        job.history.extend((0..3).map(|step| pb::Metrics { step, ..Default::default() }));
        job
    }

    #[test]
    fn who_writes_where_is_known_until_the_end() {
        let mut jobs = Jobs::default();
        jobs.insert(job(1));
        let writer = |jobs: &Jobs, path: &str, uid| jobs.writer(Path::new(path), uid).map(|j| j.key.0);
        assert_eq!((writer(&jobs, "/own/1", 0), writer(&jobs, "/own/1", 7)), (Some(1), Some(1)), "of any user");
        assert_eq!((writer(&jobs, "/own/1/x/y", 0), writer(&jobs, "/own/1/x/y", 7)), (None, Some(1)), "inside, another user's");
        assert_eq!((writer(&jobs, "/own", 7), writer(&jobs, "/own/11", 7)), (None, None));
        jobs.end(JobKey(1));
        assert_eq!(writer(&jobs, "/own/1", 7), None);
        jobs.check();
    }

    proptest! {
        /// As if all ended jobs were sorted each time, whatever the clock says at their ends.
        #[test]
        fn the_newest_ended_ones_are_kept(ends in prop::collection::vec(0i64..20, 0..60), recent in 0usize..6, most in 0usize..12) {
            let mut jobs = Jobs::default();
            for number in 0..ends.len() as u64 + 3 {
                jobs.insert(job(number));
            }
            let mut left: Vec<(i64, JobKey)> = Vec::new();
            let mut whole: BTreeSet<JobKey> = BTreeSet::new();
            for (number, at) in ends.iter().enumerate() {
                let key = JobKey(number as u64);
                let record = &mut jobs.get_mut(&key).unwrap().record;
                (record.state, record.ended_unix_ms) = (State::Cancelled, *at);
                jobs.end(key);
                left.push((*at, key));
                whole.insert(key);
                left.sort_by(|a, b| b.cmp(a));
                for (_, old) in left.iter().skip(recent) {
                    whole.remove(old);
                }
                let gone: BTreeSet<JobKey> = left.split_off(most.min(left.len())).into_iter().map(|l| l.1).collect();
                let forgotten = jobs.forget_old(recent, most);
                prop_assert_eq!(forgotten.iter().map(|j| j.key).collect::<BTreeSet<_>>(), gone.clone());
                whole.retain(|k| !gone.contains(k));
                jobs.check();
                for (_, key) in &left {
                    prop_assert_eq!(jobs[key].history.len(), if whole.contains(key) { 3 } else { 1 });
                    let found = jobs.by_id(&format!("id{}", key.0)).is_some();
                    prop_assert!(found);
                }
                for key in gone {
                    let found = jobs.get(&key).is_some() || jobs.by_id(&format!("id{}", key.0)).is_some();
                    prop_assert!(!found);
                }
            }
            prop_assert_eq!(jobs.active_count(), 3);
            prop_assert_eq!(jobs.active().count(), 3);
        }
    }
}
