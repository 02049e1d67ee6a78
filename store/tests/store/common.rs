//! What the tests share: segments that do not outlive them, and contents that tell what they are.

use ramtorch_store::{
    BlockSpec, GradientFormat, GradientLog, MomentFormat, MomentsMut, MomentsRef, Owner, PageId, PageMut, PageView, Store, StoreError,
    StoreSpec, TensorSpec, split,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// A segment name of this process's own; what it names is gone when this is dropped.
pub struct Segment {
    pub name: String,
}

impl Segment {
    pub fn new() -> Segment {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Segment { name: format!("/{}{number}", prefix(std::process::id())) }
    }

    /// The segment as a file.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/shm{}", self.name))
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        let _ = Store::unlink(&self.name);
    }
}

/// What the names of a process's test segments begin with.
pub fn prefix(pid: u32) -> String {
    format!("ramtorch-store-test-{pid}-")
}

/// Segments of a process that are still there.
pub fn left_behind(pid: u32) -> Vec<String> {
    let names = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(&prefix(pid))).collect()
}

/// Two blocks with a joined pair, padding, and pages that straddle all of it.
pub fn spec(world_size: u32, moments: MomentFormat, gradients: GradientFormat) -> StoreSpec {
    let tensor =
        |name: &str, shape: &[u64], joined| TensorSpec { name: name.into(), shape: shape.to_vec(), joined, decay: shape.len() > 1 };
    StoreSpec {
        blocks: vec![
            BlockSpec { name: "embedding".into(), tensors: vec![tensor("embedding.weight", &[50, 33], false)] },
            BlockSpec {
                name: "layer".into(),
                tensors: vec![
                    tensor("q.weight", &[33, 33], false),
                    tensor("k.weight", &[11, 33], true),
                    tensor("norm.weight", &[33], false),
                ],
            },
            BlockSpec { name: "head".into(), tensors: vec![tensor("head.weight", &[200, 33], false)] },
        ],
        world_size,
        moments,
        gradients,
        page_parameters: Some(1024),
        spare_pages_per_rank: 1,
        exchange_bytes: 4096,
        log: GradientLog::NONE,
        metadata: r#"{"family":"test"}"#.into(),
    }
}

/// Master weight of a parameter at a step; any other step gives another.
pub fn weight(parameter: u64, step: u64) -> f32 {
    ((parameter % 4001) as f32 + 1.0) * 1.000_123 * (step as f32 + 0.37)
}

/// Moments that go with it; exact in bf16.
pub fn moment(parameter: u64, step: u64, second: bool) -> f32 {
    (((parameter + step * 3) % 128) as f32 + 128.0) * if second { 0.5 } else { 0.25 }
}

/// Writes parameters `from..to` of a page (counted within it) as they are at `step`.
pub fn fill_part(new: &mut PageMut<'_>, step: u64, from: usize, to: usize) {
    let first = new.params.start;
    for i in from..to {
        (new.hi[i], new.lo[i]) = split::split(weight(first + i as u64, step));
    }
    for (moments, second) in [(&mut new.m, false), (&mut new.v, true)] {
        for i in from..to {
            let value = moment(first + i as u64, step, second);
            match moments {
                MomentsMut::None => {}
                MomentsMut::F32(x) => x[i] = value,
                MomentsMut::Bf16(x) => x[i] = (value.to_bits() >> 16) as u16,
            }
        }
    }
}

pub fn fill(mut new: PageMut<'_>, step: u64) {
    let n = new.hi.len();
    fill_part(&mut new, step, 0, n);
}

/// The page is as [`fill`] makes it, in every number.
pub fn is_at(old: &PageView<'_>, step: u64) -> bool {
    let first = old.params.start;
    (0..old.hi.len()).all(|i| {
        let right = |moments: &MomentsRef<'_>, second| {
            let value = moment(first + i as u64, step, second);
            match moments {
                MomentsRef::None => true,
                MomentsRef::F32(x) => x[i] == value,
                MomentsRef::Bf16(x) => u32::from(x[i]) << 16 == value.to_bits(),
            }
        };
        split::join(old.hi[i], old.lo[i]) == weight(first + i as u64, step) && right(&old.m, false) && right(&old.v, true)
    })
}

/// Fills every page of an owner at step 0.
pub fn load(owner: &mut Owner<'_>) -> Result<(), StoreError> {
    owner.pages().try_for_each(|page: PageId| owner.initialise(page, 0, |new| fill(new, 0)))
}

/// Claims each rank in turn and fills its pages.
pub fn load_all(store: &Store) {
    for rank in 0..store.layout().spec().world_size {
        load(&mut store.claim(rank).unwrap()).unwrap();
    }
}
