//! Tokens from logits in bf16, of which there are no more than 65,536 different ones: tokens of one logit are counted, and share
//! one exponential. Cuts and the draw go from number to number, and only in the end is it looked up which token is meant.
//!
//! What comes out is what the other way of choosing gives (of equally likely tokens the one with the smaller id comes first),
//! except where a cut or the draw falls within a rounding of the bound between two tokens.

use super::{not_finite, uniform};
use crate::api::{EngineError, GenerateRequest};
use std::cell::RefCell;

/// Tokens of one logit.
struct Equals {
    rank: u16,
    count: usize,
    /// Of each of them.
    weight: f64,
}

impl Equals {
    fn mass(&self) -> f64 {
        self.count as f64 * self.weight
    }
}

/// Numbers in the order of their ranks; NaN lies beyond both infinities.
fn rank(code: [u8; 2]) -> u16 {
    let bits = u16::from_le_bytes(code);
    bits ^ ((bits as i16 >> 15) as u16 | 0x8000)
}

fn value(rank: u16) -> f32 {
    let bits = if rank & 0x8000 != 0 { rank ^ 0x8000 } else { !rank };
    f32::from_bits(u32::from(bits) << 16)
}

const INFINITE: u16 = 0xff80;
const MINUS_INFINITE: u16 = 0x007f;

