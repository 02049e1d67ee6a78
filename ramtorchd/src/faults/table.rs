//! The tables. Sources:
//! - Xid: NVIDIA, "Xid Errors", <https://docs.nvidia.com/deploy/xid-errors/>, the catalog's immediate actions
//!   (RESTART_APP, RESET_GPU, RESTART_BM, IGNORE, …) for Ampere and later.
//! - CUDA: NVIDIA, "CUDA Driver API", `CUresult`, <https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TYPES.html>, which
//!   says of each whether the process has to be started again.
//!
//! A reset of a GPU needs that nobody uses it, and an operator: what calls for one is a quarantine here.

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A new process on the same device.
    Restart,
    /// Another device, until an operator has looked at this one.
    Quarantine,
    /// The end of the job: again would be the same.
    Fail,
    /// Nothing; it is told.
    Note,
}

/// A line of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Code.
    pub code: u32,
    /// Name or meaning.
    pub name: &'static str,
    /// What it calls for.
    pub verdict: Verdict,
}

const fn entry(code: u32, verdict: Verdict, name: &'static str) -> Entry {
    Entry { code, name, verdict }
}

use Verdict::{Fail, Note, Quarantine, Restart};

/// Xids, by code.
pub const XID: [Entry; 41] = [
    entry(8, Restart, "GPU stopped processing"),
    entry(13, Restart, "graphics engine exception"),
    entry(31, Restart, "GPU memory page fault"),
    entry(32, Restart, "invalid or corrupted push buffer"),
    entry(38, Restart, "driver firmware error"),
    entry(43, Restart, "GPU stopped processing: the process's own fault"),
    // Follows whatever ended a process, a kill included.
    entry(45, Note, "preemptive cleanup, due to previous errors"),
    entry(46, Quarantine, "GPU stopped processing"),
    entry(48, Quarantine, "double-bit ECC error"),
    entry(61, Quarantine, "internal micro-controller breakpoint"),
    entry(62, Quarantine, "internal micro-controller halt"),
    // The bad memory is taken out of use at the next reset; what was in it is told by 48, 94 or 95.
    entry(63, Note, "row remapping or page retirement recorded"),
    entry(64, Quarantine, "row remapping or page retirement failed"),
    entry(68, Restart, "video processor exception"),
    entry(69, Restart, "graphics engine class error"),
    entry(74, Quarantine, "NVLink error"),
    entry(79, Quarantine, "GPU has fallen off the bus"),
    entry(92, Note, "high rate of single-bit ECC errors"),
    entry(94, Restart, "contained memory error"),
    entry(95, Quarantine, "uncontained memory error"),
    entry(109, Quarantine, "context switch timeout"),
    entry(110, Quarantine, "security fault"),
    entry(119, Quarantine, "GSP does not answer"),
    entry(120, Quarantine, "GSP error"),
    entry(121, Note, "corrected error of the chip-to-chip link"),
    entry(122, Note, "SPI read failure"),
    entry(123, Note, "SPI write failure"),
    entry(136, Quarantine, "link training failed"),
    entry(137, Restart, "NVLink privilege error"),
    entry(140, Quarantine, "unrecovered ECC error"),
    entry(143, Quarantine, "GPU initialization failed"),
    entry(144, Quarantine, "NVLink error (SAW)"),
    entry(145, Quarantine, "NVLink error (RLW)"),
    entry(146, Quarantine, "NVLink error (TLW)"),
    entry(147, Quarantine, "NVLink error (TREX)"),
    entry(148, Quarantine, "NVLink error (NVLPW)"),
    entry(149, Quarantine, "NVLink error (NETIR)"),
    entry(150, Quarantine, "NVLink error (MSE)"),
    // The driver's own summary of those above; `kernel_log` leaves it out where it says that nothing is to be done.
    entry(154, Quarantine, "GPU recovery action changed"),
    entry(156, Note, "memory taken out of use"),
    entry(157, Quarantine, "memory could not be taken out of use"),
];

/// `CUDA_ERROR_OUT_OF_MEMORY`
pub const CUDA_OUT_OF_MEMORY: u32 = 2;

