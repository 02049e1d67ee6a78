//! What follows from errors of GPUs; the tables are in `faults`.

use super::Supervisor;
use super::proc::{Cause, Role, Sign};
use crate::faults::kept::Fault;
use crate::faults::kernel_log::{self, Xid};
use crate::faults::{GpuError, Source, Verdict};
use ramtorch_worker::{DeviceKind, Level};
use std::path::Path;
use std::time::Instant;

/// What ends a quarantine.
const RELEASE: &str = "it was reset or replaced, quarantine.json removed from the state folder and ramtorchd started again";

impl Supervisor {
    /// Weighs the errors of GPUs among the causes of a failure; those that call for it take their device out of use.
    /// The gravest verdict, if there is any; what follows is added to the text. `again`: processes of the job were there before.
    pub(super) fn judge_gpus(&mut self, causes: &[Cause], again: bool, text: &mut String) -> Option<Verdict> {
        let mut gravest = None;
        // What several signs tell of one device is one error.
        let mut seen: Vec<&GpuError> = Vec::new();
        for error in causes.iter().filter_map(|c| c.gpu.as_ref()) {
            if seen.contains(&error) {
                continue;
            }
            seen.push(error);
            // Those of the kernel's log were counted when they came.
            if error.source == Source::Cuda {
                self.count_gpu_error(error);
            }
            match error.verdict_where(again) {
                Verdict::Quarantine => {
                    let name = self.pool.spec(error.device).to_string();
                    self.put_out_of_use(error);
                    text.push_str(&format!("\n{name} is out of use until {RELEASE}: {}", error.describe()));
                    gravest = Some(Verdict::Quarantine);
                }
                Verdict::Fail if gravest != Some(Verdict::Quarantine) => {
                    text.push_str(&format!("\n{}: a restart would meet the same", error.describe()));
                    gravest = Some(Verdict::Fail);
                }
                Verdict::Restart => gravest = gravest.or(Some(Verdict::Restart)),
                Verdict::Fail | Verdict::Note => {}
            }
        }
        gravest
    }

    /// The kernel's log tells of an error.
    pub(super) fn xid(&mut self, xid: Xid, now: Instant) {
        let places = kernel_log::places(Path::new("/proc/driver/nvidia/gpus"));
        let Some(ordinal) = places.iter().position(|p| *p == xid.pci) else { return };
        self.xid_on(ordinal, &xid, now);
    }

    /// An error of the GPU with this number. Those that a worker will feel by itself are told; those that leave a GPU that
    /// cannot be used end the gang on it at once, since what runs there may hang.
    pub(super) fn xid_on(&mut self, ordinal: usize, xid: &Xid, now: Instant) {
        let index = (0..self.pool.count()).find(|i| {
            let spec = self.pool.spec(*i);
            spec.kind == DeviceKind::Cuda && usize::try_from(spec.index) == Ok(ordinal)
        });
        let Some(device) = index else { return };
        let error = GpuError { device, source: Source::Xid, code: xid.code };
        self.count_gpu_error(&error);
        let name = self.pool.spec(device).to_string();
        let text = format!("{name}: {}: {}", error.describe(), xid.text);
        let verdict = error.verdict();
        let on_it = self.procs.values().find(|p| p.device == Some(device) && matches!(p.role, Role::Rank { .. }));
        let Some((key, Role::Rank { job, rank })) = on_it.map(|p| (p.key, p.role)) else {
            tracing::warn!("{text}");
            if verdict == Verdict::Quarantine {
                self.put_out_of_use(&error);
            }
            return;
        };
        if verdict == Verdict::Quarantine {
            let cause = Cause { gpu: Some(error), ..Cause::defect(now, Sign::Gpu, text) };
            self.blame(key, job, rank, cause, now);
        } else {
            self.note(job, Level::Warn, &text, Some(rank));
        }
    }

    /// Its device is broken: for this daemon, and for those that come after it in this boot.
    fn put_out_of_use(&mut self, error: &GpuError) {
        if !self.pool.quarantine_faulty(error.device) {
            return;
        }
        let fault = Fault::new(self.pool.spec(error.device), error, self.out.boot_id(), self.out.unix_ms());
        tracing::error!("{} is out of use until {RELEASE}: {}", fault.device, fault.error);
        self.faults.push(fault);
        self.out.keep_faults(&self.faults);
    }

    /// What an earlier daemon found broken. A boot resets GPUs: what was before it counts no more.
    pub fn restore_faults(&mut self, mut faults: Vec<Fault>) {
        let known = faults.len();
        faults.retain(|f| f.boot_id == self.out.boot_id());
        for fault in &faults {
            // One that this daemon does not have now stays on the list all the same.
            let index = (0..self.pool.count()).find(|i| fault.is_of(self.pool.spec(*i)));
            if index.is_some_and(|i| self.pool.quarantine_faulty(i)) {
                tracing::error!("{} stays out of use until {RELEASE}: {}", fault.device, fault.error);
            }
        }
        self.faults = faults;
        if self.faults.len() != known {
            self.out.keep_faults(&self.faults);
        }
    }

    fn count_gpu_error(&mut self, error: &GpuError) {
        let name = self.pool.spec(error.device).to_string();
        *self.tally.gpu_errors.entry((name, error.source.name(), error.label())).or_default() += 1;
    }
}
