// Sums over rows in two stages, without atomics: the order of additions depends on the shapes alone.
#include "common.cuh"

// partial[chunk, n] = Σ over the chunk's rows of x[row, n]. A block is 32 × 8 threads: 32·V columns, 8 rows at a time.
template <int V> DEVICE void column_partial(const real* x, u64 rows, u64 rows_a_chunk, int n, float* partial) {
  __shared__ float shared[8][32 * V + 1];
  int column = (blockIdx.x * 32 + threadIdx.x) * V;
  u64 first = blockIdx.y * rows_a_chunk;
  u64 last = first + rows_a_chunk < rows ? first + rows_a_chunk : rows;
  float sum[V], a[V];
#pragma unroll
  for (int i = 0; i < V; i++) sum[i] = 0.0f;
  if (column < n) {
#pragma unroll 4
    for (u64 r = first + threadIdx.y; r < last; r += 8) {
      load<real, V>(x + r * n + column, a);
#pragma unroll
      for (int i = 0; i < V; i++) sum[i] += a[i];
    }
  }
#pragma unroll
  for (int i = 0; i < V; i++) shared[threadIdx.y][threadIdx.x * V + i] = sum[i];
  __syncthreads();
  for (int c = threadIdx.y * 32 + threadIdx.x; c < 32 * V; c += 256) {
    int at = blockIdx.x * 32 * V + c;
    if (at >= n) continue;
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) total += shared[k][c];
    partial[(u64)blockIdx.y * n + at] = total;
  }
}

extern "C" __global__ void __launch_bounds__(256)
column_partial_v(const real* x, u64 rows, u64 rows_a_chunk, int n, float* partial) {
  column_partial<VEC>(x, rows, rows_a_chunk, n, partial);
}
extern "C" __global__ void __launch_bounds__(256)
column_partial_s(const real* x, u64 rows, u64 rows_a_chunk, int n, float* partial) {
  column_partial<1>(x, rows, rows_a_chunk, n, partial);
}

// out[n] += Σ over parts of partial[part · stride + n]. A block is 32 × 8 threads.
extern "C" __global__ void __launch_bounds__(256) reduce_partials(const float* partial, int parts, u64 stride, int n, float* out) {
  __shared__ float shared[8][32];
  int column = blockIdx.x * 32 + threadIdx.x;
  float sum = 0.0f;
  if (column < n) {
#pragma unroll 8
    for (int p = threadIdx.y; p < parts; p += 8) sum += partial[p * stride + column];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0 && column < n) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) total += shared[k][threadIdx.x];
    out[column] += total;
  }
}
