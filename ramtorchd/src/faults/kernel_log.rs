//! Reads the kernel's log for Xids, on a thread of its own that nobody waits for.
//!
//! `/dev/kmsg` rather than NVML: NVML is the driver, and can hang after exactly these errors. It is readable for everybody
//! where the sysctl `kernel.dmesg_restrict` is 0, else with CAP_SYSLOG, which the unit file gives. Where it cannot be read the
//! log says so, and errors of GPUs are known by what workers report.

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// One record of the log has less than this.
const RECORD_MAX: usize = 8192;
/// The thread looks this often whether it is still wanted, in milliseconds.
const LOOK_MS: u16 = 1000;

/// An Xid in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xid {
    /// Place of the GPU: `0000:04:00`, domain, bus and device.
    pub pci: String,
    /// Code.
    pub code: u32,
    /// The rest of the line.
    pub text: String,
}

/// The thread; it ends soon after this value.
#[derive(Debug)]
pub struct Watch {
    wanted: Arc<AtomicBool>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
    }
}

impl Watch {
    /// Starts the thread; `report` is called for every Xid from now on.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn start(report: impl Fn(Xid) + Send + 'static) -> std::io::Result<Watch> {
        Self::on(Path::new("/dev/kmsg"), report)
    }

    fn on(path: &Path, report: impl Fn(Xid) + Send + 'static) -> std::io::Result<Watch> {
        let mut log = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)?;
        // What was there before this daemon is not news.
        log.seek(SeekFrom::End(0))?;
        let wanted = Arc::new(AtomicBool::new(true));
        let of_thread = wanted.clone();
        std::thread::Builder::new().name("kernel-log".into()).spawn(move || {
            if let Err(e) = read(log, &of_thread, &report) {
                tracing::warn!("the kernel's log is not read any more: {e}; errors of GPUs are known by what workers report");
            }
        })?;
        Ok(Watch { wanted })
    }
}

/// One read is one record.
fn read(mut log: File, wanted: &AtomicBool, report: &impl Fn(Xid)) -> std::io::Result<()> {
    let mut buffer = vec![0; RECORD_MAX];
    while wanted.load(Ordering::Relaxed) {
        match log.read(&mut buffer) {
            Ok(0) => std::thread::sleep(std::time::Duration::from_millis(LOOK_MS.into())),
            Ok(n) => String::from_utf8_lossy(&buffer[..n]).lines().filter_map(parse).for_each(report),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                let mut files = [PollFd::new(log.as_fd(), PollFlags::POLLIN)];
                match poll(&mut files, PollTimeout::from(LOOK_MS)) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            // EPIPE: the log went round before it was read; reading goes on with the oldest record.
            Err(e) if e.kind() == ErrorKind::BrokenPipe || e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// `4,1234,5678,-;NVRM: Xid (PCI:0000:04:00): 79, pid=1234, name=x, GPU has fallen off the bus.`
fn parse(line: &str) -> Option<Xid> {
    let rest = line.split_once("NVRM: Xid (PCI:")?.1;
    let (pci, rest) = rest.split_once("): ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let code = rest[..digits].parse().ok()?;
    let text = rest[digits..].trim_start_matches([',', ' ']).trim_end().to_string();
    // A change of the recovery action to none is good news.
    if code == 154 && text.to_ascii_lowercase().trim_end_matches('.').ends_with("(none)") {
        return None;
    }
    Some(Xid { pci: pci.to_ascii_lowercase(), code, text })
}

/// Places of the GPUs that the driver shows, in the order in which CUDA numbers them: `0000:04:00`.
pub fn places(proc: &Path) -> Vec<String> {
    let names = std::fs::read_dir(proc).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
    let mut names: Vec<String> = names.map(|n| n.split('.').next().unwrap_or_default().to_ascii_lowercase()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::mpsc;
    use std::time::Duration;

    const LOST: &str = "4,1234,5678,-;NVRM: Xid (PCI:0000:C4:00): 79, pid=1234, name=python, GPU has fallen off the bus.";

    #[test]
    fn lines_of_the_driver_are_understood() {
        let lost = Xid { pci: "0000:c4:00".into(), code: 79, text: "pid=1234, name=python, GPU has fallen off the bus.".into() };
        assert_eq!(parse(LOST), Some(lost));
        assert_eq!(parse("NVRM: Xid (PCI:0000:04:00): 31").unwrap().code, 31);
        let action = |to: &str| parse(&format!("NVRM: Xid (PCI:0000:04:00): 154, GPU recovery action changed from 0x0 (None) to {to}"));
        assert_eq!(action("0x1 (GPU Reset Required)").unwrap().code, 154);
        assert_eq!(action("0x0 (None)"), None);
        for line in ["", "usb 1-1: new device", "NVRM: Xid (PCI:0000:04:00", "NVRM: Xid (PCI:0): x", "NVRM: Xid (PCI:0): 99999999999"] {
            assert_eq!(parse(line), None, "{line}");
        }
    }

    #[test]
    fn only_what_is_new_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file.as_file(), "{LOST}").unwrap();
        let (tx, rx) = mpsc::channel();
        let watch = Watch::on(file.path(), move |x| drop(tx.send(x))).unwrap();
        let mut log = File::options().append(true).open(file.path()).unwrap();
        writeln!(log, "6,1,2,-;hello\n4,1,2,-;NVRM: Xid (PCI:0000:04:00): 13, pid=1").unwrap();
        assert_eq!(rx.recv_timeout(Duration::from_secs(10)).unwrap().code, 13);
        drop(watch);
        // The thread ends, and its end of the channel with it.
        assert!(matches!(rx.recv_timeout(Duration::from_secs(10)), Err(mpsc::RecvTimeoutError::Disconnected)));
    }

    #[test]
    fn gpus_are_in_the_order_of_the_bus() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["0000:C4:00.0", "0000:04:00.0"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        assert_eq!(places(dir.path()), ["0000:04:00", "0000:c4:00"]);
        assert!(places(Path::new("/no/such")).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_line_panics(line in ".*", code in ".*") {
            let _ = parse(&line);
            let _ = parse(&format!("NVRM: Xid (PCI:{line}): {code}"));
        }
    }
}
