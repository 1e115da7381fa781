// RMSNorm, RoPE and SwiGLU, one pass each; the arithmetic of kernels/reference/dense.py.
//
// A row is computed by itself, its columns always by the same instructions, so its bits don't depend on the others.

#pragma once

#include "vector.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace onpolicy {

constexpr float kGeluLinear = 1.5957691216057308f;             // 2 sqrt(2 / pi)
constexpr float kGeluCube = 0.044715f * 1.5957691216057308f;


template <typename F>
void for_rows(int64_t rows, int64_t width, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) f(row);
  });
}

// f(column, lanes) for the vectors of a row; the last one may be short.
template <typename F>
void for_columns(int64_t width, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
  if (i < width) f(i, width - i);
}

inline float inverse_rms(const float* x, int64_t width, float eps) {
  Vec squares(0.f);
  for_columns(width, [&](int64_t i, int64_t n) {
    const Vec v = Vec::loadu(x + i, n);
    squares = at::vec::fmadd(v, v, squares);
  });
  return 1 / std::sqrt(sum_lanes(squares) / float(width) + eps);
}

inline void scale_row(const float* x, const float* weight, float offset, float inv, float* out, int64_t width) {
  for_columns(width, [&](int64_t i, int64_t n) {
    ((Vec::loadu(x + i, n) * Vec(inv)) * (Vec::loadu(weight + i, n) + Vec(offset))).store(out + i, n);
  });
}

// x [T, N, D] -> the same normed, and 1 / rms [T, N, 1]. With offset the factor is 1 + weight.
inline std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps,
                                                    bool offset) {
  const int64_t heads = x.size(1), width = x.size(2);
  at::Tensor out = at::empty(x.sizes(), x.options()), inv = at::empty({x.size(0), heads, 1}, x.options());
  const float *from = x.const_data_ptr<float>(), *w = weight.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>(), *invs = inv.mutable_data_ptr<float>();
  const int64_t stride = x.stride(0);
  for_rows(x.size(0) * heads, width, [&](int64_t row) {
    const float* in = from + row / heads * stride + row % heads * width;
    invs[row] = inverse_rms(in, width, float(eps));
    scale_row(in, w, offset, invs[row], to + row * width, width);
  });
  return {out, inv};
}

// x and residual [T, H] -> their sum normed, 1 / rms [T, 1], and the sum.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> add_rms_norm(const at::Tensor& x, const at::Tensor& residual,
                                                            const at::Tensor& weight, double eps, bool offset) {
  const int64_t width = x.size(1);
  at::Tensor out = at::empty(x.sizes(), x.options()), sum = at::empty(x.sizes(), x.options());
  at::Tensor inv = at::empty({x.size(0), 1}, x.options());
  const float *a = x.const_data_ptr<float>(), *b = residual.const_data_ptr<float>();
  const float* w = weight.const_data_ptr<float>();
  float *to = out.mutable_data_ptr<float>(), *sums = sum.mutable_data_ptr<float>();
  float* invs = inv.mutable_data_ptr<float>();
  for_rows(x.size(0), width, [&](int64_t row) {
    const int64_t at = row * width;
    for_columns(width, [&](int64_t i, int64_t n) {
      (Vec::loadu(a + at + i, n) + Vec::loadu(b + at + i, n)).store(sums + at + i, n);
    });
    invs[row] = inverse_rms(sums + at, width, float(eps));
    scale_row(sums + at, w, offset, invs[row], to + at, width);
  });
  return {out, inv, sum};
}

// x [T, N, D], cos and sin [T, R/2] -> the first R elements rotated; sign -1 rotates back.
inline at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, double sign) {
  const int64_t heads = x.size(1), width = x.size(2), half = cos.size(1), stride = x.stride(0);
  at::Tensor out = at::empty(x.sizes(), x.options());
  const float *from = x.const_data_ptr<float>(), *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  const Vec turn{float(sign)};
  for_rows(x.size(0) * heads, width, [&](int64_t row) {
    const int64_t token = row / heads;
    const float* in = from + token * stride + row % heads * width;
    for_columns(half, [&](int64_t i, int64_t n) {
      const Vec a = Vec::loadu(in + i, n), b = Vec::loadu(in + half + i, n);
      const Vec cosine = Vec::loadu(c + token * half + i, n), sine = Vec::loadu(s + token * half + i, n) * turn;
      (a * cosine - b * sine).store(to + row * width + i, n);
      (b * cosine + a * sine).store(to + row * width + half + i, n);
    });
    std::copy(in + 2 * half, in + width, to + row * width + 2 * half);
  });
  return out;
}

// Of SiLU, gate * sigmoid(z) with z = gate; and of GELU in its tanh form, which is the same with another z.
inline Vec sigmoid_argument(Vec gate, bool gelu) {
  return gelu ? gate * (Vec(kGeluLinear) + Vec(kGeluCube) * (gate * gate)) : gate;
}

