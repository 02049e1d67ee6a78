//! The next token from a model's logits: temperature, then the `top_k` likeliest, then the smallest number of them that has
//! `top_p` of the probability, then a draw.
//!
//! The draw goes through the tokens from the likeliest down, which would mean sorting a vocabulary of 128,256 for each token
//! of each text. Only the order inside the few ranges in which something ends is ever looked at: tokens are put into buckets
//! by their logit, whole buckets are passed by their sums, and the bucket in which a cut or the draw falls is sorted.
//! Logits in bf16 are so few different numbers that each of them has a bucket of its own ([`codes`]).

mod codes;

use crate::api::{EngineError, ErrorKind, GenerateRequest};
use ramtorch_device::Dtype;
use rayon::prelude::*;

/// Buckets a unit of logit over temperature; e^-1/32 is 0.97.
const BUCKETS_A_UNIT: f64 = 32.0;
/// What is less likely than e^-32 of the best has one bucket.
const BUCKETS: usize = 1024;

/// Chooses tokens, several texts at a time.
pub(crate) struct Sampler {
    pool: Option<rayon::ThreadPool>,
}

impl Sampler {
    /// Works on `threads` threads.
    pub fn new(threads: usize) -> Result<Sampler, EngineError> {
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("sampling{i}")).build();
        let pool = if threads > 1 { Some(pool().map_err(|e| EngineError::new(ErrorKind::Resources, e))?) } else { None };
        tracing::info!("tokens are chosen on {} threads", pool.as_ref().map_or(1, rayon::ThreadPool::current_num_threads));
        Ok(Sampler { pool })
    }

    /// The next token of each row's text; none where it has ended (`None`). `logits` are little-endian numbers of `dtype`.
    pub fn next_tokens(
        &self,
        logits: &[u8],
        dtype: Dtype,
        texts: &[Option<usize>],
        request: &GenerateRequest,
        step: usize,
    ) -> Result<Vec<Option<u32>>, EngineError> {
        let row = (logits.len() / texts.len().max(1)).max(1);
        let of = |(row, text): (&[u8], &Option<usize>)| {
            let Some(text) = *text else { return Ok(None) };
            match dtype {
                Dtype::Bf16 => codes::pick(row.as_chunks::<2>().0, request, text, step).map(Some),
                Dtype::F32 => {
                    let logits: Vec<f32> = row.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
                    pick(&logits, request, text, step).map(Some)
                }
            }
        };
        match &self.pool {
            Some(pool) => pool.install(|| logits.par_chunks_exact(row).zip(texts).with_max_len(1).map(of).collect()),
            None => logits.chunks_exact(row).zip(texts).map(of).collect(),
        }
    }
}

fn not_finite() -> EngineError {
    EngineError::input("the model's logits are not finite: its weights are damaged or training has diverged")
}

/// The next token. The random number is a function of (seed, prompt, step), so that a text does not depend on what is
/// generated beside it.
fn pick(logits: &[f32], request: &GenerateRequest, prompt: usize, step: usize) -> Result<u32, EngineError> {
    let best = logits.iter().enumerate().fold((0usize, f32::NEG_INFINITY), |b, (i, x)| if *x > b.1 { (i, *x) } else { b });
    if !best.1.is_finite() || logits.iter().any(|x| x.is_nan()) {
        return Err(not_finite());
    }
    if request.temperature <= 0.0 {
        return Ok(best.0 as u32);
    }
    let mut ranking = Ranking::new(logits, best.1, request.temperature);
    if request.top_k > 0 {
        ranking.keep_count(request.top_k);
    }
    if request.top_p > 0.0 && request.top_p < 1.0 {
        ranking.keep_mass(request.top_p);
    }
    Ok(ranking.at(uniform(request.seed, prompt as u64, step as u64)).unwrap_or(best.0 as u32))
}

/// Tokens from the likeliest down, in buckets that are sorted when somebody has to look inside.
struct Ranking<'a> {
    logits: &'a [f32],
    best: f32,
    temperature: f64,
    order: Vec<u32>,
    buckets: Vec<Bucket>,
}

/// Tokens `order[start..start + len]`, and the sum of their weights.
struct Bucket {
    start: usize,
    len: usize,
    mass: f64,
}

