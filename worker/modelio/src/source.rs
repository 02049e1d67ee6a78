//! Where the numbers of a model come from.

use crate::error::ModelError;
use ramtorch_store::{Part, Store};

/// Weights by tensor name. Reads are independent of each other and may come from many threads at once.
pub trait WeightSource: Sync {
    /// Read elements `start .. start + out.len()` of a tensor, in row-major order, as fp32.
    ///
    /// # Errors
    /// The file cannot be read, the tensor is not there, the range leaves it, or its checksum does not match.
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError>;

    /// Read the same range of both Adam moments. `false` (and nothing written) where the source has none: they are zero.
    ///
    /// # Errors
    /// As [`WeightSource::read`].
    fn read_moments(&self, _tensor: &str, _start: u64, _first: &mut [f32], _second: &mut [f32]) -> Result<bool, ModelError> {
        Ok(false)
    }
}

impl<T: WeightSource + ?Sized> WeightSource for &T {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        (**self).read(tensor, start, out)
    }
    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, ModelError> {
        (**self).read_moments(tensor, start, first, second)
    }
}

impl<T: WeightSource + ?Sized + Send> WeightSource for Box<T> {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        (**self).read(tensor, start, out)
    }
    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, ModelError> {
        (**self).read_moments(tensor, start, first, second)
    }
}
