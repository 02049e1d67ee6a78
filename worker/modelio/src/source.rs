//! Where the numbers of a model come from.

use crate::error::ModelError;
use ramtorch_store::{Part, Store};
use std::path::PathBuf;

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

    /// Number format in which a tensor is kept, in words: `F32`, `BF16`. Reading gives fp32 whatever it is.
    fn dtype(&self, _tensor: &str) -> &'static str {
        "F32"
    }
}

impl<T: WeightSource + ?Sized> WeightSource for &T {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        (**self).read(tensor, start, out)
    }
    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, ModelError> {
        (**self).read_moments(tensor, start, first, second)
    }
    fn dtype(&self, tensor: &str) -> &'static str {
        (**self).dtype(tensor)
    }
}

/// The weights of another source, without its moments: training begins anew from them.
#[derive(Debug)]
pub struct WeightsOnly<T>(pub T);

impl<T: WeightSource> WeightSource for WeightsOnly<T> {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        self.0.read(tensor, start, out)
    }
    fn dtype(&self, tensor: &str) -> &'static str {
        self.0.dtype(tensor)
    }
}

/// The fp32 master weights and moments in a parameter store.
#[derive(Clone, Copy)]
pub struct StoreWeights<'a> {
    store: &'a Store,
    step: Option<u64>,
}

impl<'a> StoreWeights<'a> {
    /// Reads the state of `step`; a page at any other step is an error.
    pub fn at_step(store: &'a Store, step: u64) -> Self {
        StoreWeights { store, step: Some(step) }
    }

    /// Reads each page as it is. Where training goes on meanwhile, pages may be one step apart.
    pub fn live(store: &'a Store) -> Self {
        StoreWeights { store, step: None }
    }

    pub(crate) fn part(&self, tensor: &str, part: Part, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        let Some(t) = self.store.layout().tensor(tensor) else {
            return Err(ModelError::MissingTensor { path: PathBuf::from(self.store.name()), tensor: tensor.to_owned() });
        };
        if start.checked_add(out.len() as u64).is_none_or(|end| end > t.len) {
            return Err(outside(tensor, start, out.len()));
        }
        match self.step {
            Some(step) => self.store.read_at_step(t.start + start, part, step, out)?,
            None => drop(self.store.read(t.start + start, part, out)?),
        }
        Ok(())
    }
}

impl WeightSource for StoreWeights<'_> {
    fn read(&self, tensor: &str, start: u64, out: &mut [f32]) -> Result<(), ModelError> {
        self.part(tensor, Part::Weight, start, out)
    }

    fn read_moments(&self, tensor: &str, start: u64, first: &mut [f32], second: &mut [f32]) -> Result<bool, ModelError> {
        if self.store.layout().spec().moments == ramtorch_store::MomentFormat::None {
            return Ok(false);
        }
        self.part(tensor, Part::Moment1, start, first)?;
        self.part(tensor, Part::Moment2, start, second)?;
        Ok(true)
    }
}

/// A read beyond the end of a tensor.
pub(crate) fn outside(tensor: &str, start: u64, len: usize) -> ModelError {
    ModelError::Invalid(format!("read of {len} elements at {start} of tensor `{tensor}` leaves it"))
}
