// RMS and layer normalisation of rows, or of the heads inside rows.
//
// A vector is handled by blockDim.x threads: 32 (a warp; blockDim.y vectors a block, no barrier) for short vectors, a
// whole block (blockDim.y = 1) for long ones.
#include "common.cuh"

struct Rows {
  u64 vectors;  // rows · groups
  u64 row_stride, offset;
  int groups, width;
  float eps;
};

DEVICE u64 vector_start(const Rows& s, u64 vector) {
  return vector / s.groups * s.row_stride + s.offset + vector % s.groups * s.width;
}

DEVICE float vector_sum(float v, float* shared) { return blockDim.x == 32 ? warp_sum(v) : block_sum(v, shared); }

template <int V, bool LAYER>
DEVICE void norm_forward(const Rows& s, const real* x, const real* weight, const real* bias, real* y, float* stats) {
  __shared__ float shared[32];
  u64 vector = blockIdx.x * (u64)blockDim.y + threadIdx.y;
  if (vector >= s.vectors) return;  // whole warps, and only where a warp works alone
  u64 start = vector_start(s, vector);
  float a[V], w[V];
  float mean = 0.0f;
  if (LAYER) {
    float sum = 0.0f;
    for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
      load<real, V>(x + start + c, a);
#pragma unroll
      for (int i = 0; i < V; i++) sum += a[i];
    }
    mean = vector_sum(sum, shared) / s.width;
  }
  float squares = 0.0f;
  for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
    load<real, V>(x + start + c, a);
#pragma unroll
    for (int i = 0; i < V; i++) squares += (a[i] - mean) * (a[i] - mean);
  }
  float root = 1.0f / sqrtf(vector_sum(squares, shared) / s.width + s.eps);
  if (threadIdx.x == 0) {
    if (LAYER) {
      stats[2 * vector] = mean;
      stats[2 * vector + 1] = root;
    } else {
      stats[vector] = root;
    }
  }
  for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
    load<real, V>(x + start + c, a);
    load<real, V>(weight + c, w);
#pragma unroll
    for (int i = 0; i < V; i++) a[i] = (a[i] - mean) * root * w[i];
    if (LAYER && bias) {
      load<real, V>(bias + c, w);
#pragma unroll
      for (int i = 0; i < V; i++) a[i] += w[i];
    }
    store<real, V>(y + start + c, a);
  }
}

// Blocks walk over the vectors and add up the weights' gradients column by column: each column belongs to one thread of
// the vector's row of threads, so nothing is shared until the end. `partial [blocks, 1 or 2, width]` receives the
// block's sums; they are made there where they do not fit in shared memory.
template <int V, bool LAYER>
DEVICE void norm_backward(const Rows& s, const real* dy, const real* x, const real* weight, const float* stats, const real* add,
                          real* dx, float* partial, int in_shared) {
  extern __shared__ float dynamic[];
  __shared__ float shared[32];
  const int sums = LAYER ? 2 : 1;
  float* block_partial = partial + (u64)blockIdx.x * sums * s.width;
  float* mine = in_shared ? dynamic + (u64)threadIdx.y * sums * s.width : block_partial;
  float g[V], a[V], w[V];
#pragma unroll
  for (int i = 0; i < V; i++) g[i] = 0.0f;
  for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
    store_f32<V>(mine + c, g);
    if (LAYER) store_f32<V>(mine + s.width + c, g);
  }
  for (u64 vector = blockIdx.x * (u64)blockDim.y + threadIdx.y; vector < s.vectors; vector += gridDim.x * (u64)blockDim.y) {
    u64 start = vector_start(s, vector);
    float mean = LAYER ? stats[2 * vector] : 0.0f;
    float root = LAYER ? stats[2 * vector + 1] : stats[vector];
    float sum = 0.0f, dot = 0.0f;
    for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
      load<real, V>(dy + start + c, g);
      load<real, V>(x + start + c, a);
      load<real, V>(weight + c, w);
#pragma unroll
      for (int i = 0; i < V; i++) {
        float gw = g[i] * w[i];
        if (LAYER) sum += gw;
        dot += gw * (a[i] - mean) * root;
      }
    }
    dot = vector_sum(dot, shared) / s.width;
    if (LAYER) sum = vector_sum(sum, shared) / s.width;
    for (int c = threadIdx.x * V; c < s.width; c += blockDim.x * V) {
      load<real, V>(dy + start + c, g);
      load<real, V>(x + start + c, a);
      load<real, V>(weight + c, w);
      float d[V], sums_of[V];
      load_f32<V>(mine + c, sums_of);
#pragma unroll
      for (int i = 0; i < V; i++) {
        float normed = (a[i] - mean) * root;
        sums_of[i] += g[i] * normed;
        d[i] = root * (g[i] * w[i] - (LAYER ? sum : 0.0f) - normed * dot);
      }
      store_f32<V>(mine + c, sums_of);
      if (LAYER) {
        load_f32<V>(mine + s.width + c, sums_of);
#pragma unroll
        for (int i = 0; i < V; i++) sums_of[i] += g[i];
        store_f32<V>(mine + s.width + c, sums_of);
      }
      if (add) {
        load<real, V>(add + start + c, a);
#pragma unroll
        for (int i = 0; i < V; i++) d[i] += a[i];
      }
      store<real, V>(dx + start + c, d);
    }
  }
  if (!in_shared) return;
  __syncthreads();
  int n = sums * s.width, threads = blockDim.x * blockDim.y;
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < n; c += threads) {
    float total = 0.0f;
    for (int k = 0; k < blockDim.y; k++) total += dynamic[(u64)k * n + c];
    block_partial[c] = total;
  }
}

#define FORWARD(NAME, V, LAYER)                                                                                              \
  extern "C" __global__ void NAME(Rows s, const real* x, const real* weight, const real* bias, real* y, float* stats) {      \
    norm_forward<V, LAYER>(s, x, weight, bias, y, stats);                                                                    \
  }
FORWARD(rms_forward_v, VEC, false)
FORWARD(rms_forward_s, 1, false)
FORWARD(layer_forward_v, VEC, true)
FORWARD(layer_forward_s, 1, true)

#define BACKWARD(NAME, V, LAYER)                                                                                             \
  extern "C" __global__ void NAME(Rows s, const real* dy, const real* x, const real* weight, const float* stats,             \
                                  const real* add, real* dx, float* partial, int in_shared) {                                \
    norm_backward<V, LAYER>(s, dy, x, weight, stats, add, dx, partial, in_shared);                                           \
  }
BACKWARD(rms_backward_v, VEC, false)
BACKWARD(rms_backward_s, 1, false)
BACKWARD(layer_backward_v, VEC, true)
BACKWARD(layer_backward_s, 1, true)
