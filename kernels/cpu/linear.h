// x @ weight.T + bias, each element a dot product of its own: lanes over the inner axis, in order, then summed.
//
// A BLAS divides the work by the shape of the whole, so a row's bits depend on how many rows there are, and it copies
// the weight into panels first, which costs more than the product when rows are few. Here both lie as they lie.

#pragma once

#include "vector.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>

namespace onpolicy {

constexpr int64_t kRows = 4, kColumns = 3;  // twelve sums in registers
constexpr int64_t kRowBlock = 64;           // rows that stay in the second-level cache while the weight passes by

template <int M, int N>
void dot_tile(const float* x, const float* w, int64_t depth, const float* bias, float* out, int64_t stride) {
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = Vec(0.f);
  const auto step = [&](int64_t i, int64_t count) {
    Vec column[N];
    for (int n = 0; n < N; ++n) column[n] = Vec::loadu(w + n * depth + i, count);
    for (int m = 0; m < M; ++m) {
      const Vec row = Vec::loadu(x + m * depth + i, count);
      for (int n = 0; n < N; ++n) acc[m][n] = at::vec::fmadd(row, column[n], acc[m][n]);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= depth; i += kLanes) step(i, kLanes);
  if (i < depth) step(i, depth - i);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      const float sum = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, acc[m][n]);
      out[m * stride + n] = bias ? sum + bias[n] : sum;
    }
}

template <int N>
void dot_rows(const float* x, const float* w, int64_t rows, int64_t depth, const float* bias, float* out,
              int64_t stride) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    dot_tile<kRows, N>(x + m * depth, w, depth, bias, out + m * stride, stride);
  for (; m < rows; ++m) dot_tile<1, N>(x + m * depth, w, depth, bias, out + m * stride, stride);
}

// x [T, in], weight [out, in], bias [out] -> [T, out].
inline at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const int64_t rows = x.size(0), depth = x.size(1), columns = weight.size(0);
  at::Tensor out = at::empty({rows, columns}, x.options());
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  const float* add = bias ? bias->const_data_ptr<float>() : nullptr;
  float* to = out.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock, panels = (columns + kColumns - 1) / kColumns;
  const int64_t work = std::min(rows, kRowBlock) * kColumns * depth;
  at::parallel_for(0, blocks * panels, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)),
                   [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / panels * kRowBlock, column = item % panels * kColumns;
      const int64_t count = std::min(kRowBlock, rows - row);
      const float *a = from + row * depth, *b = w + column * depth, *c = add ? add + column : nullptr;
      float* o = to + row * columns + column;
      switch (std::min(kColumns, columns - column)) {
        case 3: dot_rows<3>(a, b, count, depth, c, o, columns); break;
        case 2: dot_rows<2>(a, b, count, depth, c, o, columns); break;
        default: dot_rows<1>(a, b, count, depth, c, o, columns);
      }
    }
  });
  return out;
}

}  // namespace onpolicy
