// Causal attention over 32-key blocks, and the write into them; the arithmetic of kernels/reference/attention.py.
//
// One (query row, KV head) is computed by itself: its blocks in order, its keys in order, by the same instructions
// whatever stands beside it. Neither batch, nor tile, nor page, nor thread leaves a trace in its bits.

#pragma once

#include "vector.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace onpolicy {

constexpr int64_t kBlock = 32;  // keys a block, as in the reference
constexpr int64_t kVecs = kBlock / kLanes;
constexpr int64_t kTile = 16;  // query tokens that share a block's transposed keys
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Tile {
  int64_t seq, first, count;  // query tokens first .. first + count of the sequence
};

struct Shape {
  int64_t dim, padded, group;  // head dim, the same in whole vectors, query heads a KV head
  float scale, softcap;        // softcap 0: none
  int64_t window;              // 0: none
};

// Scratch of one thread, for tiles of one call.
struct Scratch {
  std::vector<float> keys, values, queries, scores, out, peak, mass;

  explicit Scratch(const Shape& s)
      : keys(s.dim * kBlock),
        values(kBlock * s.padded),
        queries(kTile * s.group * s.dim),
        scores(kTile * s.group * kBlock),
        out(kTile * s.group * s.padded),
        peak(kTile * s.group),
        mass(kTile * s.group) {}
};

// [32][dim] -> [dim][32]
inline void transpose_keys(const float* from, float* to, int64_t dim) {
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    for (int64_t d = 0; d < whole; d += kLanes)
      at::vec::transpose_mxn<float, kLanes, kLanes>(from + j * dim + d, dim, to + d * kBlock + j, kBlock);
    for (int64_t d = whole; d < dim; ++d)
      for (int64_t i = j; i < j + kLanes; ++i) to[d * kBlock + i] = from[i * dim + d];
  }
}

// scores[r][j] = sum over d of q[r][d] * keys[d][j], d ascending.
template <int R>
void score_rows(const float* q, const float* keys, float* scores, int64_t dim) {
  Vec acc[R][kVecs];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec(0.f);
  for (int64_t d = 0; d < dim; ++d) {
    for (int v = 0; v < kVecs; ++v) {
      const Vec key = Vec::loadu(keys + d * kBlock + v * kLanes);
      for (int r = 0; r < R; ++r) acc[r][v] = at::vec::fmadd(Vec(q[r * dim + d]), key, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v].store(scores + r * kBlock + v * kLanes);
}

// out[r] = out[r] * shrink[r] + sum over j of p[r][j] * values[j], j ascending; V vectors of columns.
template <int R, int V>
void add_values(float* out, int64_t stride, const float* p, const float* shrink, const float* values,
                int64_t value_stride, int64_t begin, int64_t end) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v] = Vec::loadu(out + r * stride + v * kLanes) * Vec(shrink[r]);
  for (int64_t j = begin; j < end; ++j) {
    for (int v = 0; v < V; ++v) {
      const Vec value = Vec::loadu(values + j * value_stride + v * kLanes);
      for (int r = 0; r < R; ++r) acc[r][v] = at::vec::fmadd(Vec(p[r * kBlock + j]), value, acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) acc[r][v].store(out + r * stride + v * kLanes);
}

template <int R>
void add_value_rows(float* out, const float* p, const float* shrink, const float* values, int64_t value_stride,
                    int64_t padded, int64_t begin, int64_t end) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= padded; d += 4 * kLanes)
    add_values<R, 4>(out + d, padded, p, shrink, values + d, value_stride, begin, end);
  for (; d < padded; d += kLanes)
    add_values<R, 1>(out + d, padded, p, shrink, values + d, value_stride, begin, end);
}

