// Causal softmax attention, forward and backward, for whatever cuDNN does not take: single precision, odd head sizes,
// sliding windows, packed documents, caches. Tiles of 64 queries by 64 keys, arithmetic in float, no atomics.
//
// A query at position t sees keys first(t) ..= t, where first(t) follows from the window and the start of its document.
// The head's elements are walked over in chunks of 32, so shared memory does not grow with the head. The file is compiled
// for one number of chunks, CHUNKS, which the accumulators in registers have room for: heads of up to 32 · CHUNKS.
#include "common.cuh"

#define TILE 64
#define CHUNK 32
#define PAD (CHUNK + 1)  // floats a row of a chunk in shared memory: no two rows of a warp in one bank
#define SCORES (TILE + 1)

struct Attention {
  const real *q, *k, *v;
  u64 q_row, q_sequence;  // elements from token to token and from sequence to sequence
  u64 k_row, k_sequence;  // of keys and of values
  int seq;                // queries a sequence
  int heads, kv_heads, head_dim;
  float scale;
  int window;         // 0: none
  const int* starts;  // [batch, seq] or null
  const int* past;    // [batch] or null: keys before the first query
};

DEVICE int first_key(const Attention& a, int b, int t, int past) {
  int position = past + t, first = 0;
  if (a.window) first = max(0, position - a.window + 1);
  if (a.starts) first = max(first, a.starts[(u64)b * a.seq + t]);
  return min(first, position);
}

// tile[r][c] = x[r · stride + c] for 64 rows and a chunk of 32 columns, zero outside `rows` and `columns`. 256 threads.
DEVICE void load_chunk(float* tile, const real* x, u64 stride, int rows, int columns) {
  int c = threadIdx.x % CHUNK;
#pragma unroll
  for (int r = threadIdx.x / CHUNK; r < TILE; r += 256 / CHUNK)
    tile[r * PAD + c] = r < rows && c < columns ? to_float(x[r * stride + c]) : 0.0f;
}

// s[i][j] += Σ_d a[ty·4 + i][d] · b[tx + 16 j][d] over one chunk.
DEVICE void multiply_chunk(const float* a, const float* b, float (&s)[4][4], int tx, int ty) {
#pragma unroll 8
  for (int d = 0; d < CHUNK; d++) {
    float x[4], y[4];
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = a[(ty * 4 + i) * PAD + d];
#pragma unroll
    for (int j = 0; j < 4; j++) y[j] = b[(tx + 16 * j) * PAD + d];
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) s[i][j] += x[i] * y[j];
  }
}

// o[i][j] += Σ_n p[ty·4 + i][n] · b[n][tx + 16 j], p with its rows along the accumulator's.
DEVICE void accumulate_rows(const float* p, const float* b, float (&o)[4][2], int tx, int ty) {
#pragma unroll 4
  for (int n = 0; n < TILE; n++) {
    float y[2] = {b[n * PAD + tx], b[n * PAD + tx + 16]};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = p[(ty * 4 + i) * SCORES + n];
      o[i][0] += x * y[0];
      o[i][1] += x * y[1];
    }
  }
}

// The same with p transposed: o[i][j] += Σ_n p[n][ty·4 + i] · b[n][tx + 16 j].
DEVICE void accumulate_columns(const float* p, const float* b, float (&o)[4][2], int tx, int ty) {
#pragma unroll 4
  for (int n = 0; n < TILE; n++) {
    float y[2] = {b[n * PAD + tx], b[n * PAD + tx + 16]};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float x = p[n * SCORES + ty * 4 + i];
      o[i][0] += x * y[0];
      o[i][1] += x * y[1];
    }
  }
}

