//! Loops compiled for several instruction sets, chosen at run time, and the vectorisable functions they call.

/// Defines functions whose bodies are compiled for the baseline, for AVX2 and for AVX-512, and dispatches at run time.
/// The bodies are plain loops that LLVM vectorises.
macro_rules! simd {
    ($($(#[$m:meta])* fn $name:ident $(<$g:ident: $b:path>)? ($($a:ident: $t:ty),* $(,)?) $(-> $r:ty)? $body:block)*) => {$(
        $(#[$m])*
        pub(crate) fn $name$(<$g: $b>)?($($a: $t),*) $(-> $r)? {
            $crate::simd::leveled! { fn at$(<$g: $b>)?($($a: $t),*) $(-> $r)? $body }
            at$(::<$g>)?($crate::simd::Level::best(), $($a),*)
        }
    )*};
}
pub(crate) use simd;

/// As [`simd!`], with the [`Level`] as the first argument of each function.
macro_rules! leveled {
    ($($(#[$m:meta])* fn $name:ident $(<$g:ident: $b:path>)? ($($a:ident: $t:ty),* $(,)?) $(-> $r:ty)? $body:block)*) => {$(
        $(#[$m])*
        #[inline(always)]
        fn $name$(<$g: $b>)?(level: $crate::simd::Level, $($a: $t),*) $(-> $r)? {
            #[inline(always)]
            fn body$(<$g: $b>)?($($a: $t),*) $(-> $r)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2$(<$g: $b>)?($($a: $t),*) $(-> $r)? { body$(::<$g>)?($($a),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn avx512$(<$g: $b>)?($($a: $t),*) $(-> $r)? { body$(::<$g>)?($($a),*) }
                match level.number() {
                    // SAFETY: a level exists only where the CPU has reported its features.
                    2 => return unsafe { avx512$(::<$g>)?($($a),*) },
                    // SAFETY: as above.
                    1 => return unsafe { avx2$(::<$g>)?($($a),*) },
                    _ => {}
                }
            }
            let _ = level;
            body$(::<$g>)?($($a),*)
        }
    )*};
}
pub(crate) use leveled;

/// An instruction set that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(u8);

impl Level {
    /// The widest that this CPU has.
    pub fn best() -> Level {
        use std::sync::OnceLock;
        static BEST: OnceLock<u8> = OnceLock::new();
        Level(*BEST.get_or_init(detect))
    }

    /// All that this CPU has, narrowest first.
    pub fn all() -> impl Iterator<Item = Level> {
        (0..=Level::best().0).map(Level)
    }

    /// 2: AVX-512, 1: AVX2, 0: baseline.
    pub(crate) fn number(self) -> u8 {
        self.0
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(["baseline", "AVX2", "AVX-512"][self.0 as usize])
    }
}

fn detect() -> u8 {
    #[cfg(target_arch = "x86_64")]
    {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq");
        return if avx2 && avx512 { 2 } else { u8::from(avx2) };
    }
    #[allow(unreachable_code)]
    0
}

/// e^x within 2 units in the last place, branch-free so that loops over it vectorise. Underflows to 0 below -87.3;
/// large x gives infinity. Range reduction by ln 2 in two parts, then the Cephes polynomial (cephes/single/expf.c).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let c = x.clamp(-88.0, 88.8);
    let n = (c * std::f32::consts::LOG2_E + 12582912.0) - 12582912.0; // rounds to the nearest integer
    let r = c - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    // 2^n in two factors, so that neither leaves the normal range.
    let i = n as i32;
    let half = i >> 1;
    let pow = |e: i32| f32::from_bits(((e + 127) as u32) << 23);
    let z = y * pow(half) * pow(i - half);
    if x < -87.3 {
        0.0
    } else if x > 88.72 {
        f32::INFINITY
    } else if x.is_nan() {
        x
    } else {
        z
    }
}

/// tanh(x) from [`exp`], exact to a few units in the last place away from 0 and by its series near it.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let a = x.abs().min(20.0);
    let e = exp(-2.0 * a);
    let large = (1.0 - e) / (1.0 + e);
    let s = a * a;
    let small = a * (1.0 + s * (-0.333_333_34 + s * (0.133_333_34 + s * (-0.053_968_254 + s * 0.021_869_488))));
    let t = if a < 0.25 { small } else { large };
    let t = if x < 0.0 { -t } else { t };
    if x.is_nan() { x } else { t }
}

/// erf(x) by the C library in double precision: exact to f32 rounding. Slow, and rarely wanted (`gelu` without tanh).
#[inline(always)]
pub(crate) fn erf(x: f32) -> f32 {
    // SAFETY: a pure function of the C library.
    unsafe { libc_erf(x as f64) as f32 }
}

unsafe extern "C" {
    #[link_name = "erf"]
    fn libc_erf(x: f64) -> f64;
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_everywhere() {
        let mut worst = 0f64;
        for i in 0..2_000_000 {
            let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
            let want = (x as f64).exp();
            worst = worst.max(((exp(x) as f64 - want) / want).abs());
        }
        assert!(worst < 2.5e-7, "{worst:e}");
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(100.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn tanh_is_close_everywhere() {
        for i in -400_000..400_000 {
            let x = i as f32 * 3e-5;
            let want = (x as f64).tanh();
            assert!((tanh(x) as f64 - want).abs() <= 4e-7 * want.abs() + 1e-12, "{x}: {} {want}", tanh(x));
        }
        assert!(tanh(f32::NAN).is_nan());
    }
}
