//! Who holds which device.

use super::message::JobKey;
use crate::devices::Device;
use crate::process::ProcKey;
use ramtorch_job::JobSpec;
use ramtorch_worker::{DeviceKind, DeviceSpec, Plan};

/// Holder of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// A job's gang.
    Job(JobKey),
    /// One-off work.
    OneOff(u64),
}

/// Why a device is out of use.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Quarantine {
    /// This process of ours outlived SIGKILL on it.
    Proc(ProcKey),
    /// A process of an earlier daemon did.
    Survivor(i32),
    /// It had an error that calls for an operator.
    Fault,
}

#[derive(Debug)]
struct Slot {
    device: Device,
    holder: Option<Holder>,
    quarantine: Vec<Quarantine>,
}

/// Whether a job can have its devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lease {
    /// These, by rank.
    Now(Vec<usize>),
    /// When others have ended.
    Later,
    /// Not with the devices that this daemon has; the text says why. Jobs behind it need not wait for it.
    NotHere(String),
}

/// The daemon's devices.
#[derive(Debug)]
pub struct DevicePool {
    slots: Vec<Slot>,
}

impl DevicePool {
    /// All free.
    pub fn new(devices: Vec<Device>) -> DevicePool {
        DevicePool { slots: devices.into_iter().map(|device| Slot { device, holder: None, quarantine: Vec::new() }).collect() }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Devices for a job, without taking them. A job that goes on from a live segment needs as many as its plan has,
    /// with at least the planned memory; a new one takes all healthy ones unless the job file says how many.
    pub fn lease(&self, spec: &JobSpec, resume: Option<&Plan>) -> Lease {
        let healthy: Vec<usize> = (0..self.slots.len()).filter(|i| self.slots[*i].quarantine.is_empty()).collect();
        let wanted = match (resume, spec.device.ranks) {
            (Some(plan), _) => plan.device_bytes.len(),
            (None, Some(ranks)) => ranks,
            (None, None) => healthy.len().max(1),
        };
        if wanted > self.slots.len() {
            let what = if resume.is_some() { "its parameter store is laid out for" } else { "it asks for" };
            return Lease::NotHere(format!("{what} {wanted} device(s), and this daemon has {}", self.slots.len()));
        }
        if let Some(plan) = resume {
            let most = plan.device_bytes.iter().copied().max().unwrap_or(0);
            let have = healthy.iter().map(|i| limited(&self.slots[*i].device.spec, spec).memory_bytes).min().unwrap_or(u64::MAX);
            if have < most {
                return Lease::NotHere(format!("it was planned with {most} bytes of device memory, and this daemon gives {have}"));
            }
        }
        if wanted > healthy.len() {
            return Lease::NotHere(format!("it takes {wanted} device(s), and only {} are not quarantined", healthy.len()));
        }
        let free: Vec<usize> = healthy.into_iter().filter(|i| self.slots[*i].holder.is_none()).take(wanted).collect();
        if free.len() == wanted { Lease::Now(free) } else { Lease::Later }
    }

    /// Takes devices.
    pub fn take(&mut self, which: &[usize], holder: Holder) {
        for i in which {
            self.slots[*i].holder = Some(holder);
        }
    }

    /// Gives back everything that `holder` has.
    pub fn release(&mut self, holder: Holder) {
        for slot in self.slots.iter_mut().filter(|s| s.holder == Some(holder)) {
            slot.holder = None;
        }
    }

    /// A device with the job's own limits applied.
    pub fn spec_for(&self, index: usize, spec: &JobSpec) -> DeviceSpec {
        limited(&self.slots[index].device.spec, spec)
    }

    /// The device itself.
    pub fn spec(&self, index: usize) -> &DeviceSpec {
        &self.slots[index].device.spec
    }

    /// Kind of all devices.
    pub fn kind(&self) -> DeviceKind {
        self.slots.first().map_or(DeviceKind::Cpu, |s| s.device.spec.kind)
    }

    /// A healthy device that nobody holds.
    pub fn free(&self) -> Option<usize> {
        self.slots.iter().position(|s| s.holder.is_none() && s.quarantine.is_empty())
    }

    /// Index of the device of this name.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.slots.iter().position(|s| s.device.spec.to_string() == name)
    }

    /// Takes a device out of use while a process that cannot be ended may still be on it.
    pub fn quarantine(&mut self, index: usize, by: ProcKey) {
        self.slots[index].quarantine.push(Quarantine::Proc(by));
    }

    /// As `quarantine`, for a process of an earlier daemon.
    pub fn quarantine_survivor(&mut self, index: usize, pid: i32) {
        self.slots[index].quarantine.push(Quarantine::Survivor(pid));
    }

    /// Takes a device out of use for good: an operator has to look at it. Whether that is news.
    pub fn quarantine_faulty(&mut self, index: usize) -> bool {
        let Some(slot) = self.slots.get_mut(index) else { return false };
        let news = !slot.quarantine.contains(&Quarantine::Fault);
        if news {
            slot.quarantine.push(Quarantine::Fault);
        }
        news
    }

