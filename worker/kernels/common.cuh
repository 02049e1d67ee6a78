// Shared by every kernel file. No header of the CUDA toolkit is needed: NVRTC alone compiles these sources.
//
// Each file is compiled twice, with REAL_BF16 for the bfloat16 device and without it for the single precision one.
// `real` is the compute format; arithmetic is always in float. Kernels that end in `_v` move 16 bytes at a time and
// need aligned pointers and row lengths that are multiples of VEC; those that end in `_s` take anything.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct bf16 {
  u16 bits;
};

#ifdef REAL_BF16
typedef bf16 real;
#define VEC 8
#else
typedef float real;
#define VEC 4
#endif

#define DEVICE static __device__ __forceinline__
#define INFINITE __int_as_float(0x7f800000)

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }

// To bf16: rounds to nearest, ties to even, in hardware.
template <typename T> DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else {
    T r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
  }
}

// N elements that travel in one access.
template <typename T, int N> struct __align__(sizeof(T) * N) Pack {
  T v[N];
};

template <typename T, int V> DEVICE void load(const T* p, float (&out)[V]) {
  Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int i = 0; i < V; i++) out[i] = to_float(pack.v[i]);
}

template <typename T, int V> DEVICE void store(T* p, const float (&in)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; i++) pack.v[i] = from_float<T>(in[i]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// f32 arrays beside arrays of V reals: V floats in accesses of at most 16 bytes.
template <int V> DEVICE void load_f32(const float* p, float (&out)[V]) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      float4 f = *reinterpret_cast<const float4*>(p + i);
      out[i] = f.x;
      out[i + 1] = f.y;
      out[i + 2] = f.z;
      out[i + 3] = f.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) out[i] = p[i];
  }
}

template <int V> DEVICE void store_f32(float* p, const float (&in)[V]) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4)
      *reinterpret_cast<float4*>(p + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
  } else {
#pragma unroll
    for (int i = 0; i < V; i++) p[i] = in[i];
  }
}

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}

// Sum over the threads of a block along x (blockDim.y is 1); every thread receives it. `shared` holds 32 floats.
// The order of additions depends on the block's shape alone.
DEVICE float block_sum(float v, float* shared) {
  v = warp_sum(v);
  __syncthreads();  // the last use of `shared` is over
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  v = (threadIdx.x & 31) < (blockDim.x >> 5) ? shared[threadIdx.x & 31] : 0.0f;
  return warp_sum(v);
}

DEVICE float block_max(float v, float* shared) {
  v = warp_max(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  v = (threadIdx.x & 31) < (blockDim.x >> 5) ? shared[threadIdx.x & 31] : -INFINITE;
  return warp_max(v);
}

DEVICE u64 thread_index() { return blockIdx.x * (u64)blockDim.x + threadIdx.x; }
DEVICE u64 thread_count() { return gridDim.x * (u64)blockDim.x; }
