// Products of a few rows with a matrix of weights: d[m, n] = a[m, k] · b[n, k]ᵀ (+ add) (+ bias), all bf16, m ≤ 8 · TILES.
//
// Their time is that of reading b, which is read once, 16 bytes a thread. Tensor cores multiply 16 of its rows (as their left
// matrix) by 8 rows of a. The order in which they go over k is anybody's choice, as long as it is one for both: what a thread
// reads with one access, 8 columns of a row, is what it hands over for two products of 16 columns. Nothing moves between
// threads until the end.
//
// The sum over k is made in one order whatever m, n and the GPU are: a row's result does not depend on the rows beside it.
#include "common.cuh"

#define WARPS 8      // of a block; they share k
#define PIECES 4     // of 32 columns, that a warp reads at once
#define UNIT (32 * PIECES)

// Weights, which nobody reads again: they leave a's part of the L1 cache alone. They do not change while the kernel runs. Volatile,
// so that all loads of a unit are on their way before the first product.
DEVICE uint4 load_once(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

// d[16, 8] += a[16, 16] · b[16, 8]. Lane 4 r + c has of a the rows r and r + 8, of b the column r, and of d the rows r and r + 8 and
// the columns 2 c and 2 c + 1.
DEVICE void multiply(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Adds the products of the columns k0 .. k0 + UNIT, as far as there are any; all of them are there where WHOLE says so, and no
// access is in doubt then. `left` and `right` are this lane's rows, at its first column.
template <int TILES, int GROUPS, bool WHOLE>
DEVICE void unit(const bf16* const (&left)[GROUPS][2], const bf16* const (&right)[TILES], int k0, int end, float (&sums)[GROUPS][TILES][4]) {
  uint4 w[PIECES][GROUPS][2], x[PIECES][TILES], zero = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int p = 0; p < PIECES; p++) {
    int c = k0 + 32 * p;
    bool inside = WHOLE || c < end;  // with all 8 columns
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int half = 0; half < 2; half++) w[p][g][half] = inside ? load_once(left[g][half] + c) : zero;
#pragma unroll
    for (int t = 0; t < TILES; t++) x[p][t] = inside ? *reinterpret_cast<const uint4*>(right[t] + c) : zero;
  }
#pragma unroll
  for (int p = 0; p < PIECES; p++)
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        multiply(sums[g][t], w[p][g][0].x, w[p][g][1].x, w[p][g][0].y, w[p][g][1].y, x[p][t].x, x[p][t].y);
        multiply(sums[g][t], w[p][g][0].z, w[p][g][1].z, w[p][g][0].w, w[p][g][1].w, x[p][t].z, x[p][t].w);
      }
}

// Grid: groups of 16 · GROUPS rows of b; 256 threads. k is a multiple of 8, a and b are aligned to 16 bytes. `add` may be d.
template <int TILES, int GROUPS>
DEVICE void skinny(const bf16* a, const bf16* b, bf16* d, const bf16* add, const bf16* bias, int m, int n, int k) {
  __shared__ float parts[WARPS][16 * GROUPS][8 * TILES + 1];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 8;
  u64 n0 = blockIdx.x * (u64)(16 * GROUPS), last = (u64)n - 1;
  // In place of rows that are not there the last one is read, and its results are left out in the end.
  const bf16 *left[GROUPS][2], *right[TILES];
  float sums[GROUPS][TILES][4];
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    left[g][0] = b + min(n0 + 16 * g + row, last) * k + column;
    left[g][1] = b + min(n0 + 16 * g + 8 + row, last) * k + column;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[g][t][i] = 0.0f;
  }
#pragma unroll
  for (int t = 0; t < TILES; t++) right[t] = a + (u64)min(8 * t + row, m - 1) * k + column;
  int k0 = warp * UNIT;
  for (; k0 + UNIT <= k; k0 += WARPS * UNIT) unit<TILES, GROUPS, true>(left, right, k0, 0, sums);
  if (k0 < k) unit<TILES, GROUPS, false>(left, right, k0, k - column, sums);
#pragma unroll
  for (int g = 0; g < GROUPS; g++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) parts[warp][16 * g + row + i / 2 * 8][8 * t + lane % 4 * 2 + i % 2] = sums[g][t][i];
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * GROUPS * 8 * TILES; i += WARPS * 32) {
    int r = i / (16 * GROUPS), c = i % (16 * GROUPS);
    if (r >= m || n0 + c >= n) continue;
    float v = 0.0f;
#pragma unroll
    for (int part = 0; part < WARPS; part++) v += parts[part][c][r];
    u64 at = (u64)r * n + n0 + c;
    if (add) v += to_float(add[at]);
    if (bias) v += to_float(bias[n0 + c]);
    d[at] = from_float<bf16>(v);
  }
}

#define SKINNY(NAME, TILES, GROUPS)                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                                           \
  NAME(const bf16* a, const bf16* b, bf16* d, const bf16* add, const bf16* bias, int m, int n, int k) {                       \
    skinny<TILES, GROUPS>(a, b, d, add, bias, m, n, k);                                                                       \
  }
SKINNY(skinny_8, 1, 1)
SKINNY(skinny_16, 2, 1)
SKINNY(skinny_16_wide, 2, 2)
SKINNY(skinny_32, 4, 1)
SKINNY(skinny_32_wide, 4, 2)
