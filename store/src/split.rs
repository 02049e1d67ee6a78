//! A 32-bit float as a bf16 and sixteen further bits, exactly.
//!
//! The high half is the nearest bf16 (ties away from zero), ready for use as it is; the low half is the low sixteen bits
//! of the float. Read as a signed number, the low half is what rounding took away or added, so `high << 16` plus the low
//! half is the float again. The sum wraps, which makes it exact for every bit pattern, infinities and NaNs included.
//!
//! The high half alone follows the rounding: the largest finite floats become infinity, and the NaNs whose payload lies
//! in the low bits (`0x7f80_0001..0x7f80_8000`) become infinity, those at the very top (`0x7fff_8000..`) a zero. The NaNs
//! that arithmetic makes (`0x7fc0_0000`, `0xffc0_0000`) stay NaNs.

/// `x` as (nearest bf16, low sixteen bits).
#[inline(always)]
pub fn split(x: f32) -> (u16, u16) {
    let bits = x.to_bits();
    ((bits.wrapping_add(0x8000) >> 16) as u16, bits as u16)
}

/// The float that [`split`] took apart.
#[inline(always)]
pub fn join(hi: u16, lo: u16) -> f32 {
    f32::from_bits((u32::from(hi) << 16).wrapping_add(lo as i16 as i32 as u32))
}

/// [`split`] of each of `x`.
///
/// # Panics
/// When the lengths differ.
pub fn split_slice(x: &[f32], hi: &mut [u16], lo: &mut [u16]) {
    assert!(x.len() == hi.len() && x.len() == lo.len(), "split of {} floats into {} and {} halves", x.len(), hi.len(), lo.len());
    for ((x, hi), lo) in x.iter().zip(hi).zip(lo) {
        (*hi, *lo) = split(*x);
    }
}

/// [`join`] of each pair.
///
/// # Panics
/// When the lengths differ.
pub fn join_slice(hi: &[u16], lo: &[u16], x: &mut [f32]) {
    assert!(x.len() == hi.len() && x.len() == lo.len(), "join of {} and {} halves into {} floats", hi.len(), lo.len(), x.len());
    for ((x, hi), lo) in x.iter_mut().zip(hi).zip(lo) {
        *x = join(*hi, *lo);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    fn exact(bits: u32) {
        let (hi, lo) = split(f32::from_bits(bits));
        assert_eq!(join(hi, lo).to_bits(), bits, "{bits:#010x} split into {hi:#06x}, {lo:#06x}");
    }

    #[test]
    fn every_high_half_with_sampled_low_halves_is_exact() {
        let mut lows: Vec<u32> = vec![0, 1, 2, 0x7ffe, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff];
        lows.extend((0..16).map(|bit| 1 << bit));
        // An odd stride visits residues of every kind without a generator.
        lows.extend((0..64).map(|i| (i * 40503) & 0xffff));
        for hi in 0..=0xffffu32 {
            for lo in &lows {
                exact(hi << 16 | lo);
            }
        }
    }

    #[test]
    fn every_low_half_with_special_high_halves_is_exact() {
        for hi in
            [0x0000u32, 0x8000, 0x0001, 0x007f, 0x0080, 0x3f80, 0xbf80, 0x7f7f, 0x7f80, 0x7fc0, 0x7fff, 0xff7f, 0xff80, 0xffc0, 0xffff]
        {
            for lo in 0..=0xffffu32 {
                exact(hi << 16 | lo);
            }
        }
    }

    #[test]
    fn special_values_are_exact() {
        for x in [
            0.0,
            -0.0,
            1.0,
            -1.0,
            f32::MIN,
            f32::MAX,
            f32::MIN_POSITIVE,
            -f32::MIN_POSITIVE,
            f32::EPSILON,
            f32::INFINITY,
            f32::NEG_INFINITY,
        ] {
            exact(x.to_bits());
        }
        // Least and greatest subnormal; quiet, signalling, extreme and negative NaNs.
        for bits in [1, 0x807f_ffff, 0x007f_ffff, 0x7fc0_0000, 0xffc0_0000, 0x7f80_0001, 0x7fbf_ffff, 0x7fff_ffff, 0xffff_ffff, 0xff80_0001]
        {
            exact(bits);
        }
    }

    #[test]
    fn the_high_half_is_the_nearest_bf16() {
        let mut bits = 0u32;
        for _ in 0..2_000_000 {
            bits = bits.wrapping_add(0x9e37_79b1);
            let x = f32::from_bits(bits);
            if x.is_nan() {
                continue;
            }
            let (hi, lo) = split(x);
            if lo == 0x8000 {
                // A tie: either neighbour is nearest. Ours is the one away from zero.
                assert_eq!(hi, ((bits >> 16) as u16).wrapping_add(1));
            } else {
                assert_eq!(hi, bf16::from_f32(x).to_bits(), "{x:e}");
            }
        }
        for nan in [0x7fc0_0000u32, 0xffc0_0000] {
            assert!(bf16::from_bits(split(f32::from_bits(nan)).0).is_nan());
        }
    }

    #[test]
    fn slices_agree_with_single_values_at_every_length() {
        for n in [0usize, 1, 7, 8, 15, 16, 17, 31, 33, 64, 1000] {
            let x: Vec<f32> = (0..n).map(|i| f32::from_bits((i as u32).wrapping_mul(0x9e37_79b1))).collect();
            let (mut hi, mut lo, mut back) = (vec![0; n], vec![0; n], vec![0.0; n]);
            split_slice(&x, &mut hi, &mut lo);
            join_slice(&hi, &lo, &mut back);
            for i in 0..n {
                assert_eq!((hi[i], lo[i]), split(x[i]));
                assert_eq!(back[i].to_bits(), x[i].to_bits());
            }
        }
    }

    #[test]
    #[should_panic(expected = "split of 2 floats")]
    fn unequal_lengths_are_refused() {
        split_slice(&[1.0, 2.0], &mut [0], &mut [0, 0]);
    }
}
