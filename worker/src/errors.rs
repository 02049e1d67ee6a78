//! From the errors of other crates to exit codes.

use crate::api::{EngineError, ErrorKind};
use ramtorch_data::{DataError, DataErrorKind};
use ramtorch_modelio::{Fault, ModelError};
use ramtorch_store::StoreError;

pub(crate) fn model(e: ModelError) -> EngineError {
    let kind = match e.fault() {
        Fault::Input => ErrorKind::Input,
        Fault::Output => ErrorKind::Output,
        Fault::Internal => ErrorKind::Internal,
    };
    EngineError::new(kind, e)
}

pub(crate) fn data(e: DataError) -> EngineError {
    let kind = match e.kind() {
        DataErrorKind::Spec => ErrorKind::JobFile,
        DataErrorKind::Input => ErrorKind::Input,
        DataErrorKind::Output => ErrorKind::Output,
    };
    EngineError::new(kind, e)
}

pub(crate) fn store(e: StoreError) -> EngineError {
    e.into()
}
