//! The device's memory, within a budget.

use crate::driver::{Memory, cu};
use ramtorch_device::{DevBuf, EngineError, ErrorKind};

/// Small buffers share blocks of this size: the driver hands out memory in units of 2 MiB.
const SHARED_BLOCK: u64 = 16 << 20;
const SMALL: u64 = 4 << 20;
const ALIGNMENT: u64 = 256;

/// Allocations of one device, freed together when the device goes.
pub(crate) struct Arena {
    blocks: Vec<Memory>,
    /// What is left of the newest shared block.
    rest: Option<DevBuf>,
    /// What is left of memory that was taken in one piece for buffers of all sizes.
    reserved: Option<DevBuf>,
    budget: u64,
    used: u64,
}

impl Arena {
    pub(crate) fn new(budget: u64) -> Arena {
        Arena { blocks: Vec::new(), rest: None, reserved: None, budget, used: 0 }
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    fn refuse(&self, bytes: u64, device: &str, what: &str) -> EngineError {
        let left = self.budget - self.used;
        EngineError::new(
            ErrorKind::Resources,
            format!(
                "{device}: {what} needs {bytes} bytes, {left} of {} are left; give the device more memory or use a smaller micro-batch",
                self.budget
            ),
        )
    }

    /// Counts memory that its user allocates.
    pub(crate) fn count(&mut self, bytes: u64, device: &str, what: &str) -> Result<(), EngineError> {
        if bytes > self.budget - self.used {
            return Err(self.refuse(bytes, device, what));
        }
        self.used += bytes;
        Ok(())
    }

    /// Takes the memory of the next `bytes` in one piece: so the driver's units of 2 MiB are lost once, and not with every buffer.
    pub(crate) fn reserve(&mut self, bytes: u64, device: &str) -> Result<(), EngineError> {
        let what = "all buffers together";
        if bytes > self.budget - self.used {
            return Err(self.refuse(bytes, device, what));
        }
        if bytes > 0 {
            self.reserved = Some(self.block(bytes, device, what)?);
        }
        Ok(())
    }

    /// Zeroed memory, aligned to 256 bytes; the budget counts sizes rounded up to that.
    pub(crate) fn alloc(&mut self, bytes: u64, device: &str, what: &str) -> Result<DevBuf, EngineError> {
        let rounded = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(u64::MAX);
        if rounded > self.budget - self.used {
            return Err(self.refuse(rounded, device, what));
        }
        if let Some(reserved) = self.reserved.filter(|r| r.bytes >= rounded) {
            self.reserved = Some(reserved.slice(rounded, reserved.bytes - rounded));
            self.used += rounded;
            return Ok(reserved.slice(0, rounded));
        }
        let buf = if rounded >= SMALL {
            self.block(rounded, device, what)?
        } else {
            match self.rest.filter(|r| r.bytes >= rounded) {
                Some(r) => r,
                None => self.block(SHARED_BLOCK, device, what)?,
            }
        };
        if rounded < SMALL {
            self.rest = Some(buf.slice(rounded, buf.bytes - rounded));
        }
        self.used += rounded;
        Ok(buf.slice(0, rounded))
    }

    fn block(&mut self, bytes: u64, device: &str, what: &str) -> Result<DevBuf, EngineError> {
        let memory = Memory::new(bytes, &format!("{device}: {what}"))?;
        let buf = DevBuf { ptr: memory.ptr, bytes };
        self.blocks.push(memory);
        cu!(what, cuMemsetD8_v2(buf.ptr, 0, bytes as usize))?;
        // The streams do not wait for the default stream, on which the filling runs.
        cu!(what, cuCtxSynchronize())?;
        Ok(buf)
    }
}