// Reductions over the 16 threads that share rows.
DEVICE float row_max(float v) {
#pragma unroll
  for (int o = 8; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, o));
  return v;
}
DEVICE float row_sum(float v) {
#pragma unroll
  for (int o = 8; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
  return v;
}

// Smallest first key of a tile's queries; every thread receives it.
DEVICE int tile_first_key(const int (&first)[4], int* shared) {
  if (threadIdx.x == 0) *shared = 0x7fffffff;
  __syncthreads();
  atomicMin(shared, min(min(first[0], first[1]), min(first[2], first[3])));
  __syncthreads();
  return *shared;
}

// Grid: tiles of queries, heads, sequences; 256 threads. Shared: two chunks and one tile of scores.
template <int NC> DEVICE void forward(const Attention& a, real* out, float* lse) {
  extern __shared__ float dynamic[];
  __shared__ int lowest;
  float* left = dynamic;
  float* right = left + TILE * PAD;
  float* scores = right + TILE * PAD;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, b = blockIdx.z;  // long tiles start first
  int q0 = tile * TILE, rows = min(TILE, a.seq - q0);
  int past = a.past ? a.past[b] : 0, kv = head / (a.heads / a.kv_heads);
  const real* q = a.q + b * a.q_sequence + q0 * a.q_row + (u64)head * a.head_dim;
  const real* k = a.k + b * a.k_sequence + (u64)kv * a.head_dim;
  const real* v = a.v + b * a.k_sequence + (u64)kv * a.head_dim;
  int first[4];
  float o[NC][4][2], top[4], sum[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = ty * 4 + i;
    first[i] = row < rows ? first_key(a, b, q0 + row, past) : 0x7fffffff;
    top[i] = -INFINITE;
    sum[i] = 0.0f;
  }
#pragma unroll
  for (int c = 0; c < NC; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) o[c][i][0] = o[c][i][1] = 0.0f;
  int last = past + q0 + rows - 1;
  for (int k0 = tile_first_key(first, &lowest) / TILE * TILE; k0 <= last; k0 += TILE) {
    int keys = min(TILE, last + 1 - k0);
    float s[4][4] = {};
    for (int c = 0; c * CHUNK < a.head_dim; c++) {
      __syncthreads();
      load_chunk(left, q + c * CHUNK, a.q_row, rows, a.head_dim - c * CHUNK);
      load_chunk(right, k + k0 * a.k_row + c * CHUNK, a.k_row, keys, a.head_dim - c * CHUNK);
      __syncthreads();
      multiply_chunk(left, right, s, tx, ty);
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int position = past + q0 + ty * 4 + i;
      float most = -INFINITE;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int key = k0 + tx + 16 * j;
        s[i][j] = key >= first[i] && key <= position ? s[i][j] * a.scale : -INFINITE;
        most = fmaxf(most, s[i][j]);
      }
      most = fmaxf(row_max(most), top[i]);
      float shift = most == -INFINITE ? 0.0f : most;  // nothing seen yet: exponentials of -infinity are 0
      float shrink = expf(top[i] - shift), more = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float p = expf(s[i][j] - shift);
        scores[(ty * 4 + i) * SCORES + tx + 16 * j] = p;
        more += p;
      }
      top[i] = most;
      sum[i] = sum[i] * shrink + row_sum(more);
#pragma unroll
      for (int c = 0; c < NC; c++) {
        o[c][i][0] *= shrink;
        o[c][i][1] *= shrink;
      }
    }
#pragma unroll
    for (int c = 0; c < NC; c++) {
      if (c * CHUNK >= a.head_dim) break;
      __syncthreads();
      load_chunk(right, v + k0 * a.k_row + c * CHUNK, a.k_row, keys, a.head_dim - c * CHUNK);
      __syncthreads();
      accumulate_rows(scores, right, o[c], tx, ty);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = ty * 4 + i;
    if (row >= rows) continue;
    u64 t = (u64)b * a.seq + q0 + row;
    float inverse = 1.0f / sum[i];
    if (lse && tx == 0) lse[((u64)b * a.heads + head) * a.seq + q0 + row] = top[i] + logf(sum[i]);
#pragma unroll
    for (int c = 0; c < NC; c++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int column = c * CHUNK + tx + 16 * j;
        if (column < a.head_dim) out[(t * a.heads + head) * a.head_dim + column] = from_float<real>(o[c][i][j] * inverse);
      }
  }
}

