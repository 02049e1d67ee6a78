// Activations, gated units, sums and conversions of formats.
#include "common.cuh"

enum { SILU, GELU_TANH, GELU, RELU, TANH };

DEVICE float activate(int kind, float x) {
  switch (kind) {
    case SILU:
      return x / (1.0f + expf(-x));
    case GELU_TANH:
      return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case GELU:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case RELU:
      return x > 0.0f ? x : 0.0f;
    default:
      return tanhf(x);
  }
}

DEVICE float derivative(int kind, float x) {
  switch (kind) {
    case SILU: {
      float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    case GELU_TANH: {
      float t = tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x));
      return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * 0.7978845608028654f * (1.0f + 0.134145f * x * x);
    }
    case GELU:
      return 0.5f * (1.0f + erff(x * 0.7071067811865476f)) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    case RELU:
      return x > 0.0f ? 1.0f : 0.0f;
    default: {
      float t = tanhf(x);
      return 1.0f - t * t;
    }
  }
}

// h[row, n] = act(x[row, ..n]) · x[row, n..2n]
template <int V> DEVICE void glu_forward(int kind, const real* x, u64 rows, int n, real* h) {
  int steps = n / V;
  for (u64 item = thread_index(); item < rows * steps; item += thread_count()) {
    u64 row = item / steps;
    int c = (int)(item - row * steps) * V;
    float gate[V], up[V];
    load<real, V>(x + row * 2 * n + c, gate);
    load<real, V>(x + row * 2 * n + n + c, up);
#pragma unroll
    for (int i = 0; i < V; i++) gate[i] = activate(kind, gate[i]) * up[i];
    store<real, V>(h + row * n + c, gate);
  }
}

// dx may be x: a thread reads its elements before it writes them.
template <int V> DEVICE void glu_backward(int kind, const real* dh, const real* x, u64 rows, int n, real* dx) {
  int steps = n / V;
  for (u64 item = thread_index(); item < rows * steps; item += thread_count()) {
    u64 row = item / steps;
    int c = (int)(item - row * steps) * V;
    float gate[V], up[V], d[V];
    load<real, V>(x + row * 2 * n + c, gate);
    load<real, V>(x + row * 2 * n + n + c, up);
    load<real, V>(dh + row * n + c, d);
#pragma unroll
    for (int i = 0; i < V; i++) {
      float g = gate[i];
      gate[i] = d[i] * up[i] * derivative(kind, g);
      up[i] = d[i] * activate(kind, g);
    }
    store<real, V>(dx + row * 2 * n + c, gate);
    store<real, V>(dx + row * 2 * n + n + c, up);
  }
}

template <int V> DEVICE void activation_forward(int kind, const real* x, u64 count, real* y) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V];
    load<real, V>(x + i, a);
#pragma unroll
    for (int k = 0; k < V; k++) a[k] = activate(kind, a[k]);
    store<real, V>(y + i, a);
  }
}

template <int V> DEVICE void activation_backward(int kind, const real* dy, const real* x, u64 count, real* dx) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V], d[V];
    load<real, V>(x + i, a);
    load<real, V>(dy + i, d);
#pragma unroll
    for (int k = 0; k < V; k++) d[k] *= derivative(kind, a[k]);
    store<real, V>(dx + i, d);
  }
}

template <int V> DEVICE void add_to(const real* x, real* y, u64 count) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V], b[V];
    load<real, V>(x + i, a);
    load<real, V>(y + i, b);
#pragma unroll
    for (int k = 0; k < V; k++) b[k] += a[k];
    store<real, V>(y + i, b);
  }
}

template <int V> DEVICE void to_f32(const real* x, float* y, u64 count) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V];
    load<real, V>(x + i, a);
    store_f32<V>(y + i, a);
  }
}

template <int V> DEVICE void from_f32(const float* x, real* y, u64 count) {
  for (u64 i = thread_index() * V; i < count; i += thread_count() * V) {
    float a[V];
    load_f32<V>(x + i, a);
    store<real, V>(y + i, a);
  }
}

#define BOTH(NAME, PARAMETERS, ARGUMENTS)                                                       \
  extern "C" __global__ void __launch_bounds__(256) NAME##_v PARAMETERS { NAME<VEC> ARGUMENTS; } \
  extern "C" __global__ void __launch_bounds__(256) NAME##_s PARAMETERS { NAME<1> ARGUMENTS; }

BOTH(glu_forward, (int kind, const real* x, u64 rows, int n, real* h), (kind, x, rows, n, h))
BOTH(glu_backward, (int kind, const real* dh, const real* x, u64 rows, int n, real* dx), (kind, dh, x, rows, n, dx))
BOTH(activation_forward, (int kind, const real* x, u64 count, real* y), (kind, x, count, y))
BOTH(activation_backward, (int kind, const real* dy, const real* x, u64 count, real* dx), (kind, dy, x, count, dx))
BOTH(add_to, (const real* x, real* y, u64 count), (x, y, count))
BOTH(to_f32, (const real* x, float* y, u64 count), (x, y, count))
BOTH(from_f32, (const float* x, real* y, u64 count), (x, y, count))

// What a matrix product's epilogue could not do: d[row, n] += add[row, n] + bias[n].
template <typename D> DEVICE void finish_gemm(D* d, const real* add, const real* bias, u64 rows, int n) {
  for (u64 i = thread_index(); i < rows * n; i += thread_count()) {
    float v = to_float(d[i]);
    if (add) v += to_float(add[i]);
    if (bias) v += to_float(bias[i % n]);
    d[i] = from_float<D>(v);
  }
}
extern "C" __global__ void __launch_bounds__(256) finish_gemm_real(real* d, const real* add, const real* bias, u64 rows, int n) {
  finish_gemm<real>(d, add, bias, rows, n);
}
extern "C" __global__ void __launch_bounds__(256) finish_gemm_f32(float* d, const real* add, const real* bias, u64 rows, int n) {
  finish_gemm<float>(d, add, bias, rows, n);
}
