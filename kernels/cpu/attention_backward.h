// Gradients of packed attention; the scores are recomputed from the log-sum-exp (FlashAttention-2, Dao 2023).
//
// One (sequence, KV head) at a time, so every sum has one writer and one order, whatever the threads.

#pragma once

#include "attention.h"

#include <tuple>

namespace onpolicy {

// to[i] += factor * from[i]
inline void add_scaled(float* to, const float* from, float factor, int64_t width) {
  const Vec f(factor);
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) at::vec::fmadd(f, Vec::loadu(from + i), Vec::loadu(to + i)).store(to + i);
  for (; i < width; ++i) to[i] += factor * from[i];
}

// q, dout, out [T, Hq, D] and lse [T, Hq, 1], contiguous; blocks [P, Hkv, 32, D]; queries and contexts [S] and tables
// [S, blocks] as in plan_tiles. Returns dq [T, Hq, D], dk and dv [K, Hkv, D] of all contexts, end to end.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> attend_backward(
    const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k_blocks, const at::Tensor& v_blocks,
    const at::Tensor& out, const at::Tensor& lse, const at::Tensor& queries, const at::Tensor& contexts,
    const at::Tensor& tables, double scale, int64_t window, double softcap) {
  const int64_t heads = k_blocks.size(1), q_heads = q.size(1), dim = q.size(2), group = q_heads / heads;
  const int64_t *asked = queries.const_data_ptr<int64_t>(), *length = contexts.const_data_ptr<int64_t>();
  std::vector<int64_t> keys_from(contexts.numel()), rows_from(contexts.numel());  // of each sequence's position 0
  int64_t num_keys = 0, num_rows = 0;
  for (int64_t s = 0; s < contexts.numel(); ++s) {
    keys_from[s] = num_keys;
    num_keys += length[s];
    num_rows += asked[s];
    rows_from[s] = num_rows - length[s];
  }
  at::Tensor dq = at::zeros(q.sizes(), q.options());
  at::Tensor dk = at::zeros({num_keys, heads, dim}, q.options()), dv = at::zeros({num_keys, heads, dim}, q.options());
  const float *qs = q.const_data_ptr<float>(), *douts = dout.const_data_ptr<float>();
  const float *outs = out.const_data_ptr<float>(), *lses = lse.const_data_ptr<float>();
  const float *ks = k_blocks.const_data_ptr<float>(), *vs = v_blocks.const_data_ptr<float>();
  float *dqs = dq.mutable_data_ptr<float>(), *dks = dk.mutable_data_ptr<float>(), *dvs = dv.mutable_data_ptr<float>();
  const int64_t* table = tables.const_data_ptr<int64_t>();

  at::parallel_for(0, contexts.numel() * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys(dim * kBlock), values(dim * kBlock), scores(group * kBlock), dscores(group * kBlock);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t seq = item / heads, head = item % heads;
      for (int64_t block = 0; block * kBlock < length[seq]; ++block) {
        const int64_t start = block * kBlock;
        const int64_t at = (table[seq * tables.size(1) + block] * heads + head) * kBlock * dim;
        transpose_keys(ks + at, keys.data(), dim);
        transpose_keys(vs + at, values.data(), dim);
        const int64_t last = window > 0 ? std::min(length[seq], start + kBlock + window - 1) : length[seq];
        for (int64_t position = std::max(start, length[seq] - asked[seq]); position < last; ++position) {
          const int64_t first = window > 0 ? std::max<int64_t>(0, position - window + 1 - start) : 0;
          const int64_t stop = std::min(kBlock, position - start + 1);
          const int64_t row = (rows_from[seq] + position) * q_heads + head * group;
          for (int64_t g = 0; g < group; ++g) {
            score_rows<1>(qs + (row + g) * dim, keys.data(), scores.data() + g * kBlock, dim);
            score_rows<1>(douts + (row + g) * dim, values.data(), dscores.data() + g * kBlock, dim);
            float delta = 0;
            for (int64_t d = 0; d < dim; ++d) delta += douts[(row + g) * dim + d] * outs[(row + g) * dim + d];
            for (int v = 0; v < kVecs; ++v) {
              float *s = scores.data() + g * kBlock + v * kLanes, *ds = dscores.data() + g * kBlock + v * kLanes;
              Vec score = Vec::loadu(s) * Vec(float(scale)), slope(1.f);
              if (softcap > 0) {
                const Vec tanh = (score / Vec(float(softcap))).tanh();
                score = Vec(float(softcap)) * tanh;
                slope = Vec(1.f) - tanh * tanh;
              }
              const Vec p = (score - Vec(lses[row + g])).exp();
              p.store(s);
              (p * (Vec::loadu(ds) - Vec(delta)) * slope * Vec(float(scale))).store(ds);
            }
          }
          for (int64_t j = first; j < stop; ++j) {
            const int64_t key = ((keys_from[seq] + start + j) * heads + head) * dim;
            for (int64_t g = 0; g < group; ++g) {
              const float p = scores[g * kBlock + j], ds = dscores[g * kBlock + j];
              add_scaled(dqs + (row + g) * dim, ks + at + j * dim, ds, dim);
              add_scaled(dks + key, qs + (row + g) * dim, ds, dim);
              add_scaled(dvs + key, douts + (row + g) * dim, p, dim);
            }
          }
        }
      }
    }
  });
  return {dq, dk, dv};
}

}  // namespace onpolicy
