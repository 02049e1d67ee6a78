//! Filling pages of the parameter store.

use crate::dtype::round_bf16;
use crate::error::ModelError;
use crate::source::WeightSource;
use ramtorch_store::{Layout, MomentsMut, Owner, PageId, PageMut, split};
use rayon::prelude::*;
use std::ops::Range;

/// Parameters that one thread reads at once: bounds its private memory to 3 x 1 MiB.
const PIECE: usize = 1 << 18;

/// Write the initial state of `page` and publish it at `step`: weights from `source`, moments from it where it has them and
/// zero where it has none, zeros in the padding between tensors.
///
/// Runs on the rayon pool of the caller; other pages may be filled at the same time by other owners.
///
/// # Errors
/// `source` cannot be read, or the store refuses. Nothing is published then.
pub fn fill_page(owner: &mut Owner<'_>, layout: &Layout, page: PageId, step: u64, source: &dyn WeightSource) -> Result<(), ModelError> {
    owner.try_initialise(page, step, |state| fill(layout, state, source))
}

/// The part of a page that one thread fills.
struct Piece<'a> {
    params: Range<u64>,
    hi: &'a mut [u16],
    lo: &'a mut [u16],
    m: MomentsMut<'a>,
    v: MomentsMut<'a>,
}

fn fill(layout: &Layout, state: PageMut<'_>, source: &dyn WeightSource) -> Result<(), ModelError> {
    let PageMut { params, hi, lo, m, v, .. } = state;
    let count = hi.len().div_ceil(PIECE);
    let moments = moment_pieces(m, count).into_iter().zip(moment_pieces(v, count));
    let weights = hi.chunks_mut(PIECE).zip(lo.chunks_mut(PIECE)).enumerate();
    let pieces: Vec<Piece<'_>> = weights
        .zip(moments)
        .map(|((i, (hi, lo)), (m, v))| {
            let start = params.start + (i * PIECE) as u64;
            Piece { params: start..start + hi.len() as u64, hi, lo, m, v }
        })
        .collect();
    pieces.into_par_iter().try_for_each(|piece| fill_piece(layout, piece, source))
}

fn moment_pieces(moments: MomentsMut<'_>, count: usize) -> Vec<MomentsMut<'_>> {
    match moments {
        MomentsMut::None => (0..count).map(|_| MomentsMut::None).collect(),
        MomentsMut::F32(x) => x.chunks_mut(PIECE).map(MomentsMut::F32).collect(),
        MomentsMut::Bf16(x) => x.chunks_mut(PIECE).map(MomentsMut::Bf16).collect(),
    }
}

fn fill_piece(layout: &Layout, piece: Piece<'_>, source: &dyn WeightSource) -> Result<(), ModelError> {
    let Piece { params, hi, lo, m, v } = piece;
    let with_moments = !matches!(m, MomentsMut::None);
    let mut weights = vec![0.0f32; hi.len()];
    let (mut first, mut second) = if with_moments { (vec![0.0f32; hi.len()], vec![0.0f32; hi.len()]) } else { (Vec::new(), Vec::new()) };
    for overlap in overlaps(layout, &params) {
        let place = (overlap.params.start - params.start) as usize..(overlap.params.end - params.start) as usize;
        source.read(overlap.tensor, overlap.start, &mut weights[place.clone()])?;
        if with_moments {
            source.read_moments(overlap.tensor, overlap.start, &mut first[place.clone()], &mut second[place])?;
        }
    }
    split::split_slice(&weights, hi, lo);
    store_moments(&first, m);
    store_moments(&second, v);
    Ok(())
}

fn store_moments(values: &[f32], to: MomentsMut<'_>) {
    match to {
        MomentsMut::None => {}
        MomentsMut::F32(out) => out.copy_from_slice(values),
        MomentsMut::Bf16(out) => out.iter_mut().zip(values).for_each(|(out, &x)| *out = round_bf16(x)),
    }
}

/// A part of a tensor within a range of the parameter index space.
pub(crate) struct Overlap<'a> {
    /// Name of the tensor.
    pub(crate) tensor: &'a str,
    /// First element of the part.
    pub(crate) start: u64,
    /// Where the part lies in the index space.
    pub(crate) params: Range<u64>,
}