// Scores become probabilities relative to the row's new peak; returns the factor for what was added before.
inline float absorb_scores(float* s, int64_t begin, int64_t end, float softcap, float& peak, float& mass) {
  if (softcap > 0)
    for (int v = 0; v < kVecs; ++v)
      (Vec(softcap) * (Vec::loadu(s + v * kLanes) / Vec(softcap)).tanh()).store(s + v * kLanes);
  std::fill(s, s + begin, -kInf);
  std::fill(s + end, s + kBlock, -kInf);
  float best = peak;
  for (int64_t j = begin; j < end; ++j) best = std::max(best, s[j]);
  Vec total(0.f);
  for (int v = 0; v < kVecs; ++v) {
    const Vec p = (Vec::loadu(s + v * kLanes) - Vec(best)).exp();
    p.store(s + v * kLanes);
    total = total + p;
  }
  const float shrink = std::exp(peak - best);
  mass = mass * shrink + sum_lanes(total);
  peak = best;
  return shrink;
}

inline void attend_tile(const float* q, int64_t q_stride, const float* const* keys, const float* const* values, float* out,
                 int64_t out_stride, float* lse, int64_t lse_stride, int64_t position, int64_t count, const Shape& s,
                 Scratch& scratch) {
  const int64_t rows = count * s.group;
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = q + (r / s.group) * q_stride + (r % s.group) * s.dim;
    for (int64_t d = 0; d < s.dim; ++d) scratch.queries[r * s.dim + d] = from[d] * s.scale;
  }
  std::fill_n(scratch.out.begin(), rows * s.padded, 0.f);
  std::fill_n(scratch.peak.begin(), rows, -kInf);
  std::fill_n(scratch.mass.begin(), rows, 0.f);
  std::vector<float> shrink(s.group);

  const int64_t oldest = s.window > 0 ? std::max<int64_t>(0, position - s.window + 1) : 0;
  for (int64_t block = oldest / kBlock; block <= (position + count - 1) / kBlock; ++block) {
    const int64_t start = block * kBlock;
    transpose_keys(keys[block], scratch.keys.data(), s.dim);
    const float* v = values[block];
    if (s.padded != s.dim) {
      for (int64_t j = 0; j < kBlock; ++j)
        std::copy_n(v + j * s.dim, s.dim, scratch.values.begin() + j * s.padded);
      v = scratch.values.data();
    }
    const int64_t first = std::max<int64_t>(0, start - position);  // token of the tile that sees the block
    for (int64_t token = first; token < count; ++token) {
      const int64_t at = position + token;
      const int64_t begin = s.window > 0 ? std::max<int64_t>(0, at - s.window + 1 - start) : 0;
      const int64_t end = std::min(kBlock, at - start + 1);
      if (begin >= end) continue;
      const int64_t row = token * s.group;
      float* p = scratch.scores.data();
      for (int64_t g = 0; g < s.group; g += 2) {
        const float* from = scratch.queries.data() + (row + g) * s.dim;
        if (g + 1 < s.group)
          score_rows<2>(from, scratch.keys.data(), p + g * kBlock, s.dim);
        else
          score_rows<1>(from, scratch.keys.data(), p + g * kBlock, s.dim);
      }
      for (int64_t g = 0; g < s.group; ++g)
        shrink[g] =
            absorb_scores(p + g * kBlock, begin, end, s.softcap, scratch.peak[row + g], scratch.mass[row + g]);
      for (int64_t g = 0; g < s.group; g += 2) {
        float* to = scratch.out.data() + (row + g) * s.padded;
        if (g + 1 < s.group)
          add_value_rows<2>(to, p + g * kBlock, &shrink[g], v, s.padded, s.padded, begin, end);
        else
          add_value_rows<1>(to, p + g * kBlock, &shrink[g], v, s.padded, s.padded, begin, end);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = scratch.out.data() + r * s.padded;
    float* to = out + (r / s.group) * out_stride + (r % s.group) * s.dim;
    for (int64_t d = 0; d < s.dim; ++d) to[d] = from[d] / scratch.mass[r];
    if (lse) lse[(r / s.group) * lse_stride + r % s.group] = scratch.peak[r] + std::log(scratch.mass[r]);
  }
}

// q [T, Hq, D]; caches [pages, Hkv, page, D]; queries and contexts [S] and tables [S, blocks], int64, as in
// plan_tiles. Fills out [T, Hq, D] and, where given, lse [T, Hq, 1].
inline void attend(const at::Tensor& q, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& queries,
            const at::Tensor& contexts, const at::Tensor& tables, double scale, int64_t window, double softcap,
            at::Tensor out, const std::optional<at::Tensor>& lse) {
  const int64_t heads = k_cache.size(1), per_page = k_cache.size(2) / kBlock, dim = q.size(2);
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  const Shape shape{dim, padded, q.size(1) / heads, float(scale), float(softcap), window};
  const int64_t *num = queries.const_data_ptr<int64_t>(), *context = contexts.const_data_ptr<int64_t>();
  const int64_t* table = tables.const_data_ptr<int64_t>();

  std::vector<Tile> tiles;
  std::vector<int64_t> rows(queries.numel());
  int64_t row = 0, pairs = 0;
  for (int64_t seq = 0; seq < queries.numel(); ++seq) {
    rows[seq] = row;
    row += num[seq];
    for (int64_t first = 0; first < num[seq]; first += kTile) {
      tiles.push_back({seq, first, std::min(kTile, num[seq] - first)});
      pairs += tiles.back().count * context[seq];
    }
  }
  const float *qs = q.const_data_ptr<float>(), *ks = k_cache.const_data_ptr<float>();
  const float* vs = v_cache.const_data_ptr<float>();
  float *outs = out.mutable_data_ptr<float>(), *lses = lse ? lse->mutable_data_ptr<float>() : nullptr;
  const int64_t q_stride = q.stride(0), out_stride = out.stride(0), lse_stride = q.size(1);
  const int64_t items = tiles.size() * heads;
  const int64_t work = pairs * heads * shape.group * dim / std::max<int64_t>(1, items);
  at::parallel_for(0, items, std::max<int64_t>(1, 65536 / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    Scratch scratch(shape);
    std::vector<const float*> keys, values;
    for (int64_t item = begin; item < end; ++item) {
      const Tile& tile = tiles[item / heads];
      const int64_t head = item % heads, position = context[tile.seq] - num[tile.seq] + tile.first;
      const int64_t blocks = (position + tile.count + kBlock - 1) / kBlock;
      keys.resize(blocks);
      values.resize(blocks);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t id = table[tile.seq * tables.size(1) + b];
        const int64_t page = id / per_page, inside = id % per_page * kBlock * dim;
        keys[b] = ks + page * k_cache.stride(0) + head * k_cache.stride(1) + inside;
        values[b] = vs + page * v_cache.stride(0) + head * v_cache.stride(1) + inside;
      }
      const int64_t at = rows[tile.seq] + tile.first, column = head * shape.group;
      attend_tile(qs + at * q_stride + column * dim, q_stride, keys.data(), values.data(),
                  outs + at * out_stride + column * dim, out_stride, lses ? lses + at * lse_stride + column : nullptr,
                  lse_stride, position, tile.count, shape, scratch);
    }
  });
}

// k, v [T, Hkv, D] into pages at slots [T].
inline void store_kv(const at::Tensor& k, const at::Tensor& v, at::Tensor k_cache, at::Tensor v_cache,
              const at::Tensor& slots) {
  const int64_t heads = k.size(1), dim = k.size(2), page = k_cache.size(2);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  const float *ks = k.const_data_ptr<float>(), *vs = v.const_data_ptr<float>();
  float *k_to = k_cache.mutable_data_ptr<float>(), *v_to = v_cache.mutable_data_ptr<float>();
  for (int64_t t = 0; t < k.size(0); ++t) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = head * k_cache.stride(1) + slot[t] % page * dim, of = slot[t] / page;
      std::copy_n(ks + t * k.stride(0) + head * dim, dim, k_to + of * k_cache.stride(0) + at);
      std::copy_n(vs + t * v.stride(0) + head * dim, dim, v_to + of * v_cache.stride(0) + at);
    }
  }
}

}  // namespace onpolicy
