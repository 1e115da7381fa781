// torch.ops.onpolicy: what kernels/cpu/__init__.py calls.

#include <torch/library.h>

#include "attention.h"
#include "attention_backward.h"
#include "elementwise.h"
#include "linear.h"
#include "sampling.h"

TORCH_LIBRARY(onpolicy, m) {
  m.def(
      "attend(Tensor q, Tensor k_cache, Tensor v_cache, Tensor queries, Tensor contexts, Tensor tables, float scale, "
      "int window, float softcap, Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def("store_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool offset) -> (Tensor, Tensor)");
  m.def("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool offset) -> (Tensor, Tensor, Tensor)");
  m.def("rope(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor");
  m.def("gated(Tensor gate_up, bool gelu) -> Tensor");
  m.def(
      "attend_backward(Tensor dout, Tensor q, Tensor k_blocks, Tensor v_blocks, Tensor out, Tensor lse, Tensor queries, "
      "Tensor contexts, Tensor tables, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inv, bool offset, Tensor? dsum) "
      "-> (Tensor, Tensor)");
  m.def("gated_backward(Tensor dy, Tensor gate_up, bool gelu) -> Tensor");
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("philox_uniform(Tensor seed, Tensor sample_id, Tensor position) -> Tensor");
  m.def("draw(Tensor z, Tensor logp, Tensor temperature, Tensor uniform) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(onpolicy, CPU, m) {
  m.impl("attend", onpolicy::attend);
  m.impl("store_kv", onpolicy::store_kv);
  m.impl("rms_norm", onpolicy::rms_norm);
  m.impl("add_rms_norm", onpolicy::add_rms_norm);
  m.impl("rope", onpolicy::rope);
  m.impl("gated", onpolicy::gated);
  m.impl("attend_backward", onpolicy::attend_backward);
  m.impl("rms_norm_backward", onpolicy::rms_norm_backward);
  m.impl("gated_backward", onpolicy::gated_backward);
  m.impl("linear", onpolicy::linear);
  m.impl("philox_uniform", onpolicy::philox_uniform);
  m.impl("draw", onpolicy::draw);
}