// delta[b, head, t] = Σ_d dout · out; a warp for each token and head.
extern "C" __global__ void __launch_bounds__(256)
attention_delta(const real* dout, const real* out, u64 rows, int seq, int heads, int head_dim, float* delta) {
  u64 item = thread_index() / 32;
  if (item >= rows * heads) return;
  u64 t = item / heads;
  int head = (int)(item % heads);
  float sum = 0.0f;
  for (int c = threadIdx.x % 32; c < head_dim; c += 32) sum += to_float(dout[item * head_dim + c]) * to_float(out[item * head_dim + c]);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[(t / seq * heads + head) * seq + t % seq] = sum;
}

struct Gradients {
  const real* dout;    // [rows, heads · head_dim]
  const float* lse;    // [batch, heads, seq]
  const float* delta;  // the same
  real *dq, *dk, *dv;  // packed as q, k and v are
};

// Probabilities and gradients of scores of one tile of queries by one tile of keys, into `p` and `ds` [query][key].
DEVICE void score_gradients(const Attention& a, const Gradients& g, const real* q, const real* k, const real* v, const real* dout, int q0,
                            int rows, int k0, int keys, u64 statistics, const int (&first)[4], float* left, float* right, float* p,
                            float* ds, int tx, int ty) {
  u64 out_row = (u64)a.heads * a.head_dim;
  float s[4][4] = {}, dp[4][4] = {};
  for (int c = 0; c * CHUNK < a.head_dim; c++) {
    int columns = a.head_dim - c * CHUNK;
    __syncthreads();
    load_chunk(left, q + c * CHUNK, a.q_row, rows, columns);
    load_chunk(right, k + c * CHUNK, a.k_row, keys, columns);
    __syncthreads();
    multiply_chunk(left, right, s, tx, ty);
    __syncthreads();
    load_chunk(left, dout + c * CHUNK, out_row, rows, columns);
    load_chunk(right, v + c * CHUNK, a.k_row, keys, columns);
    __syncthreads();
    multiply_chunk(left, right, dp, tx, ty);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = ty * 4 + i, t = q0 + row;
    float lse = row < rows ? g.lse[statistics + t] : 0.0f;
    float delta = row < rows ? g.delta[statistics + t] : 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int key = k0 + tx + 16 * j;
      float x = row < rows && key >= first[i] && key <= t ? expf(s[i][j] * a.scale - lse) : 0.0f;
      if (p) p[row * SCORES + tx + 16 * j] = x;
      ds[row * SCORES + tx + 16 * j] = x * (dp[i][j] - delta) * a.scale;
    }
  }
}

