// Between the parameter store's formats and the device's: the split master weight in, gradients out.
#include "common.cuh"

// Small inputs, from page-locked memory of the host.
extern "C" __global__ void __launch_bounds__(256) upload(u8* dst, const u8* src, u64 bytes) {
  u64 wide = (((u64)dst | (u64)src) & 15) == 0 ? bytes / 16 : 0;
  for (u64 i = thread_index(); i < wide; i += thread_count())
    reinterpret_cast<uint4*>(dst)[i] = reinterpret_cast<const uint4*>(src)[i];
  for (u64 i = wide * 16 + thread_index(); i < bytes; i += thread_count()) dst[i] = src[i];
}

// The fp32 master: bf16 weight (nearest) and signed 16-bit remainder, exact for every bit pattern.
extern "C" __global__ void __launch_bounds__(256) join_master(const u16* hi, const u16* lo, float* out, u64 count) {
  for (u64 i = thread_index(); i < count; i += thread_count())
    out[i] = __uint_as_float(((u32)hi[i] << 16) + (u32)(int)(short)lo[i]);
}

// staging = gradient, or staging += gradient, in the store's format.
template <typename T, int V> DEVICE void stage_gradient(const float* gradient, T* staging, u64 count, int accumulate) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V], b[V];
    load_f32<V>(gradient + i, a);
    if (accumulate) {
      load<T, V>(staging + i, b);
#pragma unroll
      for (int k = 0; k < V; k++) a[k] += b[k];
    }
    store<T, V>(staging + i, a);
  }
}

extern "C" __global__ void __launch_bounds__(256) stage_gradient_bf16_v(const float* g, bf16* staging, u64 count, int accumulate) {
  stage_gradient<bf16, 8>(g, staging, count, accumulate);
}
extern "C" __global__ void __launch_bounds__(256) stage_gradient_bf16_s(const float* g, bf16* staging, u64 count, int accumulate) {
  stage_gradient<bf16, 1>(g, staging, count, accumulate);
}
extern "C" __global__ void __launch_bounds__(256) stage_gradient_f32_v(const float* g, float* staging, u64 count, int accumulate) {
  stage_gradient<float, 4>(g, staging, count, accumulate);
}
extern "C" __global__ void __launch_bounds__(256) stage_gradient_f32_s(const float* g, float* staging, u64 count, int accumulate) {
  stage_gradient<float, 1>(g, staging, count, accumulate);
}
