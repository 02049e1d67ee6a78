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

    /// Elements `start .. start + out.len()`, four at a time through `distribution`.
    pub(super) fn fill(&self, start: u64, out: &mut [f32], distribution: impl Fn([u32; 4]) -> [f32; 4]) {
        let block = |n: u64| distribution(philox([n as u32, (n >> 32) as u32, self.stream[0], self.stream[1]], self.key));
        let skip = (start % 4) as usize;
        let head = if skip == 0 { 0 } else { (4 - skip).min(out.len()) };
        let (first, rest) = out.split_at_mut(head);
        if head > 0 {
            first.copy_from_slice(&block(start / 4)[skip..skip + head]);
        }
        let n = (start + head as u64) / 4;
        let (blocks, tail) = rest.as_chunks_mut::<4>();
        for (i, four) in blocks.iter_mut().enumerate() {
            *four = block(n + i as u64);
        }
        if !tail.is_empty() {
            let last = block(n + blocks.len() as u64);
            tail.copy_from_slice(&last[..tail.len()]);
        }
    }
}

/// Ten rounds of Philox 4x32.
fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(c[0]) * 0xD251_1F53;
        let b = u64::from(c[2]) * 0xCD9E_8D57;
        c = [(b >> 32) as u32 ^ c[1] ^ key[0], b as u32, (a >> 32) as u32 ^ c[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

/// From -1 to 1, both excluded, in steps of 2^-23.
pub(super) fn uniform4(bits: [u32; 4]) -> [f32; 4] {
    bits.map(|b| ((b >> 8) as f32 + 0.5) * (1.0 / 8_388_608.0) - 1.0)
}

/// Standard normal numbers by the transform of Box and Muller: each pair of words gives two. None is beyond 6.8.
pub(super) fn normal4(bits: [u32; 4]) -> [f32; 4] {
    let pair = |a: u32, b: u32| {
        let radius = (-2.0 * ln_unit(a)).sqrt();
        let (sin, cos) = sin_cos_turn(b);
        ((radius * cos) as f32, (radius * sin) as f32)
    };
    let (x, y) = pair(bits[0], bits[1]);
    let (z, w) = pair(bits[2], bits[3]);
    [x, y, z, w]
}

/// Natural logarithm of `(a + 1/2) / 2^32`, to about 1e-12.
fn ln_unit(a: u32) -> f64 {
    let x = f64::from(a) + 0.5;
    let bits = x.to_bits();
    // x = m * 2^e with m from sqrt(1/2) to sqrt(2), so that the series below converges fast.
    let offset = bits.wrapping_sub(0x3fe6_a09e_667f_3bcd);
    let e = (offset as i64) >> 52;
    let m = f64::from_bits(bits.wrapping_sub((e as u64) << 52));
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let series =
        1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q / 15.0))))));
    2.0 * s * series + (e - 32) as f64 * std::f64::consts::LN_2
}

/// Sine and cosine of the angle `b / 2^32` of a turn, to about 1e-11.
fn sin_cos_turn(b: u32) -> (f64, f64) {
    // The nearest quarter turn, and what is left: within an eighth of a turn either way.
    let quarter = b.wrapping_add(1 << 29) >> 30;
    let rest = f64::from(b.wrapping_sub(quarter << 30) as i32) * (std::f64::consts::TAU / 4_294_967_296.0);
    let q = rest * rest;
    let sin = rest * (1.0 - q / 6.0 * (1.0 - q / 20.0 * (1.0 - q / 42.0 * (1.0 - q / 72.0 * (1.0 - q / 110.0)))));
    let cos = 1.0 - q / 2.0 * (1.0 - q / 12.0 * (1.0 - q / 30.0 * (1.0 - q / 56.0 * (1.0 - q / 90.0 * (1.0 - q / 132.0)))));
    match quarter {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        // Known answers of Random123.
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
