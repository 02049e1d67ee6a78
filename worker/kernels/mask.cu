// The first key that each query of a sequence sees, from the window and the start of its document.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(256) first_keys(const int* starts, int window, u64 rows, int seq, int* first) {
  u64 row = thread_index();
  if (row >= rows) return;
  int t = (int)(row % seq), from = 0;
  if (window) from = max(0, t - window + 1);
  if (starts) from = max(from, starts[row]);
  first[row] = min(from, t);
}