// Gradients of keys and values. Grid: tiles of keys, key heads, sequences. The query heads of a group and their tiles are
// walked over in order.
template <int NC> DEVICE void backward_keys(const Attention& a, const Gradients& g) {
  extern __shared__ float dynamic[];
  float* left = dynamic;
  float* right = left + TILE * PAD;
  float* p = right + TILE * PAD;
  float* ds = p + TILE * SCORES;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int kv = blockIdx.y, b = blockIdx.z, group = a.heads / a.kv_heads;
  int k0 = blockIdx.x * TILE, keys = min(TILE, a.seq - k0);
  u64 key_at = b * a.k_sequence + k0 * a.k_row + (u64)kv * a.head_dim;
  float dk[NC][4][2], dv[NC][4][2];
#pragma unroll
  for (int c = 0; c < NC; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) dk[c][i][0] = dk[c][i][1] = dv[c][i][0] = dv[c][i][1] = 0.0f;
  int end = a.window ? (int)min((u64)a.seq, (u64)k0 + keys - 1 + a.window) : a.seq;
  for (int head = kv * group; head < (kv + 1) * group; head++) {
    u64 statistics = ((u64)b * a.heads + head) * a.seq;
    for (int q0 = k0; q0 < end; q0 += TILE) {
      int rows = min(TILE, a.seq - q0), first[4], seen = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = ty * 4 + i;
        first[i] = row < rows ? first_key(a, b, q0 + row, 0) : 0x7fffffff;
        seen |= first[i] < k0 + keys;
      }
      if (!__syncthreads_or(seen)) continue;
      const real* q = a.q + b * a.q_sequence + q0 * a.q_row + (u64)head * a.head_dim;
      const real* dout = g.dout + (((u64)b * a.seq + q0) * a.heads + head) * a.head_dim;
      score_gradients(a, g, q, a.k + key_at, a.v + key_at, dout, q0, rows, k0, keys, statistics, first, left, right, p, ds, tx, ty);
#pragma unroll
      for (int c = 0; c < NC; c++) {
        if (c * CHUNK >= a.head_dim) break;
        __syncthreads();
        load_chunk(left, dout + c * CHUNK, (u64)a.heads * a.head_dim, rows, a.head_dim - c * CHUNK);
        load_chunk(right, q + c * CHUNK, a.q_row, rows, a.head_dim - c * CHUNK);
        __syncthreads();
        accumulate_columns(p, left, dv[c], tx, ty);
        accumulate_columns(ds, right, dk[c], tx, ty);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < NC; c++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int row = ty * 4 + i, column = c * CHUNK + tx + 16 * j;
        if (row >= keys || column >= a.head_dim) continue;
        g.dk[key_at + row * a.k_row + column] = from_float<real>(dk[c][i][j]);
        g.dv[key_at + row * a.k_row + column] = from_float<real>(dv[c][i][j]);
      }
}

// Gradients of queries. Grid: tiles of queries, heads, sequences.
template <int NC> DEVICE void backward_queries(const Attention& a, const Gradients& g) {
  extern __shared__ float dynamic[];
  __shared__ int lowest;
  float* left = dynamic;
  float* right = left + TILE * PAD;
  float* ds = right + TILE * PAD;
  int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  int tile = gridDim.x - 1 - blockIdx.x, head = blockIdx.y, b = blockIdx.z;
  int q0 = tile * TILE, rows = min(TILE, a.seq - q0), kv = head / (a.heads / a.kv_heads);
  u64 query_at = b * a.q_sequence + q0 * a.q_row + (u64)head * a.head_dim;
  const real* dout = g.dout + (((u64)b * a.seq + q0) * a.heads + head) * a.head_dim;
  int first[4];
  float dq[NC][4][2];
#pragma unroll
  for (int i = 0; i < 4; i++) first[i] = ty * 4 + i < rows ? first_key(a, b, q0 + ty * 4 + i, 0) : 0x7fffffff;
#pragma unroll
  for (int c = 0; c < NC; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) dq[c][i][0] = dq[c][i][1] = 0.0f;
  int last = q0 + rows - 1;
  for (int k0 = tile_first_key(first, &lowest) / TILE * TILE; k0 <= last; k0 += TILE) {
    int keys = min(TILE, last + 1 - k0);
    u64 key_at = b * a.k_sequence + k0 * a.k_row + (u64)kv * a.head_dim;
    score_gradients(a, g, a.q + query_at, a.k + key_at, a.v + key_at, dout, q0, rows, k0, keys, ((u64)b * a.heads + head) * a.seq, first,
                    left, right, 0, ds, tx, ty);
#pragma unroll
    for (int c = 0; c < NC; c++) {
      if (c * CHUNK >= a.head_dim) break;
      __syncthreads();
      load_chunk(right, a.k + key_at + c * CHUNK, a.k_row, keys, a.head_dim - c * CHUNK);
      __syncthreads();
      accumulate_rows(ds, right, dq[c], tx, ty);
    }
  }
#pragma unroll
  for (int c = 0; c < NC; c++)
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int row = ty * 4 + i, column = c * CHUNK + tx + 16 * j;
        if (row < rows && column < a.head_dim) g.dq[query_at + row * a.q_row + column] = from_float<real>(dq[c][i][j]);
      }
}

extern "C" __global__ void __launch_bounds__(256) attention_forward(Attention a, real* out, float* lse) {
  forward<CHUNKS>(a, out, lse);
}
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys(Attention a, Gradients g) { backward_keys<CHUNKS>(a, g); }
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries(Attention a, Gradients g) {
  backward_queries<CHUNKS>(a, g);
}

