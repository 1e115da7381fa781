// Vectors of floats as torch's own CPU code has them: AVX2, AVX-512 or whatever the compiler's flags say.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

namespace onpolicy {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// What a Vec holds. An array of these stays in registers, one of Vec is kept in memory.
#ifdef CPU_CAPABILITY_AVX512
using Register = __m512;
#else
using Register = __m256;
#endif

inline float sum_lanes(Vec x) {
  float lanes[kLanes];
  x.store(lanes);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

}  // namespace onpolicy
