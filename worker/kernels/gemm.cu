// Matrix product for shapes and alignments that cuBLASLt refuses: row-major, float arithmetic, any size.
#include "common.cuh"

#define TILE 64
#define DEPTH 16

// d[m, n] = op(a) op(b) (+ d). Grid: tiles of columns, tiles of rows; 256 threads, 4 × 4 results each.
template <typename D>
DEVICE void gemm(const real* a, const real* b, D* d, int m, int n, int k, int transpose_a, int transpose_b, int accumulate) {
  __shared__ float left[DEPTH][TILE + 1], right[DEPTH][TILE + 1];
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  u64 m0 = blockIdx.y * (u64)TILE, n0 = blockIdx.x * (u64)TILE;
  float s[4][4] = {};
  for (int k0 = 0; k0 < k; k0 += DEPTH) {
    __syncthreads();
    for (int i = threadIdx.x; i < TILE * DEPTH; i += 256) {
      int r = transpose_a ? i % TILE : i / DEPTH, c = transpose_a ? i / TILE : i % DEPTH;
      u64 row = m0 + r, column = k0 + c;
      left[c][r] = row < m && column < k ? to_float(a[transpose_a ? column * m + row : row * k + column]) : 0.0f;
      r = transpose_b ? i % DEPTH : i / TILE, c = transpose_b ? i / DEPTH : i % TILE;
      row = k0 + r, column = n0 + c;
      right[r][c] = row < k && column < n ? to_float(b[transpose_b ? column * k + row : row * n + column]) : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < DEPTH; e++) {
      float x[4], y[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        x[i] = left[e][ty + 16 * i];
        y[i] = right[e][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[i][j] += x[i] * y[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u64 row = m0 + ty + 16 * i, column = n0 + tx + 16 * j;
      if (row >= m || column >= n) continue;
      float v = s[i][j];
      if (accumulate) v += to_float(d[row * n + column]);
      d[row * n + column] = from_float<D>(v);
    }
}

extern "C" __global__ void __launch_bounds__(256)
gemm_real(const real* a, const real* b, real* d, int m, int n, int k, int transpose_a, int transpose_b, int accumulate) {
  gemm<real>(a, b, d, m, n, k, transpose_a, transpose_b, accumulate);
}
extern "C" __global__ void __launch_bounds__(256)
gemm_f32(const real* a, const real* b, float* d, int m, int n, int k, int transpose_a, int transpose_b, int accumulate) {
  gemm<float>(a, b, d, m, n, k, transpose_a, transpose_b, accumulate);
}
