// x @ weight.T + bias, each element a sum of its own over the inner axis, in order, stretch by stretch.
//
// A BLAS divides the work by the shape of the whole, so a row's bits depend on how many rows there are. Here sixteen
// columns of the weight are turned into a panel, and rows pass by it, six at a time or one: the same fused additions.

#pragma once

#include "vector.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace onpolicy {

constexpr int64_t kRows = 6;                // times two vectors of columns: twelve sums in registers
constexpr int64_t kPanel = 2 * kLanes;      // columns
constexpr int64_t kStretch = 256;           // of the inner axis, summed by itself: rounding grows with a sum's length
constexpr int64_t kRowBlock = 32 * kRows;   // rows that stay in the second-level cache while the weight passes by

// Rows w .. w + count of the weight [out, depth] -> [depth][kPanel], zero beyond count.
inline void pack_panel(const float* w, int64_t count, int64_t depth, float* panel) {
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t n = 0; n < kPanel; n += kLanes) {
    const bool full = n + kLanes <= count;
    if (full)
      for (int64_t d = 0; d < whole; d += kLanes)
        at::vec::transpose_mxn<float, kLanes, kLanes>(w + n * depth + d, depth, panel + d * kPanel + n, kPanel);
    for (int64_t d = full ? whole : 0; d < depth; ++d)
      for (int64_t i = n; i < n + kLanes; ++i) panel[d * kPanel + i] = i < count ? w[i * depth + d] : 0.f;
  }
}

template <int M>
void multiply_rows(const float* x, const float* panel, int64_t depth, const float* bias, float* out, int64_t stride,
                   int64_t count) {
  float sums[M * kPanel] = {};
  for (int64_t begin = 0; begin < depth; begin += kStretch) {
    const int64_t end = std::min(depth, begin + kStretch);
    Register low[M], high[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) low[m] = high[m] = Vec(0.f);
    for (int64_t d = begin; d < end; ++d) {
      const Vec left = Vec::loadu(panel + d * kPanel), right = Vec::loadu(panel + d * kPanel + kLanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec value(x[m * depth + d]);
        low[m] = at::vec::fmadd(value, left, Vec(low[m]));
        high[m] = at::vec::fmadd(value, right, Vec(high[m]));
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      float* sum = sums + m * kPanel;
      (Vec::loadu(sum) + Vec(low[m])).store(sum);
      (Vec::loadu(sum + kLanes) + Vec(high[m])).store(sum + kLanes);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int64_t n = 0; n < count; ++n) out[m * stride + n] = bias ? sums[m * kPanel + n] + bias[n] : sums[m * kPanel + n];
}

// x [T, in], weight [out, in], bias [out] -> [T, out].
inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  at::Tensor out = at::empty({rows, columns}, x.options());
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float* add = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, panels = (columns + kPanel - 1) / kPanel;
  const int64_t work = std::min(rows, kRowBlock) * kPanel * depth;
  at::parallel_for(0, blocks * panels, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)),
                   [&](int64_t begin, int64_t end) {
    std::vector<float> panel(depth * kPanel);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / panels * kRowBlock, column = item % panels * kPanel;
      const int64_t last = std::min(rows, row + kRowBlock), count = std::min(kPanel, columns - column);
      pack_panel(w + column * depth, count, depth, panel.data());
      const float* c = add ? add + column : nullptr;
      int64_t m = row;
      for (; m + kRows <= last; m += kRows)
        multiply_rows<kRows>(from + m * depth, panel.data(), depth, c, to + m * columns + column, columns, count);
      const auto rest = [&](auto rows) {
        multiply_rows<rows>(from + m * depth, panel.data(), depth, c, to + m * columns + column, columns, count);
      };
      switch (last - m) {
        case 1: rest(std::integral_constant<int, 1>()); break;
        case 2: rest(std::integral_constant<int, 2>()); break;
        case 3: rest(std::integral_constant<int, 3>()); break;
        case 4: rest(std::integral_constant<int, 4>()); break;
        case 5: rest(std::integral_constant<int, 5>()); break;
      }
    }
  });
  return out;
}

}  // namespace onpolicy
