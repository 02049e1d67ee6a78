//! Streaming a tensor through several threads with bounded memory: read, convert and checksum in parallel, write in order.

use crate::dtype::Dtype;
use crate::error::ModelError;
use rayon::prelude::*;

/// Elements that one thread handles at once, and that one checksum covers.
pub(crate) const PIECE_ELEMENTS: usize = 1 << 18;
/// Pieces under way at once: bounds the memory of a stream to 16 x 2 MiB.
const PIECES: usize = 16;

/// Buffers of a stream, kept from tensor to tensor.
pub(crate) struct Stream {
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Stream {
    pub(crate) fn new() -> Self {
        Stream { values: Vec::new(), bytes: Vec::new() }
    }

    /// Read `elements` elements through `read` (called from several threads), convert them to `dtype` and give them to
    /// `write` in order. Returns the CRC-32C of every [`PIECE_ELEMENTS`] elements as they were written.
    pub(crate) fn copy(
        &mut self,
        elements: u64,
        dtype: Dtype,
        read: impl Fn(u64, &mut [f32]) -> Result<(), ModelError> + Sync,
        mut write: impl FnMut(&[u8]) -> Result<(), ModelError>,
    ) -> Result<Vec<u32>, ModelError> {
        let size = dtype.size() as usize;
        let mut checksums = Vec::with_capacity(elements.div_ceil(PIECE_ELEMENTS as u64) as usize);
        let mut start = 0;
        while start < elements {
            let len = (elements - start).min((PIECE_ELEMENTS * PIECES) as u64) as usize;
            if self.values.len() < len {
                self.values.resize(len, 0.0);
            }
            if self.bytes.len() < len * size {
                self.bytes.resize(len * size, 0);
            }
            let (values, bytes) = (&mut self.values[..len], &mut self.bytes[..len * size]);
            let pieces = values.par_chunks_mut(PIECE_ELEMENTS).zip(bytes.par_chunks_mut(PIECE_ELEMENTS * size)).enumerate();
            let batch: Result<Vec<u32>, ModelError> = pieces
                .map(|(i, (values, bytes))| {
                    read(start + (i * PIECE_ELEMENTS) as u64, values)?;
                    dtype.encode(values, bytes);
                    Ok(crc32c::crc32c(bytes))
                })
                .collect();
            checksums.extend(batch?);
            write(bytes)?;
            start += len as u64;
        }
        Ok(checksums)
    }
}
