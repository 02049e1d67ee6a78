//! Header and manifest.
use crate::error::StoreError;
use crate::layout::Layout;

pub(crate) fn manifest_bytes(layout: &Layout) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(layout.spec()).map_err(|e| StoreError::Spec(e.to_string()))
}
