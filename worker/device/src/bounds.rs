//! What every device checks before it moves parameters or gradients: copies know no bounds of their own.

use crate::{DevBuf, EngineError};
use ramtorch_store::Store;

/// `buf` has room for `bytes`; `what` is for the message.
///
/// # Errors
/// It has not.
pub fn check_room(buf: DevBuf, bytes: u64, what: &str) -> Result<(), EngineError> {
    if bytes <= buf.bytes { Ok(()) } else { Err(EngineError::internal(format!("{what}: {bytes} bytes for a buffer of {}", buf.bytes))) }
}

/// `count` parameters from element `offset` on lie in a page of `store`, and `dst` has room for them at `each` bytes.
///
/// # Errors
/// They do not, or it has not.
pub fn check_load(store: &Store, dst: DevBuf, offset: u64, count: u64, each: u64, what: &str) -> Result<(), EngineError> {
    let page = store.layout().page_range(0);
    let len = page.end - page.start;
    if offset.checked_add(count).is_none_or(|end| end > len) {
        return Err(EngineError::internal(format!("{what}: {offset}+{count}, past the end of a page of {len}")));
    }
    check_room(dst, count * each, what)
}

/// Places `at..at + count` are of the store's array of gradients, and `src` holds them at `each` bytes.
///
/// # Errors
/// They are not, or it does not.
pub fn check_gradients(store: &Store, src: DevBuf, at: u64, count: u64, each: u64) -> Result<(), EngineError> {
    let span = store.layout().gradient_span();
    if at.checked_add(count).is_none_or(|end| end > span) {
        return Err(EngineError::internal(format!("gradients {at}+{count}, past the end of the store's {span}")));
    }
    check_room(src, count * each, "gradients")
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_store::{BlockSpec, GradientFormat, GradientLog, MomentFormat, StoreSpec, TensorSpec};

    #[test]
    fn what_lies_inside_passes_and_what_does_not_is_refused() {
        let tensor = TensorSpec { name: "w".into(), shape: vec![3000], joined: false, decay: true };
        let spec = StoreSpec {
            blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor] }],
            world_size: 1,
            moments: MomentFormat::F32,
            gradients: GradientFormat::Bf16,
            page_parameters: Some(1024),
            spare_pages_per_rank: 1,
            exchange_bytes: 4096,
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        let name = format!("/ramtorch-bounds-{}", std::process::id());
        let store = Store::create(&name, &spec).unwrap();
        Store::unlink(&name).unwrap();
        let buf = |bytes| DevBuf { ptr: 4096, bytes };
        for (offset, count, each, bytes, good) in [
            (0, 1024, 4, 4096, true),
            (1023, 1, 12, 12, true),
            (1024, 0, 4, 0, true),
            (0, 1024, 4, 4095, false),
            (1, 1024, 2, 4096, false),
            (0, 3000, 1, 4096, false), // more than a page, less than the store
            (u64::MAX, 2, 1, 4096, false),
            (2, u64::MAX, 1, 4096, false),
        ] {
            assert_eq!(check_load(&store, buf(bytes), offset, count, each, "load").is_ok(), good, "load of {offset}+{count}");
        }
        let span = store.layout().span();
        for (start, count, each, bytes, good) in [
            (0, span, 2, 2 * span, true),
            (span - 1, 1, 4, 4, true),
            (span, 0, 4, 0, true),
            (0, span, 2, 2 * span - 1, false),
            (span, 1, 4, 4096, false),
            (u64::MAX, 1, 4, 4096, false),
        ] {
            assert_eq!(check_gradients(&store, buf(bytes), start, count, each).is_ok(), good, "gradients {start}+{count}");
        }
        let said = check_load(&store, buf(100), 0, 100, 4, "load of state").unwrap_err().message;
        assert!(said.contains("load of state") && said.contains("400 bytes") && said.contains("100"), "{said}");
    }
}
