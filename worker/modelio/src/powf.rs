//! `x` to the power `y` in fp32, with the bits that PyTorch gives on CPUs with fused multiply-add.
//!
//! PyTorch takes its vectorised power from SLEEF (`Sleef_powf8_u10`, at most one unit in the last place from the true
//! value). A correctly rounded power differs from it in one result of a hundred, and rotary frequencies should be those
//! the model was trained with. This is that algorithm for what rotary frequencies need, positive normal `x` and results in
//! the normal range: the logarithm as an unevaluated sum of two floats, times `y`, through the exponential.

/// A number as the unevaluated sum of a float and a much smaller one.
#[derive(Clone, Copy)]
struct Double {
    hi: f32,
    lo: f32,
}

/// `x` to the power `y`; `x` positive and normal.
pub(crate) fn powf(x: f32, y: f32) -> f32 {
    exp(mul_float(ln(x), y))
}

fn ln(d: f32) -> Double {
    let (m, e) = mantissa_exponent(d);
    let x = div(sum(-1.0, m), sum(1.0, m));
    let x2 = square(x);
    let mut t = 0.240_320_35f32;
    t = t.mul_add(x2.hi, 0.285_112_68);
    t = t.mul_add(x2.hi, 0.400_008);
    let c = Double { hi: 0.666_666_6, lo: 3.691_838_6e-9 };
    let mut s = mul_float(Double { hi: std::f32::consts::LN_2, lo: -1.904_654_3e-9 }, e);
    s = add(s, Double { hi: x.hi * 2.0, lo: x.lo * 2.0 });
    add(s, mul(mul(x2, x), add(mul_float(x2, t), c)))
}

fn exp(d: Double) -> f32 {
    const LN2_HI: f32 = 0.693_145_75;
    const LN2_LO: f32 = 1.428_606_8e-6;
    let q = ((d.hi + d.lo) * std::f32::consts::LOG2_E).round_ties_even();
    let mut s = add_float(d, q * -LN2_HI);
    s = add_float(s, q * -LN2_LO);
    s = normalised(s.hi, s.lo);
    let mut u = 0.001_363_246_5f32;
    u = u.mul_add(s.hi, 0.008_365_969);
    u = u.mul_add(s.hi, 0.041_671_082);
    u = u.mul_add(s.hi, 0.166_665_52);
    u = u.mul_add(s.hi, 0.499_999_85);
    let t = add(s, mul_float(square(s), u));
    let hi = 1.0 + t.hi;
    let t = Double { hi, lo: (1.0 - hi) + t.hi + t.lo };
    (t.hi + t.lo) * exp2(q)
}

/// `d = m * 2^e` with `m` from 3/4 to 3/2.
fn mantissa_exponent(d: f32) -> (f32, f32) {
    let exponent = (((d * (1.0 / 0.75)).to_bits() >> 23) & 0xff) as i32 - 127;
    (d * exp2(-exponent as f32), exponent as f32)
}

/// Two to a whole power within the normal range.
fn exp2(e: f32) -> f32 {
    f32::from_bits(((e as i32 + 127) as u32) << 23)
}

fn normalised(hi: f32, lo: f32) -> Double {
    let sum = hi + lo;
    Double { hi: sum, lo: (hi - sum) + lo }
}

/// Exact sum of two floats in any order of size.
fn sum(x: f32, y: f32) -> Double {
    let hi = x + y;
    let v = hi - x;
    Double { hi, lo: (x - (hi - v)) + (y - v) }
}

fn add_float(x: Double, y: f32) -> Double {
    let s = sum(x.hi, y);
    Double { hi: s.hi, lo: s.lo + x.lo }
}

/// Sum where the first is the larger.
fn add(x: Double, y: Double) -> Double {
    let hi = x.hi + y.hi;
    Double { hi, lo: (x.hi - hi) + y.hi + x.lo + y.lo }
}

fn mul_float(x: Double, y: f32) -> Double {
    let hi = x.hi * y;
    Double { hi, lo: x.lo.mul_add(y, x.hi.mul_add(y, -hi)) }
}

fn mul(x: Double, y: Double) -> Double {
    let hi = x.hi * y.hi;
    Double { hi, lo: x.hi.mul_add(y.lo, x.lo.mul_add(y.hi, x.hi.mul_add(y.hi, -hi))) }
}

fn square(x: Double) -> Double {
    let hi = x.hi * x.hi;
    Double { hi, lo: (x.hi + x.hi).mul_add(x.lo, x.hi.mul_add(x.hi, -hi)) }
}

fn div(n: Double, d: Double) -> Double {
    let t = 1.0 / d.hi;
    let hi = n.hi * t;
    let u = t.mul_add(n.hi, -hi);
    let v = (-d.lo).mul_add(t, (-d.hi).mul_add(t, 1.0));
    Double { hi, lo: hi.mul_add(v, n.lo.mul_add(t, u)) }
}

#[cfg(test)]
mod tests {
    use super::powf;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_error_is_at_most_one_unit_in_the_last_place(x in 1.5f32..1e8, y in 0f32..1.0) {
            let exact = f64::from(x).powf(f64::from(y));
            let unit = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            prop_assert!((f64::from(powf(x, y)) - exact).abs() <= unit);
        }
    }

    #[test]
    fn a_power_that_is_not_correctly_rounded_is_pytorchs() {
        // torch.pow(150000.0, torch.tensor(0.3125)): one unit below the correctly rounded value.
        let (x, y) = (150_000.0f32, 10.0 / 32.0);
        assert_eq!(1.0 / powf(x, y), f32::from_bits(0x3cc5_a246));
        assert_eq!(powf(10_000.0, 0.0), 1.0);
    }
}