thread_local! {
    /// Tokens of each rank.
    static COUNTS: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// As [`super::pick`].
pub(super) fn pick(row: &[[u8; 2]], request: &GenerateRequest, prompt: usize, step: usize) -> Result<u32, EngineError> {
    let extremes = |(least, most): (u16, u16), code: &[u8; 2]| (least.min(rank(*code)), most.max(rank(*code)));
    let (least, most) = row.iter().fold((u16::MAX, 0), extremes);
    if most >= INFINITE || most <= MINUS_INFINITE || least < MINUS_INFINITE {
        return Err(not_finite());
    }
    let best = value(most);
    if request.temperature <= 0.0 {
        // Both zeros are as good.
        return nth(row, 0, |code| value(rank(code)) == best);
    }
    let mut kept = COUNTS.with_borrow_mut(|counts| {
        counts.clear();
        counts.resize(1 << 16, 0);
        for code in row {
            counts[usize::from(rank(*code))] += 1;
        }
        likeliest(counts, most, request)
    });
    if request.top_p > 0.0 && request.top_p < 1.0 {
        keep_mass(&mut kept, request.top_p);
    }
    let (chosen, place) = at(&kept, uniform(request.seed, prompt as u64, step as u64));
    nth(row, place, |code| rank(code) == chosen)
}

/// From the likeliest down; `top_k` tokens at most, and none that are never drawn.
fn likeliest(counts: &[u32], most: u16, request: &GenerateRequest) -> Vec<Equals> {
    let mut left = if request.top_k > 0 { request.top_k } else { usize::MAX };
    let mut kept = Vec::new();
    for rank in (MINUS_INFINITE + 1..=most).rev().filter(|rank| counts[usize::from(*rank)] > 0) {
        let weight = ((value(rank) - value(most)) as f64 / request.temperature).exp();
        if weight == 0.0 || left == 0 {
            break;
        }
        let count = (counts[usize::from(rank)] as usize).min(left);
        left -= count;
        kept.push(Equals { rank, count, weight });
    }
    kept
}

fn total(kept: &[Equals]) -> f64 {
    kept.iter().map(Equals::mass).sum()
}

/// Keeps tokens as long as those before them have less than the share `p`; at least one.
fn keep_mass(kept: &mut Vec<Equals>, p: f64) {
    let limit = p * total(kept);
    let mut before = 0.0;
    for i in 0..kept.len() {
        let mass = kept[i].mass();
        if before + mass >= limit {
            let wanted = ((limit - before) / kept[i].weight).ceil() as usize;
            kept[i].count = wanted.clamp(1, kept[i].count);
            kept.truncate(i + 1);
            return;
        }
        before += mass;
    }
}

/// The rank at the share `u` of what is kept, and the place among its tokens.
fn at(kept: &[Equals], u: f64) -> (u16, usize) {
    let mut left = u * total(kept);
    for e in kept {
        let mass = e.mass();
        if left < mass {
            return (e.rank, ((left / e.weight) as usize).min(e.count - 1));
        }
        left -= mass;
    }
    // Rounding: the last of them. There is one, since the likeliest has the weight 1.
    kept.last().map_or((0, 0), |e| (e.rank, e.count - 1))
}

/// The token at place `n` among those that are meant.
fn nth(row: &[[u8; 2]], n: usize, meant: impl Fn([u8; 2]) -> bool) -> Result<u32, EngineError> {
    let found = row.iter().enumerate().filter(|(_, code)| meant(**code)).nth(n);
    found.map(|(id, _)| id as u32).ok_or_else(|| EngineError::internal("a token that was counted is not there"))
}

#[cfg(test)]
mod tests {
    use super::super::tests::request;
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    fn row(logits: &[f32]) -> Vec<[u8; 2]> {
        logits.iter().map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
    }

    #[test]
    fn ranks_are_in_the_order_of_numbers() {
        let numbers = [f32::NEG_INFINITY, -3e38, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, f32::INFINITY];
        let ranks: Vec<u16> = row(&numbers).into_iter().map(rank).collect();
        assert!(ranks.windows(2).all(|w| w[0] < w[1]), "{ranks:x?}");
        assert_eq!((ranks[0], ranks[9]), (MINUS_INFINITE, INFINITE));
        for code in 0..=u16::MAX {
            assert_eq!(value(rank(code.to_le_bytes())).to_bits() >> 16, u32::from(code));
        }
        assert!(rank(0x7fc0u16.to_le_bytes()) > INFINITE && rank(0xffc0u16.to_le_bytes()) < MINUS_INFINITE);
    }

    #[test]
    fn what_is_not_finite_is_refused_and_what_is_ruled_out_never_drawn() {
        let (no, greedy) = (f32::NEG_INFINITY, request(0.0, 0, 1.0));
        for bad in [&[f32::NAN, 1.0][..], &[1.0, f32::from_bits(0xffc0_0000)], &[1.0, f32::INFINITY], &[no, no], &[]] {
            for r in [&greedy, &request(1.0, 0, 1.0)] {
                assert!(pick(&row(bad), r, 0, 0).is_err(), "{bad:?}");
            }
        }
        assert!((0..500).all(|s| pick(&row(&[no, 0.0, no]), &request(1.0, 0, 1.0), 0, s).unwrap() == 1));
        assert_eq!(pick(&row(&[-1.0, -0.0, 0.0]), &greedy, 0, 0).unwrap(), 1, "zeros are equal");
        assert_eq!(pick(&row(&[1.0, 7.0, 7.0]), &greedy, 0, 0).unwrap(), 1);
        // Equal ones share what they have.
        let drawn: std::collections::BTreeSet<u32> =
            (0..200).map(|s| pick(&row(&[2.0, 1.0, 2.0, 2.0]), &request(1e-3, 2, 1.0), 0, s).unwrap()).collect();
        assert_eq!(drawn, [0, 2].into(), "the first two of three equals");
    }

    /// By sorting: the bounds between tokens on the way from 0 to the sum of what is kept, as (token, begin, end).
    fn sorted(logits: &[f32], r: &GenerateRequest, p: f64) -> Vec<(u32, f64, f64)> {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if r.top_k > 0 {
            order.truncate(r.top_k);
        }
        let mut bounds = Vec::new();
        let mut end = 0.0;
        for id in order {
            let begin = end;
            end += ((logits[id as usize] - best) as f64 / r.temperature).exp();
            bounds.push((id, begin, end));
        }
        if r.top_p < 1.0 {
            bounds.retain(|(_, begin, _)| *begin < p * end);
        }
        bounds
    }

    proptest! {
        /// Sums in another order may move a cut or the draw, but no further than by a rounding.
        #[test]
        fn counting_draws_what_sorting_draws(
            logits in proptest::collection::vec(prop_oneof![
                4 => -30f32..30.0, 2 => (-8i8..8).prop_map(f32::from), 1 => Just(f32::NEG_INFINITY), 1 => Just(-0.0f32)
            ], 1..400),
            temperature in 0.05f64..5.0, top_k in 0usize..50, p in 0.01f64..1.2, step in 0usize..1000,
        ) {
            const ROUNDING: f64 = 1e-11;
            let logits: Vec<f32> = logits.into_iter().map(|x| bf16::from_f32(x).to_f32()).collect();
            prop_assume!(logits.iter().any(|x| x.is_finite()));
            let r = request(temperature, top_k, p.min(1.0));
            let drawn = pick(&row(&logits), &r, 0, step).unwrap();
            let u = uniform(r.seed, 0, step as u64);
            let fits = |p: f64| {
                let bounds = sorted(&logits, &r, p);
                let total = bounds.last().map_or(0.0, |b| b.2);
                bounds.iter().any(|(id, begin, end)| {
                    *id == drawn && u * total > begin - ROUNDING * total && u * total < end + ROUNDING * total
                })
            };
            prop_assert!([r.top_p, r.top_p * (1.0 - ROUNDING), r.top_p * (1.0 + ROUNDING)].into_iter().any(fits), "{drawn}");
        }
    }
}