    /// The process is gone after all: whether a device came back into use.
    pub fn absolve(&mut self, by: ProcKey) -> bool {
        self.lift(&Quarantine::Proc(by))
    }

    /// As `absolve`, for a process of an earlier daemon.
    pub fn absolve_survivor(&mut self, pid: i32) -> bool {
        self.lift(&Quarantine::Survivor(pid))
    }

    fn lift(&mut self, by: &Quarantine) -> bool {
        let mut any = false;
        for slot in &mut self.slots {
            let before = slot.quarantine.len();
            slot.quarantine.retain(|q| q != by);
            any |= slot.quarantine.len() != before;
        }
        any
    }

    /// Whether any of these is out of use.
    pub fn any_quarantined(&self, which: &[usize]) -> bool {
        which.iter().any(|i| !self.slots[*i].quarantine.is_empty())
    }

    /// For the protocol: each device with its holder.
    pub fn each(&self) -> impl Iterator<Item = (&Device, Option<Holder>, &'static str)> {
        self.slots.iter().map(|s| {
            let state = match (&s.quarantine[..], s.holder) {
                ([_, ..], _) => "quarantined",
                ([], Some(_)) => "busy",
                ([], None) => "free",
            };
            (&s.device, s.holder, state)
        })
    }
}

fn limited(device: &DeviceSpec, spec: &JobSpec) -> DeviceSpec {
    let memory_bytes = spec.device.memory_bytes.map_or(device.memory_bytes, |limit| limit.min(device.memory_bytes));
    DeviceSpec { memory_bytes, ..device.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(n: u32) -> DevicePool {
        let spec = |index| DeviceSpec { kind: DeviceKind::Cpu, index, threads: 1, memory_bytes: 100, bus_id: None };
        DevicePool::new((0..n).map(|i| Device { spec: spec(i), model: "CPU".into() }).collect())
    }

    fn spec(ranks: Option<usize>) -> JobSpec {
        let text = "name = \"a\"\n[model]\npath = \"m\"\n[data]\nformat = \"tokens\"\ntrain = \"t\"\n[train]\nsteps = 3\nbatch_size = 2\n";
        let mut spec = JobSpec::parse(text, std::path::Path::new("/"), "j").unwrap();
        spec.device.ranks = ranks;
        spec
    }

    fn plan(device_bytes: Vec<u64>) -> Plan {
        Plan {
            parameters: 1,
            segment_bytes: 1,
            device_bytes,
            host_bytes: 1,
            step_seconds: 0.0,
            bound_by: String::new(),
            text: String::new(),
            detail: serde_json::Value::Null,
        }
    }

    #[test]
    fn jobs_take_all_devices_or_what_they_ask_for() {
        let mut p = pool(3);
        assert_eq!(p.lease(&spec(None), None), Lease::Now(vec![0, 1, 2]));
        assert_eq!(p.lease(&spec(Some(2)), None), Lease::Now(vec![0, 1]));
        p.take(&[0], Holder::Job(JobKey(1)));
        assert_eq!(p.lease(&spec(Some(2)), None), Lease::Now(vec![1, 2]));
        assert_eq!(p.lease(&spec(None), None), Lease::Later);
        p.release(Holder::Job(JobKey(1)));
        assert_eq!(p.lease(&spec(None), None), Lease::Now(vec![0, 1, 2]));
        assert!(matches!(p.lease(&spec(Some(4)), None), Lease::NotHere(_)));
    }

    #[test]
    fn quarantined_devices_are_not_given_out() {
        let mut p = pool(2);
        p.quarantine(0, ProcKey(5));
        assert_eq!(p.lease(&spec(None), None), Lease::Now(vec![1]), "a new job takes what is left");
        assert!(matches!(p.lease(&spec(None), Some(&plan(vec![1, 1]))), Lease::NotHere(_)), "a laid-out one cannot");
        assert!(!p.absolve(ProcKey(6)));
        assert!(p.absolve(ProcKey(5)));
        assert_eq!(p.lease(&spec(None), Some(&plan(vec![1, 1]))), Lease::Now(vec![0, 1]));
    }

    #[test]
    fn a_faulty_device_stays_out_of_use() {
        let mut p = pool(2);
        assert!(p.quarantine_faulty(1) && !p.quarantine_faulty(1) && !p.quarantine_faulty(7));
        p.quarantine(1, ProcKey(5));
        assert!(p.absolve(ProcKey(5)));
        assert_eq!(p.lease(&spec(None), None), Lease::Now(vec![0]), "its process is gone, its fault is not");
    }

    #[test]
    fn a_job_that_goes_on_needs_what_it_was_planned_with() {
        let p = pool(2);
        assert_eq!(p.lease(&spec(Some(2)), Some(&plan(vec![100]))), Lease::Now(vec![0]));
        assert!(matches!(p.lease(&spec(None), Some(&plan(vec![101, 1]))), Lease::NotHere(_)));
        assert!(matches!(p.lease(&spec(None), Some(&plan(vec![1; 3]))), Lease::NotHere(_)));
    }
}
