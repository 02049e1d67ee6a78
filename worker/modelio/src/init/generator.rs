//! Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and two distributions.

/// Random numbers of one tensor: block `n` gives elements `4n .. 4n + 4`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Generator {
    key: [u32; 2],
    stream: [u32; 2],
}

impl Generator {
    /// The generator of the tensor `name` under `seed`.
    pub(super) fn new(seed: u64, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"ramtorch seeded weights v1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        let hash = hasher.finalize();
        let words: Vec<u32> = hash.as_bytes().as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b)).collect();
        Generator { key: [words[0], words[1]], stream: [words[2], words[3]] }
    }

    /// Elements `start .. start + out.len()` of `distribution`, times `scale`.
    pub(super) fn fill(&self, start: u64, out: &mut [f32], distribution: Distribution, scale: f32) {
        let skip = (start % 4) as usize;
        let head = if skip == 0 { 0 } else { (4 - skip).min(out.len()) };
        let (first, rest) = out.split_at_mut(head);
        if head > 0 {
            first.copy_from_slice(&self.block(start / 4, distribution, scale)[skip..skip + head]);
        }
        let n = (start + head as u64) / 4;
        let (blocks, tail) = rest.as_chunks_mut::<4>();
        // The same operations on every instruction set, each rounded on its own: the same bits.
        pulp::Arch::new().dispatch(|| {
            for (i, some) in blocks.chunks_mut(LANES).enumerate() {
                let values = self.blocks(n + (i * LANES) as u64, distribution, scale);
                for (lane, four) in some.iter_mut().enumerate() {
                    *four = values.each_ref().map(|v| v[lane]);
                }
            }
        });
        if !tail.is_empty() {
            let last = self.block(n + blocks.len() as u64, distribution, scale);
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }

    fn block(&self, n: u64, distribution: Distribution, scale: f32) -> [f32; 4] {
        self.blocks(n, distribution, scale).map(|v| v[0])
    }

    /// Blocks `n .. n + LANES`, one a lane: their first elements, their second ones, …
    #[inline(always)]
    fn blocks(&self, n: u64, distribution: Distribution, scale: f32) -> [Lanes<f32>; 4] {
        let number = |lane| n.wrapping_add(lane as u64);
        let counter = [lanes(|i| number(i) as u32), lanes(|i| (number(i) >> 32) as u32), [self.stream[0]; LANES], [self.stream[1]; LANES]];
        let bits = philox(counter, self.key);
        let mut values = match distribution {
            Distribution::Uniform => bits.map(|b| lanes(|i| uniform(b[i]))),
            Distribution::Normal => {
                let [a, b, c, d] = bits;
                let [(x, y), (z, w)] = [normal_pair(&a, &b), normal_pair(&c, &d)];
                [x, y, z, w]
            }
        };
        values.iter_mut().flatten().for_each(|v| *v *= scale);
        values
    }
}

/// What numbers are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Distribution {
    /// From -1 to 1, both excluded, in steps of 2^-23.
    Uniform,
    /// Mean 0, standard deviation 1, by the transform of Box and Muller: each pair of words gives two. None is beyond 6.8.
    Normal,
}

/// Blocks that are computed side by side: loops over lanes become vector instructions.
const LANES: usize = 32;
type Lanes<T> = [T; LANES];