impl<'a> Ranking<'a> {
    fn new(logits: &'a [f32], best: f32, temperature: f64) -> Self {
        let mut buckets: Vec<Bucket> = (0..BUCKETS).map(|_| Bucket { start: 0, len: 0, mass: 0.0 }).collect();
        let mut depths = Vec::with_capacity(logits.len());
        for x in logits {
            let below = (best - x) as f64 / temperature;
            let depth = (below * BUCKETS_A_UNIT).min((BUCKETS - 1) as f64) as u16;
            depths.push(depth);
            let bucket = &mut buckets[usize::from(depth)];
            bucket.len += 1;
            bucket.mass += (-below).exp();
        }
        let mut ends = Vec::with_capacity(BUCKETS);
        let mut end = 0;
        for bucket in &mut buckets {
            bucket.start = end;
            ends.push(end);
            end += bucket.len;
        }
        let mut order = vec![0u32; logits.len()];
        for (i, depth) in depths.into_iter().enumerate() {
            let at = &mut ends[usize::from(depth)];
            order[*at] = i as u32;
            *at += 1;
        }
        Ranking { logits, best, temperature, order, buckets }
    }

    fn weight(&self, token: u32) -> f64 {
        ((self.logits[token as usize] - self.best) as f64 / self.temperature).exp()
    }

    fn total(&self) -> f64 {
        self.buckets.iter().map(|b| b.mass).sum()
    }

    /// Sorts a bucket; of two tokens that are equally likely, the one with the smaller id comes first.
    fn look_into(&mut self, bucket: usize) -> &[u32] {
        let Bucket { start, len, .. } = self.buckets[bucket];
        let tokens = &mut self.order[start..start + len];
        tokens.sort_unstable_by(|a, b| self.logits[*b as usize].total_cmp(&self.logits[*a as usize]).then(a.cmp(b)));
        tokens
    }

    /// Keeps the first `len` tokens of a bucket, and none of those behind it.
    fn cut(&mut self, bucket: usize, len: usize) {
        let tokens = self.look_into(bucket)[..len].to_vec();
        self.buckets[bucket].mass = tokens.iter().map(|t| self.weight(*t)).sum();
        self.buckets[bucket].len = len;
        self.buckets.truncate(bucket + 1);
    }

    fn keep_count(&mut self, count: usize) {
        let mut before = 0;
        for b in 0..self.buckets.len() {
            let len = self.buckets[b].len;
            if before + len >= count {
                return self.cut(b, count - before);
            }
            before += len;
        }
    }

    /// Keeps tokens as long as those before them have less than the share `p`; at least one.
    fn keep_mass(&mut self, p: f64) {
        let limit = p * self.total();
        let mut before = 0.0;
        for b in 0..self.buckets.len() {
            let mass = self.buckets[b].mass;
            if before + mass >= limit {
                let tokens = self.look_into(b).to_vec();
                let kept = tokens.iter().take_while(|t| {
                    let keep = before < limit;
                    before += self.weight(**t);
                    keep
                });
                let len = kept.count();
                return self.cut(b, len);
            }
            before += mass;
        }
    }

    /// The token at the share `u` of what is kept.
    fn at(&mut self, u: f64) -> Option<u32> {
        let mut left = u * self.total();
        let mut last = None;
        for b in 0..self.buckets.len() {
            let mass = self.buckets[b].mass;
            if left >= mass {
                left -= mass;
                continue;
            }
            for token in self.look_into(b).to_vec() {
                left -= self.weight(token);
                if left < 0.0 {
                    return Some(token);
                }
                last = Some(token);
            }
        }
        // Sums in another order may fall short of the total by a rounding.
        last
    }
}