/// The parts of tensors that lie within `params`, in order; what is between them is padding.
pub(crate) fn overlaps<'a>(layout: &'a Layout, params: &Range<u64>) -> impl Iterator<Item = Overlap<'a>> {
    let tensors = layout.tensors();
    let first = tensors.partition_point(|t| t.start + t.len <= params.start);
    let (from, to) = (params.start, params.end);
    tensors[first..].iter().take_while(move |t| t.start < to).map(move |t| {
        let range = t.start.max(from)..(t.start + t.len).min(to);
        Overlap { tensor: &t.name, start: range.start - t.start, params: range }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::StoreWeights;
    use crate::testing::{Synthetic, bits, fixture, read_all, read_all_moments, store, tiny_llama};
    use crate::{Architecture, HfFolder};
    use ramtorch_store::{MomentFormat, Part};

    #[test]
    fn pages_hold_what_the_source_gave() {
        let model = tiny_llama();
        for (ranks, moments) in [(1, MomentFormat::F32), (3, MomentFormat::Bf16), (2, MomentFormat::None)] {
            let source = Synthetic { salt: 7, moments: true };
            let store = store(&model, ranks, moments, 4, &source);
            let held = StoreWeights::at_step(&store, 4);
            for (a, b) in read_all(&model, &source).iter().zip(&read_all(&model, &held)) {
                assert_eq!(bits(a), bits(b));
            }
            let expected = (moments != MomentFormat::None).then(|| read_all_moments(&model, &source).unwrap());
            assert_eq!(read_all_moments(&model, &held), expected, "{moments:?}");
            let wrong = StoreWeights::at_step(&store, 5).read("model.norm.weight", 0, &mut [0.0]);
            assert!(matches!(wrong, Err(ModelError::Store(_))), "{wrong:?}");
        }
    }

    #[test]
    fn moments_are_zero_without_a_source_of_them_and_so_is_padding() {
        let model = tiny_llama();
        let store = store(&model, 2, MomentFormat::F32, 0, &Synthetic { salt: 1, moments: false });
        let layout = store.layout();
        assert!(layout.span() > layout.parameters(), "the test needs padding");
        let mut all = vec![0.0; layout.span() as usize];
        store.read(0, Part::Weight, &mut all).unwrap();
        let mut inside = vec![false; all.len()];
        for t in layout.tensors() {
            inside[t.start as usize..(t.start + t.len) as usize].fill(true);
        }
        assert!(all.iter().zip(&inside).all(|(x, inside)| *inside || x.to_bits() == 0));
        store.read(0, Part::Moment2, &mut all).unwrap();
        assert!(all.iter().all(|x| x.to_bits() == 0));
    }

    #[test]
    fn real_folders_fill_a_store() {
        for name in ["llama", "qwen2", "qwen2-untied", "qwen3", "mistral", "gpt2"] {
            let (model, _) = Architecture::from_config_file(&fixture(name).join("config.json")).unwrap();
            let folder = HfFolder::open(&fixture(name), &model).unwrap();
            let store = store(&model, 2, MomentFormat::None, 0, &folder);
            for (a, b) in read_all(&model, &folder).iter().zip(&read_all(&model, &StoreWeights::live(&store))) {
                assert_eq!(bits(a), bits(b), "{name}");
            }
        }
    }

    #[test]
    fn a_source_that_fails_is_an_error() {
        struct Broken;
        impl WeightSource for Broken {
            fn read(&self, _: &str, _: u64, _: &mut [f32]) -> Result<(), ModelError> {
                Err(ModelError::Invalid("broken".into()))
            }
        }
        let store = store(&tiny_llama(), 1, MomentFormat::F32, 0, &Synthetic { salt: 1, moments: false });
        assert!(crate::testing::fill(&store, 1, &Broken).unwrap_err().to_string().contains("broken"));
    }
}