#[inline(always)]
fn lanes<T: Copy + Default>(f: impl Fn(usize) -> T) -> Lanes<T> {
    let mut out = [T::default(); LANES];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

/// Ten rounds of Philox 4x32 in every lane.
#[inline(always)]
fn philox(mut c: [Lanes<u32>; 4], mut key: [u32; 2]) -> [Lanes<u32>; 4] {
    for _ in 0..10 {
        for i in 0..LANES {
            let a = u64::from(c[0][i]) * 0xD251_1F53;
            let b = u64::from(c[2][i]) * 0xCD9E_8D57;
            (c[0][i], c[1][i], c[2][i], c[3][i]) =
                ((b >> 32) as u32 ^ c[1][i] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3][i] ^ key[1], a as u32);
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[inline(always)]
fn uniform(bits: u32) -> f32 {
    ((bits >> 8) as f32 + 0.5) * (1.0 / 8_388_608.0) - 1.0
}

#[inline(always)]
fn normal_pair(a: &Lanes<u32>, b: &Lanes<u32>) -> (Lanes<f32>, Lanes<f32>) {
    let (mut x, mut y) = ([0f32; LANES], [0f32; LANES]);
    for i in 0..LANES {
        let radius = (-2.0 * ln_unit(a[i])).sqrt();
        let (sin, cos) = sin_cos_turn(b[i]);
        (x[i], y[i]) = ((radius * cos) as f32, (radius * sin) as f32);
    }
    (x, y)
}

/// Natural logarithm of `(a + 1/2) / 2^32`, to about 1e-12.
#[inline(always)]
fn ln_unit(a: u32) -> f64 {
    let x = f64::from(a) + 0.5;
    let bits = x.to_bits();
    // x = m * 2^e with m from sqrt(1/2) to sqrt(2), so that the series below converges fast.
    let offset = bits.wrapping_sub(0x3fe6_a09e_667f_3bcd);
    let e = (offset >> 32) as i32 >> 20;
    let m = f64::from_bits(bits.wrapping_sub((i64::from(e) as u64) << 52));
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let series =
        1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q / 15.0))))));
    2.0 * s * series + f64::from(e - 32) * std::f64::consts::LN_2
}

/// Sine and cosine of the angle `b / 2^32` of a turn, to about 1e-11.
#[inline(always)]
fn sin_cos_turn(b: u32) -> (f64, f64) {
    // The nearest quarter turn, and what is left: within an eighth of a turn either way.
    let quarter = b.wrapping_add(1 << 29) >> 30;
    let rest = f64::from(b.wrapping_sub(quarter << 30) as i32) * (std::f64::consts::TAU / 4_294_967_296.0);
    let q = rest * rest;
    let sin = rest * (1.0 - q / 6.0 * (1.0 - q / 20.0 * (1.0 - q / 42.0 * (1.0 - q / 72.0 * (1.0 - q / 110.0)))));
    let cos = 1.0 - q / 2.0 * (1.0 - q / 12.0 * (1.0 - q / 30.0 * (1.0 - q / 56.0 * (1.0 - q / 90.0 * (1.0 - q / 132.0)))));
    // Quarter turns swap the two and change signs.
    let (s, c) = if quarter & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let (minus_s, minus_c) = (u64::from(quarter >> 1), u64::from((quarter ^ quarter >> 1) & 1));
    (f64::from_bits(s.to_bits() ^ minus_s << 63), f64::from_bits(c.to_bits() ^ minus_c << 63))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Known answers of Random123.
        let philox = |c: [u32; 4], key| super::philox(c.map(|x| [x; LANES]), key).map(|v| v[LANES - 1]);
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn own_functions_agree_with_the_library() {
        for i in 0..200_000u32 {
            let b = i.wrapping_mul(2_654_435_761);
            let exact = ((f64::from(b) + 0.5) / 4_294_967_296.0).ln();
            assert!((ln_unit(b) - exact).abs() < 1e-11 * exact.abs().max(1.0), "{b}");
            let angle = f64::from(b) / 4_294_967_296.0 * std::f64::consts::TAU;
            let (sin, cos) = sin_cos_turn(b);
            assert!((sin - angle.sin()).abs() < 1e-10 && (cos - angle.cos()).abs() < 1e-10, "{b}");
        }
        for edge in [0, 1, u32::MAX, 1 << 29, (1 << 29) - 1, 1 << 30, 1 << 31, 3 << 30] {
            let angle = f64::from(edge) / 4_294_967_296.0 * std::f64::consts::TAU;
            let (sin, cos) = sin_cos_turn(edge);
            assert!((sin - angle.sin()).abs() < 1e-10 && (cos - angle.cos()).abs() < 1e-10, "{edge}");
            assert!(ln_unit(edge) < 0.0);
        }
    }
}
