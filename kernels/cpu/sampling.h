// Philox and the inverse CDF, as in kernels/reference/sampling.py.

#pragma once

#include "vector.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace onpolicy {

constexpr int64_t kCdfTile = 256;  // CDF_TILE of the reference

// int64 [R] each -> fp32 [R] in [0, 1): first word of Philox4x32-10, top 24 bits.
inline at::Tensor philox_uniform(const at::Tensor& seed, const at::Tensor& sample_id, const at::Tensor& position) {
  at::Tensor out = at::empty(seed.sizes(), seed.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  for (int64_t i = 0; i < seed.numel(); ++i) {
    const uint64_t key = seed.const_data_ptr<int64_t>()[i], sample = sample_id.const_data_ptr<int64_t>()[i];
    uint32_t c0 = sample, c1 = sample >> 32, c2 = position.const_data_ptr<int64_t>()[i], c3 = 0;
    uint32_t k0 = key, k1 = key >> 32;
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t(c0) * 0xD2511F53, p1 = uint64_t(c2) * 0xCD9E8D57;
      c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
      c1 = uint32_t(p1);
      c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
      c3 = uint32_t(p0);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    to[i] = float(c0 >> 8) * 0x1p-24f;
  }
  return out;
}

// A row's probabilities p, and their running sums by tile. Returns the entropy.
inline float probabilities(const float* logp, float* p, std::vector<float>& tile_cdf, int64_t vocab) {
  float total = 0, entropy = 0;
  tile_cdf.clear();
  for (int64_t begin = 0; begin < vocab; begin += kCdfTile) {
    const int64_t end = std::min(vocab, begin + kCdfTile);
    Vec mass(0.f), moment(0.f);
    for (int64_t i = begin; i < end; i += kLanes) {
      const int64_t n = std::min(kLanes, end - i);
      const Vec log = Vec::loadu(logp + i, n), v = log.exp();
      v.store(p + i, n);
      moment = moment + Vec::blendv(v * log, Vec(0.f), v == Vec(0.f));  // 0 * -inf is NaN
      mass = mass + (n == kLanes ? v : Vec::loadu(p + i, n));  // the rest of a short vector counts as 0
    }
    float lanes[kLanes], moments[kLanes];
    mass.store(lanes);
    moment.store(moments);
    for (int64_t i = 0; i < kLanes; ++i) {
      total += lanes[i];
      entropy -= moments[i];
    }
    tile_cdf.push_back(total);
  }
  return entropy;
}

// First entry whose running sum exceeds uniform * total, never one of mass zero.
inline int64_t inverse_cdf(const float* p, const std::vector<float>& tile_cdf, int64_t vocab, float uniform) {
  const float threshold = uniform * tile_cdf.back();
  // Rounding may lift the threshold to the total, or to a tile's own sum: then the last entry with mass is taken.
  int64_t last = -1, tile = std::upper_bound(tile_cdf.begin(), tile_cdf.end(), threshold) - tile_cdf.begin();
  tile = std::min<int64_t>(tile, tile_cdf.size() - 1);
  float sum = tile > 0 ? tile_cdf[tile - 1] : 0;
  for (int64_t i = tile * kCdfTile; i < std::min(vocab, (tile + 1) * kCdfTile); ++i) {
    if (p[i] <= 0) continue;
    last = i;
    sum += p[i];
    if (sum > threshold) return i;
  }
  for (int64_t i = tile * kCdfTile; last < 0 && i > 0; --i)
    if (p[i - 1] > 0) last = i - 1;
  return std::max<int64_t>(0, last);
}

// z and its log-softmax logp [R, V], temperature and uniform [R] -> token (arg max of z at temperature 0), its logp, and
// the row's entropy.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> draw(const at::Tensor& z, const at::Tensor& logp,
                                                           const at::Tensor& temperature, const at::Tensor& uniform) {
  const int64_t rows = z.size(0), vocab = z.size(1);
  at::Tensor tokens = at::empty({rows}, z.options().dtype(at::kLong)), chosen = at::empty({rows}, z.options());
  at::Tensor entropy = at::empty({rows}, z.options());
  const float *logits = z.const_data_ptr<float>(), *logps = logp.const_data_ptr<float>();
  const float *heat = temperature.const_data_ptr<float>(), *noise = uniform.const_data_ptr<float>();
  int64_t* to = tokens.mutable_data_ptr<int64_t>();
  float *to_logp = chosen.mutable_data_ptr<float>(), *to_entropy = entropy.mutable_data_ptr<float>();
  at::parallel_for(0, rows, std::max<int64_t>(1, 8192 / vocab), [&](int64_t begin, int64_t end) {
    std::vector<float> p(vocab), tile_cdf;
    for (int64_t row = begin; row < end; ++row) {
      const float *of = logits + row * vocab, *in = logps + row * vocab;
      to_entropy[row] = probabilities(in, p.data(), tile_cdf, vocab);
      to[row] = heat[row] > 0 ? inverse_cdf(p.data(), tile_cdf, vocab, noise[row])
                              : std::max_element(of, of + vocab) - of;
      to_logp[row] = in[to[row]];
    }
  });
  return {tokens, chosen, entropy};
}

}  // namespace onpolicy
