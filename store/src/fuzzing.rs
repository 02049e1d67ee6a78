//! Ways in for fuzz targets.

use crate::Layout;
use crate::format;

/// The layout that a manifest gives, and the header of a store with that manifest, byte for byte.
pub fn describe(manifest: &[u8]) -> Option<(Layout, Vec<u8>)> {
    let layout = format::layout_of_manifest(manifest).ok()?.0;
    let header = format::header(&layout, manifest).iter().flat_map(|word| word.to_le_bytes()).collect();
    Some((layout, header))
}
