// Rotary position embedding, in place, of the first heads of each row.
#include "common.cuh"

struct Rope {
  u64 rows, row_stride;
  int heads, half, seq;
  float sign;             // -1 turns back
  const int* positions;   // or null: row % seq
  const float* table;     // [positions, half, 2]: cosine, sine
};

template <int V> DEVICE void rope(const Rope& s, real* x) {
  int steps = s.half / V;
  u64 per_row = (u64)s.heads * steps;
  for (u64 item = thread_index(); item < s.rows * per_row; item += thread_count()) {
    u64 row = item / per_row;
    int rest = (int)(item - row * per_row);
    int head = rest / steps, i = rest % steps * V;
    int position = s.positions ? s.positions[row] : (int)(row % s.seq);
    float turn[2 * V], a[V], b[V], c[V], d[V];
    load_f32<2 * V>(s.table + ((u64)position * s.half + i) * 2, turn);
    real* low = x + row * s.row_stride + (u64)head * 2 * s.half + i;
    load<real, V>(low, a);
    load<real, V>(low + s.half, b);
#pragma unroll
    for (int k = 0; k < V; k++) {
      float cosine = turn[2 * k], sine = s.sign * turn[2 * k + 1];
      c[k] = a[k] * cosine - b[k] * sine;
      d[k] = b[k] * cosine + a[k] * sine;
    }
    store<real, V>(low, c);
    store<real, V>(low + s.half, d);
  }
}

extern "C" __global__ void __launch_bounds__(256) rope_v(Rope s, real* x) { rope<VEC>(s, x); }
extern "C" __global__ void __launch_bounds__(256) rope_s(Rope s, real* x) { rope<1>(s, x); }