// keys[b, past[b] + t] and values likewise, from packed rows; one block a row.
extern "C" __global__ void cache_append(const real* qkv, int fresh, int capacity, int heads, int kv_heads, int head_dim, const int* past,
                                        real* keys, real* values) {
  u64 row = blockIdx.x, b = row / fresh;
  int width = kv_heads * head_dim;
  u64 at = past[b] + row % fresh;
  if (at >= capacity) return;  // the caller's plan holds this from happening
  const real* source = qkv + row * (u64)(heads + 2 * kv_heads) * head_dim + (u64)heads * head_dim;
  u64 target = (b * capacity + at) * width;
  for (int c = threadIdx.x; c < width; c += blockDim.x) {
    keys[target + c] = source[c];
    values[target + c] = source[width + c];
  }
}

// Few queries, many keys. Grid: heads, new tokens, sequences; 8 warps share the keys, lanes the elements of the head
// (at most 256), 4 keys at a time.
extern "C" __global__ void __launch_bounds__(256) attention_decode(Attention a, real* out) {
  __shared__ float tops[8], sums[8], parts[8][256];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int head = blockIdx.x, t = blockIdx.y, b = blockIdx.z;
  int past = a.past[b], position = past + t, kv = head / (a.heads / a.kv_heads);
  const real* q = a.q + b * a.q_sequence + t * a.q_row + (u64)head * a.head_dim;
  const real* k = a.k + b * a.k_sequence + (u64)kv * a.head_dim;
  const real* v = a.v + b * a.k_sequence + (u64)kv * a.head_dim;
  float query[8], o[8], top = -INFINITE, sum = 0.0f;
#pragma unroll
  for (int e = 0; e < 8; e++) {
    int c = lane + 32 * e;
    query[e] = c < a.head_dim ? to_float(q[c]) * a.scale : 0.0f;
    o[e] = 0.0f;
  }
  for (int key = first_key(a, b, t, past) + warp * 4; key <= position; key += 32) {
    float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int e = 0; e < 8; e++) {
      int c = lane + 32 * e;
      if (c >= a.head_dim) break;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (key + j <= position) s[j] += query[e] * to_float(k[(key + j) * a.k_row + c]);
    }
    float most = top;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[j] = warp_sum(s[j]);
      if (key + j > position) s[j] = -INFINITE;
      most = fmaxf(most, s[j]);
    }
    float shrink = expf(top - most);
    top = most;
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      s[j] = expf(s[j] - most);
      sum += s[j];
    }
#pragma unroll
    for (int e = 0; e < 8; e++) {
      int c = lane + 32 * e;
      if (c >= a.head_dim) break;
      o[e] *= shrink;
#pragma unroll
      for (int j = 0; j < 4; j++)
        if (key + j <= position) o[e] += s[j] * to_float(v[(key + j) * a.k_row + c]);
    }
  }
  if (lane == 0) {
    tops[warp] = top;
    sums[warp] = sum;
  }
#pragma unroll
  for (int e = 0; e < 8; e++) parts[warp][lane + 32 * e] = o[e];
  __syncthreads();
  float most = -INFINITE, total = 0.0f, value = 0.0f;
  for (int w = 0; w < 8; w++) most = fmaxf(most, tops[w]);
  for (int w = 0; w < 8; w++) {
    float weight = expf(tops[w] - most);
    total += weight * sums[w];
    value += weight * parts[w][threadIdx.x];
  }
  if (threadIdx.x < a.head_dim)
    out[(((u64)b * a.seq + t) * a.heads + head) * a.head_dim + threadIdx.x] = from_float<real>(value / total);
}

// The same where heads are multiples of VEC elements and 16-byte aligned. Keys are cut into parts at multiples of SPLIT, each of
// which is a block's work, with up to G query heads that share a key head: what is read of it serves them all. The places of the
// cuts, and so the order of all additions, depend on the text's own position alone.
#define SPLIT 128
#define PACKS_A_HEAD (32 * CHUNKS / VEC)
#define LANES (PACKS_A_HEAD > 16 ? 32 : PACKS_A_HEAD > 8 ? 16 : PACKS_A_HEAD > 4 ? 8 : 4)  // that share a key
#define PACKS ((PACKS_A_HEAD + LANES - 1) / LANES)                                         // of a lane
#define KEYS (32 / LANES)                                                                  // of a warp, side by side
#define AHEAD 4                                                                            // keys a lane reads at once

