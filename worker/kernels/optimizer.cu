// AdamW on staged parts of a page, bit for bit as the CPU does it.
//
// Each operation is rounded on its own: the intrinsics below are never fused or reordered, and the compiler is run without
// fast-math options, so subnormal numbers are kept. Division and root are the correctly rounded ones.
#include "common.cuh"

struct Factors {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, sqrt_bias2, eps, gradient_scale;
};

DEVICE float widen(float x) { return x; }
DEVICE float widen(u16 x) { return __uint_as_float((u32)x << 16); }

// Random bits of parameter i in a step; streams 1 and 2 are those of the two moments.
DEVICE u32 random_bits(u64 step, u64 i, u64 stream) {
  u64 x = (i ^ (step << 40)) + stream * 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return (u32)(x >> 48);
}

DEVICE void narrow(float x, u64, u64, u64, float& out) { out = x; }
// Stochastic rounding; infinities and NaNs stay what they are.
DEVICE void narrow(float x, u64 step, u64 i, u64 stream, u16& out) {
  u32 b = __float_as_uint(x);
  u32 quiet = (b & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u;
  out = (b & 0x7f800000u) == 0x7f800000u ? (u16)((b >> 16) | quiet) : (u16)((b + random_bits(step, i, stream)) >> 16);
}

// Parameters first .. first + count of the store, in place, in arrays that begin with parameter `first`; the new weights go to
// `weights` as well, where that is not null.
template <typename M, typename G, int V>
DEVICE void adamw(u16* hi, u16* lo, M* m, M* v, const G* g, u16* weights, u64 count, u64 first, u64 step, float keep, const Factors& k) {
  for (u64 at = thread_index() * V; at < count; at += thread_count() * V) {
    Pack<u16, V> H = *reinterpret_cast<const Pack<u16, V>*>(hi + at);
    Pack<u16, V> L = *reinterpret_cast<const Pack<u16, V>*>(lo + at);
    Pack<M, V> M1 = *reinterpret_cast<const Pack<M, V>*>(m + at);
    Pack<M, V> M2 = *reinterpret_cast<const Pack<M, V>*>(v + at);
    Pack<G, V> D = *reinterpret_cast<const Pack<G, V>*>(g + at);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float d = __fmul_rn(widen(D.v[i]), k.gradient_scale);
      float a = __fadd_rn(__fmul_rn(k.beta1, widen(M1.v[i])), __fmul_rn(k.one_minus_beta1, d));
      float b = __fadd_rn(__fmul_rn(k.beta2, widen(M2.v[i])), __fmul_rn(__fmul_rn(k.one_minus_beta2, d), d));
      float p = __uint_as_float(((u32)H.v[i] << 16) + (u32)(int)(short)L.v[i]);
      float root = __fadd_rn(__fdiv_rn(__fsqrt_rn(b), k.sqrt_bias2), k.eps);
      p = __fsub_rn(__fmul_rn(p, keep), __fmul_rn(k.step_size, __fdiv_rn(a, root)));
      u32 bits = __float_as_uint(p);
      H.v[i] = (u16)((bits + 0x8000u) >> 16);
      L.v[i] = (u16)bits;
      narrow(a, step, first + at + i, 1, M1.v[i]);
      narrow(b, step, first + at + i, 2, M2.v[i]);
    }
    *reinterpret_cast<Pack<u16, V>*>(hi + at) = H;
    if (weights) *reinterpret_cast<Pack<u16, V>*>(weights + at) = H;
    *reinterpret_cast<Pack<u16, V>*>(lo + at) = L;
    *reinterpret_cast<Pack<M, V>*>(m + at) = M1;
    *reinterpret_cast<Pack<M, V>*>(v + at) = M2;
  }
}

// Named by the formats of moments and gradients. Those that end in `_v` take four parameters at a time.
#define KERNEL(NAME, M, G, V)                                                                                               \
  extern "C" __global__ void __launch_bounds__(256)                                                                         \
      NAME(u16* hi, u16* lo, M* m, M* v, const G* g, u16* weights, u64 count, u64 first, u64 step, float keep, Factors k) { \
    adamw<M, G, V>(hi, lo, m, v, g, weights, count, first, step, keep, k);                                                  \
  }
KERNEL(adamw_f32_f32_v, float, float, 4)
KERNEL(adamw_f32_f32_s, float, float, 1)
KERNEL(adamw_f32_bf16_v, float, u16, 4)
KERNEL(adamw_f32_bf16_s, float, u16, 1)
KERNEL(adamw_bf16_f32_v, u16, float, 4)
KERNEL(adamw_bf16_f32_s, u16, float, 1)
KERNEL(adamw_bf16_bf16_v, u16, u16, 4)
KERNEL(adamw_bf16_bf16_s, u16, u16, 1)