/// Statuses of the CUDA driver, by code.
pub const CUDA: [Entry; 39] = [
    entry(1, Restart, "CUDA_ERROR_INVALID_VALUE"),
    // The plan's bytes are the bytes: somebody else has the memory, and a restart meets the same; unless it is the memory of
    // processes that this one takes the place of (`GpuError::verdict_where`).
    entry(CUDA_OUT_OF_MEMORY, Fail, "CUDA_ERROR_OUT_OF_MEMORY"),
    entry(3, Restart, "CUDA_ERROR_NOT_INITIALIZED"),
    entry(4, Restart, "CUDA_ERROR_DEINITIALIZED"),
    // A predecessor that is not wholly gone, or another process in exclusive mode.
    entry(46, Restart, "CUDA_ERROR_DEVICE_UNAVAILABLE"),
    entry(100, Quarantine, "CUDA_ERROR_NO_DEVICE"),
    entry(101, Quarantine, "CUDA_ERROR_INVALID_DEVICE"),
    entry(200, Fail, "CUDA_ERROR_INVALID_IMAGE"),
    entry(201, Restart, "CUDA_ERROR_INVALID_CONTEXT"),
    entry(209, Fail, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
    entry(214, Quarantine, "CUDA_ERROR_ECC_UNCORRECTABLE"),
    entry(218, Fail, "CUDA_ERROR_INVALID_PTX"),
    entry(220, Quarantine, "CUDA_ERROR_NVLINK_UNCORRECTABLE"),
    entry(222, Fail, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    entry(226, Restart, "CUDA_ERROR_CONTAINED"),
    entry(304, Restart, "CUDA_ERROR_OPERATING_SYSTEM"),
    entry(400, Restart, "CUDA_ERROR_INVALID_HANDLE"),
    entry(401, Restart, "CUDA_ERROR_ILLEGAL_STATE"),
    entry(600, Restart, "CUDA_ERROR_NOT_READY"),
    entry(700, Restart, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    entry(701, Restart, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
    entry(702, Restart, "CUDA_ERROR_LAUNCH_TIMEOUT"),
    entry(709, Restart, "CUDA_ERROR_CONTEXT_IS_DESTROYED"),
    entry(710, Restart, "CUDA_ERROR_ASSERT"),
    entry(712, Restart, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"),
    entry(713, Restart, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"),
    entry(714, Restart, "CUDA_ERROR_HARDWARE_STACK_ERROR"),
    entry(715, Restart, "CUDA_ERROR_ILLEGAL_INSTRUCTION"),
    entry(716, Restart, "CUDA_ERROR_MISALIGNED_ADDRESS"),
    entry(717, Restart, "CUDA_ERROR_INVALID_ADDRESS_SPACE"),
    entry(718, Restart, "CUDA_ERROR_INVALID_PC"),
    entry(719, Restart, "CUDA_ERROR_LAUNCH_FAILED"),
    entry(800, Fail, "CUDA_ERROR_NOT_PERMITTED"),
    entry(801, Fail, "CUDA_ERROR_NOT_SUPPORTED"),
    // The fabric manager is still starting.
    entry(802, Restart, "CUDA_ERROR_SYSTEM_NOT_READY"),
    entry(803, Fail, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"),
    entry(804, Fail, "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE"),
    entry(908, Restart, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"),
    entry(999, Restart, "CUDA_ERROR_UNKNOWN"),
];

/// The line of an Xid. One that is not listed is told, and a worker that it hurts fails by itself.
pub fn xid(code: u32) -> Entry {
    find(&XID, code).unwrap_or(entry(code, Note, "not in the table"))
}

/// The line of a status of CUDA. What is not listed is worth a restart; the budget for restarts ends it.
pub fn cuda(code: u32) -> Entry {
    find(&CUDA, code).unwrap_or(entry(code, Restart, "not in the table"))
}

/// The code of the first status of CUDA that a text names, for errors that have lost their code on the way.
pub fn cuda_named(text: &str) -> Option<u32> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|w| w.starts_with("CUDA_ERROR_")).find_map(|w| CUDA.iter().find(|e| e.name == w)).map(|e| e.code)
}

fn find(table: &[Entry], code: u32) -> Option<Entry> {
    table.iter().find(|e| e.code == code).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_in_order_and_say_each_thing_once() {
        for table in [&XID[..], &CUDA[..]] {
            assert!(table.windows(2).all(|w| w[0].code < w[1].code));
        }
    }

    #[test]
    fn errors_call_for_what_their_makers_say() {
        let cuda = |code| cuda(code).verdict;
        assert_eq!([719, 700, 46, 999, 12_345].map(cuda), [Restart; 5]);
        assert_eq!([214, 100, 220].map(cuda), [Quarantine; 3]);
        assert_eq!([2, 803].map(cuda), [Fail; 2]);
        let xid = |code| xid(code).verdict;
        assert_eq!([13, 31, 43, 94].map(xid), [Restart; 4]);
        assert_eq!([48, 79, 95, 119, 140].map(xid), [Quarantine; 5]);
        assert_eq!([45, 63, 92, 9999].map(xid), [Note; 4], "an Xid that nobody knows ends nothing");
    }

    #[test]
    fn a_code_is_found_in_a_text() {
        let text = "cuda:0: rmsnorm: stream: cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)";
        assert_eq!(cuda_named(text), Some(719));
        assert_eq!(cuda_named("CUDA_ERROR_LAUNCH_FAILED_X"), None);
        assert_eq!(cuda_named("no such thing"), None);
    }
}
