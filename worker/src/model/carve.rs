//! Dividing a buffer into parts. The same code measures and divides, so that sizes in the plan are exact.

use ramtorch_device::{DevBuf, Dtype};

/// Hands out parts of a buffer one after the other, each at a multiple of 256 bytes.
pub(crate) struct Carver {
    buf: Option<DevBuf>,
    used: u64,
}

impl Carver {
    /// Only counts.
    pub fn measure() -> Self {
        Carver { buf: None, used: 0 }
    }

    /// Divides `buf`.
    pub fn of(buf: DevBuf) -> Self {
        Carver { buf: Some(buf), used: 0 }
    }

    /// Bytes handed out.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The next `bytes`.
    pub fn bytes(&mut self, bytes: u64) -> DevBuf {
        let at = self.used;
        self.used += bytes.next_multiple_of(256);
        match self.buf {
            Some(b) => b.slice(at, bytes),
            None => DevBuf { ptr: 0, bytes },
        }
    }

    /// Everything that is left (nothing, while measuring).
    pub fn rest(&self) -> DevBuf {
        self.buf.map_or(DevBuf { ptr: 0, bytes: 0 }, |b| b.slice(self.used, b.bytes - self.used))
    }

    /// The next `n` elements of a compute format.
    pub fn elems(&mut self, n: usize, dtype: Dtype) -> DevBuf {
        self.bytes(n as u64 * dtype.size())
    }

    /// The next `n` f32 values.
    pub fn f32(&mut self, n: usize) -> DevBuf {
        self.bytes(n as u64 * 4)
    }
}
