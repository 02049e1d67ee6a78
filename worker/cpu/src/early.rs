//! Pages that are updated beside the backward pass, and the weights that they had before.
//!
//! ```text
//!   gradients of the page ──► new state, in a spare ──► old weights where the gradients were ──► published
//! ```
//! Until the gradients of all pages are complete, a death takes the step back to its beginning, with the weights of the step
//! before: those of a published page are read from the place of its gradients ([`kept_weights`]), in the gradients' format. That
//! is wide enough where gradients are in fp32, which holds the master, or arithmetic is in bf16 ([`keeps_weights`]).

use crate::adamw::adamw_page;
use crate::collectives::read_gradient_range;
use ramtorch_device::{AdamwStep, DecayRun, Dtype, EngineError};
use ramtorch_store::{Early, GradientFormat, Gradients, GradientsMut, PageId, PageView, SharedOwner, Store, split};
use rayon::prelude::*;
use std::ops::Range;

/// Parameters that a task copies.
const CHUNK: usize = 1 << 14;

/// Whether the place of a gradient in `gradients` has room for a weight as arithmetic in `dtype` wants it.
pub fn keeps_weights(gradients: GradientFormat, dtype: Dtype) -> bool {
    match gradients {
        GradientFormat::None => false,
        GradientFormat::F32 => true,
        GradientFormat::Bf16 => dtype == Dtype::Bf16,
    }
}

/// Brings `page` to `k.step`, on the current rayon pool, and keeps its old weights in the place of its gradients. What must be
/// true of it then is said at [`SharedOwner::update_early`].
///
/// # Errors
/// Those of the store, and of formats that AdamW does not know.
pub fn update_page_early(owner: &SharedOwner<'_>, k: &AdamwStep, page: PageId) -> Result<Early, EngineError> {
    let layout = owner.store().layout();
    let runs = DecayRun::of(layout, &layout.page_range(page));
    owner.update_early(page, k.step, |old, new, g| adamw_page(k, &runs, old, new, g), keep)
}

fn keep(old: PageView<'_>, place: GradientsMut<'_>) {
    match place {
        GradientsMut::None => {}
        GradientsMut::Bf16(place) => place.par_chunks_mut(CHUNK).zip(old.hi.par_chunks(CHUNK)).for_each(|(to, hi)| to.copy_from_slice(hi)),
        GradientsMut::F32(place) => {
            let halves = old.hi.par_chunks(CHUNK).zip(old.lo.par_chunks(CHUNK));
            place.par_chunks_mut(CHUNK).zip(halves).for_each(|(to, (hi, lo))| split::join_slice(hi, lo, to));
        }
    }
}