/// A number in [0, 1) from three (SplitMix64's finaliser, twice).
fn uniform(seed: u64, a: u64, b: u64) -> f64 {
    let mix = |mut x: u64| {
        x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    };
    (mix(mix(seed ^ a.rotate_left(32)) ^ b) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn request(temperature: f64, top_k: usize, top_p: f64) -> GenerateRequest {
        GenerateRequest { prompts: vec![], max_new_tokens: 1, temperature, top_k, top_p, seed: 1, chat: false, precision: None }
    }

    #[test]
    fn sampling_follows_the_distribution_and_its_cuts() {
        let logits = [1.0f32, 3.0, 2.0, -1.0];
        assert_eq!(pick(&logits, &request(0.0, 0, 1.0), 0, 0).unwrap(), 1);
        let mut counts = [0usize; 4];
        for step in 0..20_000 {
            counts[pick(&logits, &request(1.0, 0, 1.0), 0, step).unwrap() as usize] += 1;
        }
        let total: f64 = logits.iter().map(|x| (*x as f64).exp()).sum();
        for (c, x) in counts.iter().zip(logits) {
            assert!((*c as f64 / 2e4 - (x as f64).exp() / total).abs() < 0.015, "{counts:?}");
        }
        assert!((0..500).all(|s| [1, 2].contains(&pick(&logits, &request(5.0, 2, 1.0), 0, s).unwrap())));
        assert!((0..500).all(|s| pick(&logits, &request(1.0, 0, 0.5), 0, s).unwrap() == 1));
        assert!(pick(&[f32::NAN; 3], &request(1.0, 0, 1.0), 0, 0).is_err());
        assert!(pick(&[1.0, f32::NAN], &request(0.0, 0, 1.0), 0, 0).is_err());
        assert!(pick(&[1.0, f32::INFINITY], &request(1.0, 0, 1.0), 0, 0).is_err());
        // Tokens that are ruled out are never drawn.
        assert!((0..500).all(|s| pick(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY], &request(1.0, 0, 1.0), 0, s).unwrap() == 1));
    }

    #[test]
    fn each_text_has_its_own_draw_and_ended_ones_have_none() {
        let logits: Vec<f32> = (0..4000).map(|i| (i % 7) as f32).collect();
        let r = request(1.0, 0, 1.0);
        let bytes: Vec<u8> = logits.iter().flat_map(|x| x.to_le_bytes()).collect();
        let halves: Vec<u8> = logits.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
        // The third row is the fourth text's, the text before it has given its row up.
        let texts = [Some(0), None, Some(3), Some(4)];
        let alone = |row: usize, text: usize| pick(&logits[row * 1000..][..1000], &r, text, 3).unwrap();
        let expected: Vec<_> = texts.iter().enumerate().map(|(row, text)| text.map(|text| alone(row, text))).collect();
        for sampler in [Sampler::new(1).unwrap(), Sampler::new(3).unwrap()] {
            assert_eq!(sampler.next_tokens(&bytes, Dtype::F32, &texts, &r, 3).unwrap(), expected);
            assert_eq!(sampler.next_tokens(&halves, Dtype::Bf16, &texts, &r, 3).unwrap(), expected);
        }
        assert!(expected[0] != expected[2] && expected[2] != expected[3]);
    }

    /// The same by sorting everything.
    fn sorted(logits: &[f32], r: &GenerateRequest, u: f64) -> u32 {
        let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)));
        if r.top_k > 0 {
            order.truncate(r.top_k);
        }
        let weight = |i: &u32| ((logits[*i as usize] - best) as f64 / r.temperature).exp();
        let total: f64 = order.iter().map(weight).sum();
        if r.top_p < 1.0 {
            let mut before = 0.0;
            let n = order.iter().take_while(|i| {
                let keep = before < r.top_p * total;
                before += weight(i);
                keep
            });
            let n = n.count();
            order.truncate(n);
        }
        let mut left = u * order.iter().map(weight).sum::<f64>();
        *order
            .iter()
            .find(|i| {
                left -= weight(i);
                left < 0.0
            })
            .unwrap_or(order.last().unwrap())
    }

    proptest! {
        #[test]
        fn buckets_draw_what_sorting_draws(
            logits in proptest::collection::vec(prop_oneof![4 => -30f32..30.0, 1 => Just(2.5f32), 1 => Just(f32::NEG_INFINITY)], 1..400),
            temperature in 0.05f64..5.0, top_k in 0usize..50, p in 0.01f64..1.2, step in 0usize..1000,
        ) {
            prop_assume!(logits.iter().any(|x| x.is_finite()));
            let r = request(temperature, top_k, p.min(1.0));
            let drawn = pick(&logits, &r, 0, step).unwrap();
            prop_assert_eq!(drawn, sorted(&logits, &r, uniform(r.seed, 0, step as u64)));
        }
    }
}
