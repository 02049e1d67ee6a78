//! What is known of a followed job: the newest state, the curve so far, the pace.

use super::series::Series;
use super::text;
use ramtorch_proto::v1;

/// What a message of the daemon means beside those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// Happened since the job is being followed.
    Live,
    /// Happened before.
    Replayed,
    /// Seen already, before the connection was made again.
    Repeated,
}

/// A followed job.
#[derive(Debug)]
pub(crate) struct Tracker {
    /// As last told.
    pub job: v1::Job,
    /// Newest metrics.
    pub metrics: Option<v1::Metrics>,
    /// Training loss by step.
    pub train: Series,
    /// Validation loss by step.
    pub validation: Series,
    /// Seconds a step, smoothed.
    pace: Option<f64>,
    /// Steps up to this one were committed before the job was followed.
    replay_until: u64,
    /// The next job message is the first on a new connection.
    reconnected: bool,
    /// Metrics on a new connection begin with those already seen.
    replaying: bool,
}

impl Tracker {
    pub fn new(job: v1::Job) -> Self {
        let replay_until = job.step;
        Tracker {
            metrics: None,
            train: Series::default(),
            validation: Series::default(),
            pace: None,
            replay_until,
            reconnected: false,
            replaying: false,
            job,
        }
    }

    /// The stream of messages begins again from its start.
    pub fn reconnected(&mut self) {
        self.reconnected = true;
        self.replaying = true;
    }

    /// Takes the job's new state; returns the one before.
    pub fn on_job(&mut self, job: v1::Job) -> v1::Job {
        if std::mem::take(&mut self.reconnected) && job.step < self.step() {
            // The daemon came back with an older checkpoint: what follows replaces what was seen.
            self.rewind(job.step);
        }
        std::mem::replace(&mut self.job, job)
    }

    /// Takes one step's metrics.
    pub fn on_metrics(&mut self, metrics: &v1::Metrics) -> News {
        let repeats = self.metrics.as_ref().is_some_and(|last| metrics.step <= last.step);
        match (repeats, self.replaying) {
            (true, true) => return News::Repeated,
            // The gang was started again from an older checkpoint.
            (true, false) => self.rewind(metrics.step.saturating_sub(1)),
            (false, _) => self.replaying = false,
        }
        if let Some(loss) = metrics.initial_validation_loss {
            self.validation.push(metrics.step.saturating_sub(1), loss);
        }
        if let Some(loss) = metrics.validation_loss {
            self.validation.push(metrics.step, loss);
        }
        self.train.push(metrics.step, metrics.loss);
        self.keep_pace(metrics.step_seconds);
        self.metrics = Some(metrics.clone());
        if metrics.step <= self.replay_until { News::Replayed } else { News::Live }
    }

    /// Last step known to be committed.
    pub fn step(&self) -> u64 {
        self.metrics.as_ref().map_or(self.job.step, |m| m.step)
    }

    /// Seconds that the remaining steps will take at the pace of the last ones; `None` after the last step.
    pub fn seconds_left(&self) -> Option<f64> {
        let left = self.job.steps.checked_sub(self.step()).filter(|&left| left > 0)?;
        self.pace.map(|pace| pace * left as f64)
    }

    /// Seconds from the job's start (or its submission) to its end, or to now.
    pub fn seconds_elapsed(&self) -> Option<f64> {
        let from = if self.job.started_unix_ms > 0 { self.job.started_unix_ms } else { self.job.created_unix_ms };
        let to = if self.job.ended_unix_ms > 0 { self.job.ended_unix_ms } else { text::now_unix_ms() };
        text::seconds_between(from, to)
    }

    fn keep_pace(&mut self, seconds: f64) {
        if seconds.is_finite() && seconds > 0.0 {
            // Over about twenty steps: quick enough to follow a change, slow enough to be read.
            self.pace = Some(self.pace.map_or(seconds, |pace| pace + (seconds - pace) * 0.1));
        }
    }

    fn rewind(&mut self, step: u64) {
        self.train.rewind(step);
        self.validation.rewind(step);
        if let Some(metrics) = &mut self.metrics {
            metrics.step = step;
        }
        self.replay_until = step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(step: u64) -> v1::Metrics {
        v1::Metrics { step, loss: 10.0 - step as f64, step_seconds: 2.0, ..Default::default() }
    }

    #[test]
    fn steps_are_live_replayed_or_repeated() {
        let mut tracker = Tracker::new(v1::Job { step: 2, steps: 10, ..Default::default() });
        assert_eq!(tracker.step(), 2);
        assert_eq!(tracker.on_metrics(&metrics(1)), News::Replayed);
        assert_eq!(tracker.on_metrics(&metrics(2)), News::Replayed);
        assert_eq!(tracker.on_metrics(&metrics(3)), News::Live);
        tracker.reconnected();
        tracker.on_job(v1::Job { step: 3, steps: 10, ..Default::default() });
        assert_eq!(tracker.on_metrics(&metrics(2)), News::Repeated);
        assert_eq!(tracker.on_metrics(&metrics(3)), News::Repeated);
        assert_eq!(tracker.on_metrics(&metrics(4)), News::Live);
        assert_eq!(tracker.train.points().len(), 4);
        assert_eq!(tracker.seconds_left(), Some(12.0));
    }

    #[test]
    fn a_run_that_went_back_is_drawn_anew() {
        let mut tracker = Tracker::new(v1::Job { steps: 10, ..Default::default() });
        (1..=6).for_each(|step| assert_eq!(tracker.on_metrics(&metrics(step)), News::Live));
        tracker.reconnected();
        tracker.on_job(v1::Job { step: 4, steps: 10, ..Default::default() });
        assert_eq!(tracker.train.points().len(), 4);
        assert_eq!(tracker.on_metrics(&metrics(4)), News::Repeated);
        assert_eq!(tracker.on_metrics(&metrics(5)), News::Live);
        assert_eq!(tracker.train.points().len(), 5);
    }

    #[test]
    fn a_gang_that_is_started_again_from_a_checkpoint_is_live() {
        let mut tracker = Tracker::new(v1::Job::default());
        (1..=6).for_each(|step| assert_eq!(tracker.on_metrics(&metrics(step)), News::Live));
        assert_eq!(tracker.on_metrics(&metrics(5)), News::Live);
        assert_eq!((tracker.step(), tracker.train.points().len()), (5, 5));
    }

    #[test]
    fn validation_comes_with_its_step_and_before_the_first() {
        let mut tracker = Tracker::new(v1::Job::default());
        tracker.on_metrics(&v1::Metrics { initial_validation_loss: Some(5.0), ..metrics(1) });
        tracker.on_metrics(&v1::Metrics { validation_loss: Some(3.0), ..metrics(2) });
        assert_eq!(tracker.validation.points(), [(0.0, 5.0), (2.0, 3.0)]);
    }

    #[test]
    fn nothing_is_promised_without_a_pace_or_an_end() {
        let mut tracker = Tracker::new(v1::Job { steps: 10, ..Default::default() });
        assert_eq!(tracker.seconds_left(), None);
        tracker.on_metrics(&v1::Metrics { step: 1, step_seconds: f64::NAN, ..Default::default() });
        assert_eq!(tracker.seconds_left(), None);
        tracker.on_metrics(&metrics(2));
        assert_eq!(tracker.seconds_left(), Some(16.0));
        tracker.on_job(v1::Job::default());
        assert_eq!(tracker.seconds_left(), None);
    }
}