inline Vec sigmoid_slope(Vec gate, bool gelu) {  // dz / dgate
  return gelu ? Vec(kGeluLinear) + Vec(3 * kGeluCube) * (gate * gate) : Vec(1.f);
}

// gate_up [T, 2I] -> silu(gate) * up [T, I], or gelu(gate) * up.
inline at::Tensor gated(const at::Tensor& gate_up, bool gelu) {
  const int64_t width = gate_up.size(1) / 2;
  at::Tensor out = at::empty({gate_up.size(0), width}, gate_up.options());
  const float* from = gate_up.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_rows(gate_up.size(0), width, [&](int64_t row) {
    const float *gate = from + 2 * row * width, *up = gate + width;
    for_columns(width, [&](int64_t i, int64_t n) {
      const Vec g = Vec::loadu(gate + i, n), z = sigmoid_argument(g, gelu);
      ((g / (Vec(1.f) + z.neg().exp())) * Vec::loadu(up + i, n)).store(to + row * width + i, n);
    });
  });
  return out;
}

// Gradients of rms_norm: upstream dy [T, N, D] (contiguous), x and inv as above -> dx [T, N, D] and dweight [D].
// dsum [T, N, D], if given, is added to dx: the gradient of the sum that add_rms_norm returns.
inline std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                            const at::Tensor& weight, const at::Tensor& inv,
                                                            bool offset, const std::optional<at::Tensor>& dsum) {
  constexpr int64_t kChunk = 64;  // rows whose share of dweight is summed first: fixed, so threads don't matter
  const int64_t heads = x.size(1), width = x.size(2), stride = x.stride(0), rows = x.size(0) * heads;
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  at::Tensor dx = at::empty(x.sizes(), x.options()), parts = at::zeros({chunks, width}, x.options());
  const float *up = dy.const_data_ptr<float>(), *from = x.const_data_ptr<float>();
  const float *w = weight.const_data_ptr<float>(), *invs = inv.const_data_ptr<float>();
  const float* add = dsum ? dsum->const_data_ptr<float>() : nullptr;
  float *to = dx.mutable_data_ptr<float>(), *part = parts.mutable_data_ptr<float>();
  for_rows(chunks, kChunk * width, [&](int64_t chunk) {
    float* dw = part + chunk * width;
    for (int64_t row = chunk * kChunk; row < std::min(rows, (chunk + 1) * kChunk); ++row) {
      const float *d = up + row * width, *in = from + row / heads * stride + row % heads * width;
      const Vec scale(invs[row]);
      Vec dot(0.f);
      for_columns(width, [&](int64_t i, int64_t n) {
        const Vec normed = Vec::loadu(in + i, n) * scale, grad = Vec::loadu(d + i, n);
        (Vec::loadu(dw + i, n) + grad * normed).store(dw + i, n);
        dot = at::vec::fmadd(grad * (Vec::loadu(w + i, n) + Vec(float(offset))), normed, dot);
      });
      const Vec mean(sum_lanes(dot) / float(width));
      for_columns(width, [&](int64_t i, int64_t n) {
        const Vec normed = Vec::loadu(in + i, n) * scale;
        const Vec g = Vec::loadu(d + i, n) * (Vec::loadu(w + i, n) + Vec(float(offset)));
        Vec out = scale * (g - normed * mean);
        if (add) out = out + Vec::loadu(add + row * width + i, n);
        out.store(to + row * width + i, n);
      });
    }
  });
  return {dx, parts.sum(0)};
}

// Gradient of gated, through 1 / (1 + exp(-z)).
inline at::Tensor gated_backward(const at::Tensor& dy, const at::Tensor& gate_up, bool gelu) {
  const int64_t width = gate_up.size(1) / 2;
  at::Tensor out = at::empty(gate_up.sizes(), gate_up.options());
  const float *from = gate_up.const_data_ptr<float>(), *upstream = dy.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  for_rows(gate_up.size(0), width, [&](int64_t row) {
    const float *gate = from + 2 * row * width, *up = gate + width;
    float *dgate = to + 2 * row * width, *dup = dgate + width;
    for_columns(width, [&](int64_t i, int64_t n) {
      const Vec g = Vec::loadu(gate + i, n), d = Vec::loadu(upstream + row * width + i, n);
      const Vec sig = Vec(1.f) / (Vec(1.f) + sigmoid_argument(g, gelu).neg().exp()), act = g * sig;
      (d * act).store(dup + i, n);
      const Vec slope = act * (Vec(1.f) - sig) * sigmoid_slope(g, gelu) + sig;
      (slope * Vec::loadu(up + i, n) * d).store(dgate + i, n);
    });
  });
  return out;
}

}  // namespace onpolicy
