// Losses of rows; where asked, the input is replaced by its gradient.
#include "common.cuh"

// Calls f(value, column) for a row and, when WRITE, stores what it returns. Rows may start anywhere: the bulk moves in
// 16-byte accesses between a head and a tail of single elements.
template <bool WRITE, typename F> DEVICE void for_row(real* row, int n, F f) {
  int head = (int)((16 - ((u64)row & 15)) & 15) / (int)sizeof(real);
  if (head > n) head = n;
  int bulk = (n - head) / VEC * VEC;
  for (int c = threadIdx.x; c < head; c += blockDim.x) {
    float v = f(to_float(row[c]), c);
    if (WRITE) row[c] = from_float<real>(v);
  }
  for (int c = head + threadIdx.x * VEC; c < head + bulk; c += blockDim.x * VEC) {
    float a[VEC];
    load<real, VEC>(row + c, a);
#pragma unroll
    for (int i = 0; i < VEC; i++) a[i] = f(a[i], c + i);
    if (WRITE) store<real, VEC>(row + c, a);
  }
  for (int c = head + bulk + threadIdx.x; c < n; c += blockDim.x) {
    float v = f(to_float(row[c]), c);
    if (WRITE) row[c] = from_float<real>(v);
  }
}

// One block a row. Rows of weight 0 have loss 0 and gradient 0 whatever their target (padding has none).
extern "C" __global__ void __launch_bounds__(1024)
cross_entropy(real* logits, int classes, const int* targets, const float* weights, float* losses, int write_gradient, float scale) {
  __shared__ float shared[32];
  __shared__ float at_target;
  u64 row = blockIdx.x;
  real* x = logits + row * classes;
  float weight = weights[row];
  int target = targets[row];
  if (weight == 0.0f) {
    if (threadIdx.x == 0) losses[row] = 0.0f;
    if (write_gradient) for_row<true>(x, classes, [](float, int) { return 0.0f; });
    return;
  }
  if (threadIdx.x == 0) at_target = target >= 0 && target < classes ? to_float(x[target]) : __int_as_float(0x7fffffff);
  // Maximum and sum of exponentials in one pass: the sum is rescaled when the maximum grows.
  float top = -INFINITE, sum = 0.0f;
  for_row<false>(x, classes, [&](float v, int) {
    if (v > top) {
      sum *= expf(top - v);
      top = v;
    }
    if (v != -INFINITE) sum += expf(v - top);
    return v;
  });
  float most = block_max(top, shared);
  sum = block_sum(top == -INFINITE ? 0.0f : sum * expf(top - most), shared);
  float log_sum = logf(sum) + most;
  if (threadIdx.x == 0) losses[row] = weight * (log_sum - at_target);
  if (!write_gradient) return;
  float factor = scale * weight, share = factor / sum;
  for_row<true>(x, classes, [&](float v, int c) { return share * expf(v - most) - (c == target ? factor : 0.0f); });
}

// One block a row: weight · Σ (x - target)².
extern "C" __global__ void __launch_bounds__(1024)
squared_error(real* values, int n, const float* targets, const float* weights, float* losses, int write_gradient, float scale) {
  __shared__ float shared[32];
  u64 row = blockIdx.x;
  real* x = values + row * n;
  const float* wanted = targets + row * n;
  float weight = weights[row], sum = 0.0f;
  for (int c = threadIdx.x; c < n; c += blockDim.x) {
    float d = to_float(x[c]) - wanted[c];
    sum += d * d;
    if (write_gradient) x[c] = from_float<real>(2.0f * scale * weight * d);
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) losses[row] = weight * sum;
}
