// Rows of tables: gather forward, a scatter in a fixed order backward.
#include "common.cuh"

// x[row] = table[ids[row]] (+ positions[row's position]); one block a row.
template <int V>
DEVICE void embedding_forward(const int* ids, const real* table, int width, const real* position_table, int seq, const int* positions,
                              real* x) {
  u64 row = blockIdx.x;
  const real* source = table + (u64)ids[row] * width;
  const real* place = position_table ? position_table + (u64)(positions ? positions[row] : (int)(row % seq)) * width : 0;
  for (int c = threadIdx.x * V; c < width; c += blockDim.x * V) {
    float a[V], b[V];
    load<real, V>(source + c, a);
    if (place) {
      load<real, V>(place + c, b);
#pragma unroll
      for (int i = 0; i < V; i++) a[i] += b[i];
    }
    store<real, V>(x + row * width + c, a);
  }
}

// dtable[id] += Σ of the id's rows of dx, in the order of `order`. Block (u, y): distinct id u, the y-th part of the columns.
template <int V>
DEVICE void embedding_backward(const int* ids, const int* order, const int* bounds, const real* dx, int width, float* dtable) {
  int first = bounds[blockIdx.x], last = bounds[blockIdx.x + 1];
  if (first >= last) return;
  float* target = dtable + (u64)ids[order[first]] * width;
  for (int c = (blockIdx.y * blockDim.x + threadIdx.x) * V; c < width; c += gridDim.y * blockDim.x * V) {
    float sum[V], a[V];
#pragma unroll
    for (int i = 0; i < V; i++) sum[i] = 0.0f;
#pragma unroll 8
    for (int k = first; k < last; k++) {
      load<real, V>(dx + (u64)order[k] * width + c, a);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += a[i];
    }
    load_f32<V>(target + c, a);
#pragma unroll
    for (int i = 0; i < V; i++) a[i] += sum[i];
    store_f32<V>(target + c, a);
  }
}

// dpositions[p] += Σ over the sequences of dx[sequence · seq + p]; one block a position.
template <int V> DEVICE void position_backward(const real* dx, u64 rows, int width, int seq, float* dpositions) {
  u64 position = blockIdx.x;
  for (int c = threadIdx.x * V; c < width; c += blockDim.x * V) {
    float sum[V], a[V];
    load_f32<V>(dpositions + position * width + c, sum);
    for (u64 r = position; r < rows; r += seq) {
      load<real, V>(dx + r * width + c, a);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += a[i];
    }
    store_f32<V>(dpositions + position * width + c, sum);
  }
}

template <int V> DEVICE void gather_rows(const real* x, int width, const int* rows, real* y) {
  u64 row = blockIdx.x;
  const real* source = x + (u64)rows[row] * width;
  for (int c = threadIdx.x * V; c < width; c += blockDim.x * V) {
    float a[V];
    load<real, V>(source + c, a);
    store<real, V>(y + row * width + c, a);
  }
}

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                             \
  extern "C" __global__ void NAME##_v PARAMETERS { NAME<VEC> ARGUMENTS; } \
  extern "C" __global__ void NAME##_s PARAMETERS { NAME<1> ARGUMENTS; }

BOTH(embedding_forward,
     (const int* ids, const real* table, int width, const real* position_table, int seq, const int* positions, real* x),
     (ids, table, width, position_table, seq, positions, x))
BOTH(embedding_backward, (const int* ids, const int* order, const int* bounds, const real* dx, int width, float* dtable),
     (ids, order, bounds, dx, width, dtable))
BOTH(position_backward, (const real* dx, u64 rows, int width, int seq, float* dpositions), (dx, rows, width, seq, dpositions))
BOTH(gather_rows, (const real* x, int width, const int* rows, real* y), (x, width, rows, y))
