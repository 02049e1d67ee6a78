//! The list of all points. A test walks through it, so a point that is never reached fails a test.

/// Which process comes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// The supervisor.
    Daemon,
    /// The worker that prepares a job.
    Prepare,
    /// A member of a gang.
    Rank,
}

macro_rules! points {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $process:ident;)+) => {
        /// A place at which a process can be made to fail.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Point {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Point {
            /// Every point.
            pub const ALL: &'static [Point] = &[$(Point::$variant),+];

            /// Name in the environment variable.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Point::$variant => $name,)+
                }
            }

            /// Who comes by in the life of a job.
            pub const fn process(self) -> Process {
                match self {
                    $(Point::$variant => Process::$process,)+
                }
            }
        }
    };
}

points! {
    // The registry of segments.
    /// Before a registration is written.
    RegistryBegun = "registry.begun", Daemon;
    /// It is on the disk under a temporary name.
    RegistryWritten = "registry.written", Daemon;
    /// It has its name; the folder is not on the disk yet.
    RegistryRenamed = "registry.renamed", Daemon;
    /// All of it is durable.
    RegistryDurable = "registry.durable", Daemon;
    /// Before a registration is removed.
    RegistryForgetting = "registry.forgetting", Daemon;
    /// It is removed.
    RegistryForgotten = "registry.forgotten", Daemon;

    // A segment.
    /// The object is there, empty.
    SegmentCreated = "segment.created", Daemon;
    /// All of its pages are reserved.
    SegmentReserved = "segment.reserved", Daemon;
    /// It is described, but for the magic number.
    SegmentDescribed = "segment.described", Daemon;
    /// It is whole.
    SegmentWhole = "segment.whole", Daemon;
    /// Before its name is taken away.
    SegmentUnlinking = "segment.unlinking", Daemon;
    /// It has no name any more.
    SegmentUnlinked = "segment.unlinked", Daemon;

    // A job's durable record.
    /// Before it is written.
    RecordBegun = "record.begun", Daemon;
    /// It is on the disk under a temporary name.
    RecordWritten = "record.written", Daemon;
    /// It has its name; the folder is not on the disk yet.
    RecordRenamed = "record.renamed", Daemon;
    /// All of it is durable.
    RecordDurable = "record.durable", Daemon;

    // A job's states, before the change is made durable.
    /// A new job is in the books.
    JobSubmitted = "job.submitted", Daemon;
    /// Preparing.
    JobPreparing = "job.preparing", Daemon;
    /// Planning.
    JobPlanning = "job.planning", Daemon;
    /// Reserving.
    JobReserving = "job.reserving", Daemon;
    /// Starting.
    JobStarting = "job.starting", Daemon;
    /// Running.
    JobRunning = "job.running", Daemon;
    /// A step was reported.
    JobStep = "job.step", Daemon;
    /// Failing.
    JobFailing = "job.failing", Daemon;
    /// The gang is gone and will be started again.
    JobBackoff = "job.backoff", Daemon;
    /// Cancelling was asked for.
    JobCancelling = "job.cancelling", Daemon;
    /// That is durable, and not answered.
    JobCancelled = "job.cancelled", Daemon;
    /// Removing.
    JobRemoving = "job.removing", Daemon;
    /// Ended.
    JobEnded = "job.ended", Daemon;
    /// Back in the queue, because the daemon stops.
    JobRequeued = "job.requeued", Daemon;

    // Processes, and what an earlier daemon left.
    /// Before a worker is started.
    WorkerSpawning = "worker.spawning", Daemon;
    /// It runs, and nobody was told.
    WorkerSpawned = "worker.spawned", Daemon;
    /// The records of an earlier daemon are read, its survivors not ended.
    RecoveryRead = "recovery.read", Daemon;
    /// Survivors are ended, segments not swept.
    RecoveryEnded = "recovery.ended", Daemon;
    /// Segments are swept, jobs not adopted.
    RecoverySwept = "recovery.swept", Daemon;

    // The preparing worker.
    /// What is to be trained is known, and not told.
    Prepared = "prepare.done", Prepare;

    // A rank's life.
    /// Before its first call.
    RankBorn = "rank.born", Rank;
    /// It has registered.
    RankRegistered = "rank.registered", Rank;
    /// A page got its first contents.
    LoadPage = "load.page", Rank;
    /// All pages of the rank have.
    LoadFilled = "load.filled", Rank;
    /// The record says so.
    LoadRecorded = "load.recorded", Rank;
    /// The model folder is written, and not told.
    ExportDone = "export.done", Rank;
    /// Its result is told; it has not exited.
    RankDone = "rank.done", Rank;

    // A page.
    /// A spare is taken.
    PageBegun = "page.begun", Rank;
    /// The new state is whole, and not published.
    PageWritten = "page.written", Rank;
    /// It is published.
    PagePublished = "page.published", Rank;

    // The step record.
    /// Before it is written.
    StepRecordBegun = "step-record.begun", Rank;
    /// The spare slot is filled, and not selected.
    StepRecordFilled = "step-record.filled", Rank;
    /// It is selected.
    StepRecordPublished = "step-record.published", Rank;

    // A step.
    /// The forward sweep is enqueued; no gradient has left the device.
    StepForward = "step.forward", Rank;
    /// Gradients of a block's pages are about to be overwritten by those of the next step.
    StepLeaving = "step.leaving", Rank;
    /// This rank's gradients are complete.
    StepSwept = "step.swept", Rank;
    /// Those of all ranks are.
    StepReduced = "step.reduced", Rank;
    /// Loss, norm and wishes are agreed.
    StepAgreed = "step.agreed", Rank;
    /// The record says that gradients are complete.
    StepRecorded = "step.recorded", Rank;
    /// Every rank knows.
    StepAnnounced = "step.announced", Rank;
    /// Before the first page is updated.
    OptimizerBegun = "optimizer.begun", Rank;
    /// This rank's pages are updated.
    OptimizerUpdated = "optimizer.updated", Rank;
    /// Those of all ranks are.
    OptimizerAgreed = "optimizer.agreed", Rank;
    /// The record says that the step is committed; its line is not written.
    StepCommitted = "step.committed", Rank;
    /// Its line is in the job's own file; not in the user's.
    StepNoted = "step.noted", Rank;
    /// Its line is.
    StepReported = "step.reported", Rank;
    /// A validation is done; the line is not written.
    ValidationDone = "validation.done", Rank;

    // Pages that are updated beside the backward pass.
    /// The record says that pages may be ahead of the step's gradients.
    StepUpdating = "step.updating", Rank;
    /// A page's gradients are whole; it is not begun.
    EarlyBegun = "early.begun", Rank;
    /// Its new state is whole and its old weights are where its gradients were; it is not published.
    EarlyKept = "early.kept", Rank;
    /// It is published.
    EarlyPublished = "early.published", Rank;
    /// No more pages are updated before the step's gradients are complete.
    EarlyClosed = "early.closed", Rank;

    // After a death among them.
    /// The step is to be run again with the weights that it began with.
    RerunBegun = "rerun.begun", Rank;
    /// Weights of a page that is ahead went to the device from where its gradients were.
    RerunLoaded = "rerun.loaded", Rank;
    /// Gradients of such a page were not stored.
    RerunDropped = "rerun.dropped", Rank;

    // After a death.
    /// An update that a device had made, and not written back, is made again.
    RecoverReplayed = "recover.replayed", Rank;
    /// An interrupted step is to be finished.
    RecoverBegun = "recover.begun", Rank;
    /// This rank's pages are updated.
    RecoverUpdated = "recover.updated", Rank;
    /// The record says that it is committed.
    RecoverRecorded = "recover.recorded", Rank;

    // A checkpoint.
    /// The state of its step is held; nothing is copied.
    CheckpointPinned = "checkpoint.pinned", Rank;
    /// A page is copied, or written, and let go.
    CheckpointPage = "checkpoint.page", Rank;
    /// All pages of the rank are; not all of them are on the disk.
    CheckpointCopied = "checkpoint.copied", Rank;
    /// It was begun: its files are there, without content.
    CheckpointBegun = "checkpoint.begun", Rank;
    /// This rank's part is on the disk.
    CheckpointShard = "checkpoint.shard", Rank;
    /// Those of all ranks are; it has no name.
    CheckpointAgreed = "checkpoint.agreed", Rank;
    /// It is noted that there may be one.
    CheckpointNoted = "checkpoint.noted", Rank;
    /// It has its name.
    CheckpointNamed = "checkpoint.named", Rank;
    /// `latest` names it; older ones are not removed.
    CheckpointLatest = "checkpoint.latest", Rank;
    /// It is done, and not told.
    CheckpointDone = "checkpoint.done", Rank;
    /// Before any single change of the file system by a checkpoint or an export.
    FileChange = "file.change", Rank;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_plain() {
        let names: std::collections::HashSet<_> = Point::ALL.iter().map(|p| p.name()).collect();
        assert_eq!(names.len(), Point::ALL.len());
        let plain = |c: char| c.is_ascii_lowercase() || c == '.' || c == '-';
        assert!(names.iter().all(|n| n.chars().all(plain)), "{names:?}");
    }
}