// Larger of two maxima, as something that can be subtracted: nothing seen yet is -infinity.
DEVICE float shift_of(float a, float b) {
  float most = fmaxf(a, b);
  return most == -INFINITE ? 0.0f : most;
}

// Grid: key heads times parts of their query heads, parts of the keys, sequences times new tokens; 256 threads. Where the keys of
// a query lie in one part, `out` receives the result, otherwise `partial` a maximum, a sum and head_dim weighted sums.
template <int G> DEVICE void decode_part(const Attention& a, real* out, float* partial) {
  __shared__ float tops[8][G], sums[8][G], values[8][32 * CHUNKS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = lane % LANES, own = lane / LANES;
  int group = a.heads / a.kv_heads, subgroups = (group + G - 1) / G, kv = blockIdx.x / subgroups;
  int head0 = kv * group + blockIdx.x % subgroups * G, heads = min(G, (kv + 1) * group - head0);
  int b = blockIdx.z / a.seq, t = blockIdx.z % a.seq, past = a.past[b], position = past + t, first = first_key(a, b, t, past);
  int begin = max(first, (int)blockIdx.y * SPLIT), end = min(position + 1, ((int)blockIdx.y + 1) * SPLIT);
  if (begin >= end) return;  // the whole block
  const real* q = a.q + b * a.q_sequence + t * a.q_row + (u64)head0 * a.head_dim;
  const real* k = a.k + b * a.k_sequence + (u64)kv * a.head_dim;
  const real* v = a.v + b * a.k_sequence + (u64)kv * a.head_dim;
  float query[G][PACKS][VEC], o[G][PACKS][VEC], top[G], sum[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    top[g] = -INFINITE;
    sum[g] = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
      int c = (p * LANES + place) * VEC;
      bool there = g < heads && c < a.head_dim;
      if (there) load<real, VEC>(q + g * a.head_dim + c, query[g][p]);
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        query[g][p][i] = there ? query[g][p][i] * a.scale : 0.0f;
        o[g][p][i] = 0.0f;
      }
    }
  }
  for (int base = begin; base < end; base += 8 * KEYS * AHEAD) {
    int key0 = base + warp * KEYS * AHEAD + own;
    float s[AHEAD][G];
#pragma unroll
    for (int u = 0; u < AHEAD; u++) {
      int key = key0 + u * KEYS;
#pragma unroll
      for (int g = 0; g < G; g++) s[u][g] = 0.0f;
#pragma unroll
      for (int p = 0; p < PACKS; p++) {
        int c = (p * LANES + place) * VEC;
        if (key >= end || c >= a.head_dim) continue;
        float x[VEC];
        load<real, VEC>(k + key * a.k_row + c, x);
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
          for (int i = 0; i < VEC; i++) s[u][g] += query[g][p][i] * x[i];
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float most = top[g];
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
#pragma unroll
        for (int n = LANES / 2; n; n >>= 1) s[u][g] += __shfl_xor_sync(0xffffffffu, s[u][g], n);
        if (key0 + u * KEYS >= end) s[u][g] = -INFINITE;
        most = fmaxf(most, s[u][g]);
      }
      float shift = shift_of(most, most), shrink = expf(top[g] - shift);
      top[g] = most;
      sum[g] *= shrink;
#pragma unroll
      for (int u = 0; u < AHEAD; u++) {
        s[u][g] = expf(s[u][g] - shift);
        sum[g] += s[u][g];
      }
#pragma unroll
      for (int p = 0; p < PACKS; p++)
#pragma unroll
        for (int i = 0; i < VEC; i++) o[g][p][i] *= shrink;
    }
#pragma unroll
    for (int u = 0; u < AHEAD; u++)
#pragma unroll
      for (int p = 0; p < PACKS; p++) {
        int key = key0 + u * KEYS, c = (p * LANES + place) * VEC;
        if (key >= end || c >= a.head_dim) continue;
        float x[VEC];
        load<real, VEC>(v + key * a.k_row + c, x);
#pragma unroll
        for (int g = 0; g < G; g++)
#pragma unroll
          for (int i = 0; i < VEC; i++) o[g][p][i] += s[u][g] * x[i];
      }
  }
  // Lanes of other keys, then warps, in order.
