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

// Sum over a block of 256 threads, in a fixed order; thread 0 has it.
DEVICE double block_sum(double x) {
  __shared__ double shared[256];
  shared[threadIdx.x] = x;
  __syncthreads();
#pragma unroll
  for (int step = 128; step > 0; step /= 2) {
    if (threadIdx.x < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  return shared[0];
}

// partial[block] = Σ x² over the block's share. Squares are exact in double precision.
template <typename T, int V> DEVICE void squares(const T* x, u64 count, double* partial) {
  double sum = 0.0;
  float a[V];
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    load<T, V>(x + i, a);
#pragma unroll
    for (int k = 0; k < V; k++) sum = fma((double)a[k], (double)a[k], sum);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(256) squares_bf16_v(const bf16* x, u64 count, double* partial) {
  squares<bf16, 8>(x, count, partial);
}
extern "C" __global__ void __launch_bounds__(256) squares_bf16_s(const bf16* x, u64 count, double* partial) {
  squares<bf16, 1>(x, count, partial);
}
extern "C" __global__ void __launch_bounds__(256) squares_f32_v(const float* x, u64 count, double* partial) {
  squares<float, 4>(x, count, partial);
}
extern "C" __global__ void __launch_bounds__(256) squares_f32_s(const float* x, u64 count, double* partial) {
  squares<float, 1>(x, count, partial);
}

// out = Σ partial[0 .. parts], one block.
extern "C" __global__ void __launch_bounds__(256) sum_f64(const double* partial, int parts, double* out) {
  double sum = 0.0;
  for (int i = threadIdx.x; i < parts; i += 256) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[0] = sum;
}