/// The old weights of `params`, which lie in one page that was updated early to `step`, as arithmetic in `dtype` wants them.
///
/// # Errors
/// The place of gradients has no room for them: a defect of the plan.
///
/// # Panics
/// Where the range lies outside the store.
pub fn kept_weights(store: &Store, dtype: Dtype, params: Range<u64>, step: u64) -> Result<Vec<u8>, EngineError> {
    read_gradient_range(store, params, step, |kept| match (kept, dtype) {
        (Gradients::Bf16(hi), Dtype::Bf16) => Ok(hi.iter().flat_map(|x| x.to_le_bytes()).collect()),
        (Gradients::F32(master), Dtype::Bf16) => Ok(master.iter().flat_map(|x| split::split(*x).0.to_le_bytes()).collect()),
        (Gradients::F32(master), Dtype::F32) => Ok(master.iter().flat_map(|x| x.to_le_bytes()).collect()),
        (Gradients::None, _) | (Gradients::Bf16(_), Dtype::F32) => {
            Err(EngineError::internal("the weights of the step before were not kept: the place of gradients is too narrow"))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramtorch_store::{BlockSpec, GradientLog, MomentFormat, MomentsMut, StoreSpec, TensorSpec};

    const PARAMETERS: u64 = 3000;

    fn weight(i: u64) -> f32 {
        (i as f32 - 1403.7) * 1.003e-3
    }

    /// Two pages at step 0, with gradients of `format`.
    fn store(format: GradientFormat, tag: &str) -> Store {
        let tensor = TensorSpec { name: "w".into(), shape: vec![PARAMETERS], joined: false, decay: true };
        let spec = StoreSpec {
            blocks: vec![BlockSpec { name: "b".into(), tensors: vec![tensor] }],
            world_size: 1,
            moments: MomentFormat::F32,
            gradients: format,
            page_parameters: Some(2048),
            spare_pages_per_rank: 1,
            exchange_bytes: 0,
            log: GradientLog::NONE,
            metadata: String::new(),
        };
        let name = format!("/ramtorch-early-{tag}-{}", std::process::id());
        let store = Store::create(&name, &spec).unwrap();
        Store::unlink(&name).unwrap();
        let mut owner = store.claim(0).unwrap();
        for page in owner.pages() {
            owner
                .initialise(page, 0, |new| {
                    for (i, p) in new.params.enumerate() {
                        (new.hi[i], new.lo[i]) = split::split(weight(p));
                    }
                    let (MomentsMut::F32(m), MomentsMut::F32(v)) = (new.m, new.v) else { panic!("moments in fp32") };
                    m.fill(1e-3);
                    v.fill(1e-5);
                })
                .unwrap();
        }
        drop(owner);
        for i in 0..store.layout().span() {
            let g = (i as f32 - 900.0) * 1e-4;
            let place = store.gradient_ptr(i);
            // SAFETY: inside the gradients of a store that nobody else knows, in its format.
            unsafe {
                match format {
                    GradientFormat::F32 => place.cast::<f32>().write(g),
                    _ => place.cast::<u16>().write((g.to_bits() >> 16) as u16),
                }
            }
        }
        store
    }

    fn step() -> AdamwStep {
        AdamwStep {
            step: 1,
            beta1: 0.9,
            beta2: 0.95,
            one_minus_beta1: 0.1,
            one_minus_beta2: 0.05,
            step_size: 1e-2,
            root_scale: 2.5,
            eps: 1e-8,
            gradient_scale: 1.0,
            keep: 0.999,
        }
    }

    fn weights(store: &Store) -> Vec<u32> {
        let mut out = vec![0f32; store.layout().span() as usize];
        store.read_at_step(0, ramtorch_store::Part::Weight, 1, &mut out).unwrap();
        out.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn old_weights_come_back_as_arithmetic_wants_them_and_new_ones_are_those_of_a_late_update() {
        for (format, tag) in [(GradientFormat::F32, "f32"), (GradientFormat::Bf16, "bf16")] {
            let (early, late) = (store(format, tag), store(format, &format!("{tag}-late")));
            crate::update_pages(&SharedOwner::new(late.claim(0).unwrap()), &step(), None).unwrap();
            let owner = SharedOwner::new(early.claim(0).unwrap());
            for page in [1, 0] {
                assert_eq!(update_page_early(&owner, &step(), page).unwrap(), Early::Published);
                assert_eq!(update_page_early(&owner, &step(), page).unwrap(), Early::Done);
            }
            assert!(weights(&early) == weights(&late), "{tag}");
            // Across the border of two pages.
            let params = 2000..2100u64;
            let half: Vec<u8> = params.clone().flat_map(|i| split::split(weight(i)).0.to_le_bytes()).collect();
            assert_eq!(kept_weights(&early, Dtype::Bf16, params.clone(), 1).unwrap(), half, "{tag}");
            let full: Vec<u8> = params.clone().flat_map(|i| weight(i).to_le_bytes()).collect();
            let kept = kept_weights(&early, Dtype::F32, params.clone(), 1);
            assert_eq!(keeps_weights(format, Dtype::F32), kept.is_ok(), "{tag}");
            assert!(keeps_weights(format, Dtype::Bf16) && kept.is_ok_and(|k| k == full) == (format == GradientFormat::F32));
        }
        assert!(!keeps_weights(GradientFormat::None, Dtype::Bf16));
    }
}