#pragma unroll
  for (int n = LANES; n < 32; n <<= 1)
#pragma unroll
    for (int g = 0; g < G; g++) {
      float other = __shfl_xor_sync(0xffffffffu, top[g], n), more = __shfl_xor_sync(0xffffffffu, sum[g], n);
      float shift = shift_of(top[g], other), here = expf(top[g] - shift), there = expf(other - shift);
      top[g] = fmaxf(top[g], other);
      sum[g] = sum[g] * here + more * there;
#pragma unroll
      for (int p = 0; p < PACKS; p++)
#pragma unroll
        for (int i = 0; i < VEC; i++) o[g][p][i] = o[g][p][i] * here + __shfl_xor_sync(0xffffffffu, o[g][p][i], n) * there;
    }
  if (lane == 0) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      tops[warp][g] = top[g];
      sums[warp][g] = sum[g];
    }
  }
  bool whole = first / SPLIT == position / SPLIT;
  u64 row = ((u64)b * a.seq + t) * a.heads + head0;
#pragma unroll
  for (int g = 0; g < G; g++) {
    __syncthreads();
    if (own == 0) {
#pragma unroll
      for (int p = 0; p < PACKS; p++)
#pragma unroll
        for (int i = 0; i < VEC; i++)
          if ((p * LANES + place) * VEC < 32 * CHUNKS) values[warp][(p * LANES + place) * VEC + i] = o[g][p][i];
    }
    __syncthreads();
    if (g >= heads) continue;
    float most = -INFINITE, total = 0.0f;
    for (int w = 0; w < 8; w++) most = fmaxf(most, tops[w][g]);
    for (int w = 0; w < 8; w++) total += expf(tops[w][g] - most) * sums[w][g];
    float* part = partial + ((row + g) * gridDim.y + blockIdx.y) * (u64)(a.head_dim + 2);
    if (!whole && threadIdx.x == 0) {
      part[0] = most;
      part[1] = total;
    }
    for (int c = threadIdx.x; c < a.head_dim; c += 256) {
      float value = 0.0f;
      for (int w = 0; w < 8; w++) value += expf(tops[w][g] - most) * values[w][c];
      if (whole)
        out[(row + g) * a.head_dim + c] = from_float<real>(value / total);
      else
        part[2 + c] = value;
    }
  }
}

extern "C" __global__ void __launch_bounds__(256) attention_part_1(Attention a, real* out, float* partial) {
  decode_part<1>(a, out, partial);
}
extern "C" __global__ void __launch_bounds__(256) attention_part_4(Attention a, real* out, float* partial) {
  decode_part<4>(a, out, partial);
}

// Joins the parts of queries whose keys lie in several. Grid: heads, new tokens, sequences.
extern "C" __global__ void __launch_bounds__(256) attention_join(Attention a, real* out, const float* partial, int parts) {
  int head = blockIdx.x, t = blockIdx.y, b = blockIdx.z, past = a.past[b], position = past + t;
  int from = first_key(a, b, t, past) / SPLIT, to = position / SPLIT;
  if (from == to) return;
  u64 row = ((u64)b * a.seq + t) * a.heads + head;
  int stride = a.head_dim + 2;
  const float* part = partial + row * parts * stride;
  float most = -INFINITE, total = 0.0f;
  for (int s = from; s <= to; s++) most = fmaxf(most, part[(u64)s * stride]);
  for (int s = from; s <= to; s++) total += expf(part[(u64)s * stride] - most) * part[(u64)s * stride + 1];
  for (int c = threadIdx.x; c < a.head_dim; c += blockDim.x) {
    float value = 0.0f;
    for (int s = from; s <= to; s++) value += expf(part[(u64)s * stride] - most) * part[(u64)s * stride + 2 + c];
    out[row * a.head_dim + c] = from_float<real>(value / total);
  }
}
