// AdamW on pages, bit for bit as the CPU does it.
//
// Each operation is rounded on its own: the intrinsics below are never fused or reordered, and the compiler is run without
// fast-math options, so subnormal numbers are kept. Division and root are the correctly rounded ones.
#include "common.cuh"

struct Factors {
  float beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, root_scale, eps, gradient_scale;
};

DEVICE float widen(float x) { return x; }
DEVICE float widen(u16 x) { return __uint_as_float((u32)x << 16); }

// Random bits of parameter i in a step, 16 for each moment.
DEVICE u32 random_bits(u64 step, u64 i) {
  u64 key = (step * 0x9E3779B97F4A7C15ull) ^ (i >> 32);
  key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
  key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
  u32 x = (u32)i ^ (u32)(key >> 32);
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Stochastic rounding; infinities and NaNs stay what they are.
DEVICE u16 stochastic(float x, u32 random) {
  u32 b = __float_as_uint(x);
  u32 quiet = (b & 0x7fffffffu) > 0x7f800000u ? 0x40u : 0u;
  return (b & 0x7f800000u) == 0x7f800000u ? (u16)((b >> 16) | quiet) : (u16)((b + random) >> 16);
}
// Both moments as they are stored.
DEVICE void narrow(float a, float b, u64, u64, float& m, float& v) {
  m = a;
  v = b;
}
DEVICE void narrow(float a, float b, u64 step, u64 i, u16& m, u16& v) {
  u32 random = random_bits(step, i);
  m = stochastic(a, random & 0xffffu);
  v = stochastic(b, random >> 16);
}

// Parameters first .. first + count of the store, in place, in arrays that begin with parameter `first`; the new weights go to
// `weights` as well, where that is not null. `whole`: all arrays are aligned to four elements, and there are a multiple of four.
struct Segment {
  u16 *hi, *lo;
  void *m, *v;
  const void* g;
  u16* weights;
  u64 count, first;
  float keep;
  u32 whole;
};

// As many as updater.rs says.
struct Segments {
  Segment of[32];
  u32 count;
};

template <typename M, typename G, int V> DEVICE void update(const Segment& s, u64 at, u64 step, const Factors& k) {
  M *m = (M*)s.m + at, *v = (M*)s.v + at;
  u16 *hi = s.hi + at, *lo = s.lo + at;
  Pack<u16, V> H = *reinterpret_cast<const Pack<u16, V>*>(hi);
  Pack<u16, V> L = *reinterpret_cast<const Pack<u16, V>*>(lo);
  Pack<M, V> M1 = *reinterpret_cast<const Pack<M, V>*>(m);
  Pack<M, V> M2 = *reinterpret_cast<const Pack<M, V>*>(v);
  Pack<G, V> D = *reinterpret_cast<const Pack<G, V>*>((const G*)s.g + at);
#pragma unroll
  for (int i = 0; i < V; i++) {
    float d = __fmul_rn(widen(D.v[i]), k.gradient_scale);
    float a = __fadd_rn(__fmul_rn(k.beta1, widen(M1.v[i])), __fmul_rn(k.one_minus_beta1, d));
    float b = __fadd_rn(__fmul_rn(k.beta2, widen(M2.v[i])), __fmul_rn(__fmul_rn(k.one_minus_beta2, d), d));
    float p = __uint_as_float(((u32)H.v[i] << 16) + (u32)(int)(short)L.v[i]);
    float root = __fadd_rn(__fmul_rn(__fsqrt_rn(b), k.root_scale), k.eps);
    p = __fsub_rn(__fmul_rn(p, s.keep), __fmul_rn(k.step_size, __fdiv_rn(a, root)));
    u32 bits = __float_as_uint(p);
    H.v[i] = (u16)((bits + 0x8000u) >> 16);
    L.v[i] = (u16)bits;
    narrow(a, b, step, s.first + at + i, M1.v[i], M2.v[i]);
  }
  *reinterpret_cast<Pack<u16, V>*>(hi) = H;
  if (s.weights) *reinterpret_cast<Pack<u16, V>*>(s.weights + at) = H;
  *reinterpret_cast<Pack<u16, V>*>(lo) = L;
  *reinterpret_cast<Pack<M, V>*>(m) = M1;
  *reinterpret_cast<Pack<M, V>*>(v) = M2;
}

// A whole page in one launch: beside matrix products, which keep all multiprocessors until their end, each launch waits for the
// end of one.
template <typename M, typename G> DEVICE void adamw(const Segments& all, u64 step, const Factors& k) {
  u64 before = 0, unit = thread_index(); // of four parameters
  for (u32 i = 0; i < all.count; i++) {
    const Segment& s = all.of[i];
    u64 units = (s.count + 3) / 4;
    for (; unit < before + units; unit += thread_count()) {
      u64 at = (unit - before) * 4;
      if (s.whole) {
        update<M, G, 4>(s, at, step, k);
      } else {
        for (u64 end = at + 4 < s.count ? at + 4 : s.count; at < end; at++) update<M, G, 1>(s, at, step, k);
      }
    }
    before += units;
  }
}

// Named by the formats of moments and gradients.
#define KERNEL(NAME, M, G)                                                                                         \
  extern "C" __global__ void __launch_bounds__(256) NAME(const __grid_constant__ Segments all, u64 step, Factors k) { \
    adamw<M, G>(all, step, k);                                                                                     \
  }
KERNEL(adamw_f32_f32, float, float)
KERNEL(adamw_f32_bf16, float, u16)
KERNEL(adamw_bf16_f32, u16, float)
KERNEL(adamw_bf16_bf16, u16, u16)
