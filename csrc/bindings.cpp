// Python's door to the C interface: raw pointers in, statuses out as exceptions. The interpreter lock
// is released while a kernel runs.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "twinflow_rt.h"

namespace py = pybind11;

namespace {

void check(int status) {
  if (status != TWINFLOW_OK) throw std::invalid_argument(twinflow_error_message(status));
}

template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): addresses come from Python
}

using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels; see csrc/include/twinflow_rt.h. Arguments are addresses and sizes.";
  m.attr("abi_version") = twinflow_abi_version();
  m.attr("isa") = twinflow_cpu_isa();
  m.attr("F32") = static_cast<int>(TWINFLOW_F32);
  m.attr("BF16") = static_cast<int>(TWINFLOW_BF16);

  m.def(
      "rms_norm",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t weight, int64_t weight_batch, uintptr_t out,
         int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_rms_norm(ptr<void>(x), x_batch, x_row, ptr<float>(weight), weight_batch, ptr<void>(out),
                                    batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "layer_norm",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t weight, int64_t weight_batch, uintptr_t bias,
         int64_t bias_batch, uintptr_t out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype,
         int threads) {
        check(twinflow_cpu_layer_norm(ptr<void>(x), x_batch, x_row, ptr<float>(weight), weight_batch, ptr<float>(bias),
                                      bias_batch, ptr<void>(out), batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "residual_norm",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t branch, int64_t branch_batch, int64_t branch_row,
         uintptr_t post, int64_t post_batch, uintptr_t pre, int64_t pre_batch, uintptr_t x_out, uintptr_t h_out,
         int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_residual_norm(ptr<void>(x), x_batch, x_row, ptr<void>(branch), branch_batch, branch_row,
                                         ptr<float>(post), post_batch, ptr<float>(pre), pre_batch, ptr<void>(x_out),
                                         ptr<void>(h_out), batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "residual_layer_norm",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t branch, int64_t branch_batch, int64_t branch_row,
         uintptr_t gate, int64_t gate_batch, uintptr_t weight, int64_t weight_batch, uintptr_t bias, int64_t bias_batch,
         uintptr_t x_out, uintptr_t h_out, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_residual_layer_norm(ptr<void>(x), x_batch, x_row, ptr<void>(branch), branch_batch,
                                               branch_row, ptr<float>(gate), gate_batch, ptr<float>(weight),
                                               weight_batch, ptr<float>(bias), bias_batch, ptr<void>(x_out),
                                               ptr<void>(h_out), batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "swiglu",
      [](uintptr_t x, uintptr_t out, int64_t rows, int64_t hidden, int dtype, int threads) {
        check(twinflow_cpu_swiglu(ptr<void>(x), ptr<void>(out), rows, hidden, dtype, threads));
      },
      Release());

  m.def(
      "gelu_tanh",
      [](uintptr_t x, uintptr_t out, int64_t rows, int64_t width, int dtype, int threads) {
        check(twinflow_cpu_gelu_tanh(ptr<void>(x), ptr<void>(out), rows, width, dtype, threads));
      },
      Release());

  m.def(
      "qk_norm_rope",
      [](uintptr_t qkv, int64_t qkv_batch, int64_t qkv_row, int64_t qkv_part, uintptr_t out, int64_t out_batch,
         int64_t out_row, int64_t out_part, uintptr_t q_weight, uintptr_t k_weight, uintptr_t cos, uintptr_t sin,
         int64_t angle_batch, int64_t angle_row, int64_t batch, int64_t seq, int64_t heads, int64_t dim, int parts,
         float eps, int dtype, int threads) {
        check(twinflow_cpu_qk_norm_rope(ptr<void>(qkv), qkv_batch, qkv_row, qkv_part, ptr<void>(out), out_batch,
                                        out_row, out_part, ptr<float>(q_weight), ptr<float>(k_weight), ptr<float>(cos),
                                        ptr<float>(sin), angle_batch, angle_row, batch, seq, heads, dim, parts, eps,
                                        dtype, threads));
      },
      Release());

  m.def(
      "grouped_qk_norm_rope",
      [](uintptr_t qkv, int64_t qkv_batch, int64_t qkv_row, uintptr_t q_weight, uintptr_t k_weight, uintptr_t cos,
         uintptr_t sin, int64_t angle_batch, int64_t angle_row, int64_t batch, int64_t seq, int64_t heads,
         int64_t kv_heads, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_grouped_qk_norm_rope(ptr<void>(qkv), qkv_batch, qkv_row, ptr<float>(q_weight),
                                                ptr<float>(k_weight), ptr<float>(cos), ptr<float>(sin), angle_batch,
                                                angle_row, batch, seq, heads, kv_heads, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "x0_project",
      [](uintptr_t x, uintptr_t velocity, uintptr_t out, int64_t n, float t, int dtype, int threads) {
        check(twinflow_cpu_x0_project(ptr<void>(x), ptr<void>(velocity), ptr<void>(out), n, t, dtype, threads));
      },
      Release());

  m.def(
      "to_uint8",
      [](uintptr_t image, std::array<int64_t, 4> strides, uintptr_t out, int64_t batch, int64_t channels,
         int64_t height, int64_t width, int dtype, int threads) {
        check(twinflow_cpu_to_uint8(ptr<void>(image), strides.data(), ptr<uint8_t>(out), batch, channels, height, width,
                                    dtype, threads));
      },
      Release());

  m.def(
      "group_norm_silu",
      [](uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t out, uintptr_t scratch, int64_t batch, int64_t pixels,
         int64_t channels, int64_t groups, float eps, int dtype, int threads) {
        check(twinflow_cpu_group_norm_silu(ptr<void>(x), ptr<void>(weight), ptr<void>(bias), ptr<void>(out),
                                           ptr<float>(scratch), batch, pixels, channels, groups, eps, dtype, threads));
      },
      Release());

  m.def(
      "winograd_input",
      [](uintptr_t x, uintptr_t points, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t first,
         int64_t last, bool enlarged, int dtype, int threads) {
        check(twinflow_cpu_winograd_input(ptr<float>(x), ptr<float>(points), batch, height, width, channels, first,
                                          last, enlarged, dtype, threads));
      },
      Release());

  m.def(
      "winograd_output",
      [](uintptr_t points, uintptr_t bias, uintptr_t added, uintptr_t out, int64_t batch, int64_t height, int64_t width,
         int64_t channels, int64_t first, int64_t last, bool enlarged, int dtype, int threads) {
        check(twinflow_cpu_winograd_output(ptr<float>(points), ptr<float>(bias), ptr<float>(added), ptr<float>(out),
                                           batch, height, width, channels, first, last, enlarged, dtype, threads));
      },
      Release());

  m.def(
      "quantize_rows",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t values, uintptr_t scales, int64_t batch, int64_t seq,
         int64_t dim, int dtype, int threads) {
        check(twinflow_cpu_quantize_rows(ptr<void>(x), x_batch, x_row, ptr<int8_t>(values), ptr<float>(scales), batch,
                                         seq, dim, dtype, threads));
      },
      Release());

  m.def(
      "rms_norm_quantized",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t weight, int64_t weight_batch, uintptr_t values,
         uintptr_t scales, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_rms_norm_quantized(ptr<void>(x), x_batch, x_row, ptr<float>(weight), weight_batch,
                                              ptr<int8_t>(values), ptr<float>(scales), batch, seq, dim, eps, dtype,
                                              threads));
      },
      Release());

  m.def(
      "layer_norm_quantized",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t weight, int64_t weight_batch, uintptr_t bias,
         int64_t bias_batch, uintptr_t values, uintptr_t scales, int64_t batch, int64_t seq, int64_t dim, float eps,
         int dtype, int threads) {
        check(twinflow_cpu_layer_norm_quantized(ptr<void>(x), x_batch, x_row, ptr<float>(weight), weight_batch,
                                                ptr<float>(bias), bias_batch, ptr<int8_t>(values), ptr<float>(scales),
                                                batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "residual_norm_quantized",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t branch, int64_t branch_batch, int64_t branch_row,
         uintptr_t post, int64_t post_batch, uintptr_t pre, int64_t pre_batch, uintptr_t x_out, uintptr_t values,
         uintptr_t scales, int64_t batch, int64_t seq, int64_t dim, float eps, int dtype, int threads) {
        check(twinflow_cpu_residual_norm_quantized(ptr<void>(x), x_batch, x_row, ptr<void>(branch), branch_batch,
                                                   branch_row, ptr<float>(post), post_batch, ptr<float>(pre), pre_batch,
                                                   ptr<void>(x_out), ptr<int8_t>(values), ptr<float>(scales), batch,
                                                   seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "residual_layer_norm_quantized",
      [](uintptr_t x, int64_t x_batch, int64_t x_row, uintptr_t branch, int64_t branch_batch, int64_t branch_row,
         uintptr_t gate, int64_t gate_batch, uintptr_t weight, int64_t weight_batch, uintptr_t bias, int64_t bias_batch,
         uintptr_t x_out, uintptr_t values, uintptr_t scales, int64_t batch, int64_t seq, int64_t dim, float eps,
         int dtype, int threads) {
        check(twinflow_cpu_residual_layer_norm_quantized(
            ptr<void>(x), x_batch, x_row, ptr<void>(branch), branch_batch, branch_row, ptr<float>(gate), gate_batch,
            ptr<float>(weight), weight_batch, ptr<float>(bias), bias_batch, ptr<void>(x_out), ptr<int8_t>(values),
            ptr<float>(scales), batch, seq, dim, eps, dtype, threads));
      },
      Release());

  m.def(
      "swiglu_quantized",
      [](uintptr_t x, uintptr_t values, uintptr_t scales, int64_t rows, int64_t hidden, int dtype, int threads) {
        check(twinflow_cpu_swiglu_quantized(ptr<void>(x), ptr<int8_t>(values), ptr<float>(scales), rows, hidden, dtype,
                                            threads));
      },
      Release());

  m.def(
      "gelu_tanh_quantized",
      [](uintptr_t x, uintptr_t values, uintptr_t scales, int64_t rows, int64_t width, int dtype, int threads) {
        check(twinflow_cpu_gelu_tanh_quantized(ptr<void>(x), ptr<int8_t>(values), ptr<float>(scales), rows, width,
                                               dtype, threads));
      },
      Release());

  m.def(
      "dequantize",
      [](uintptr_t sums, uintptr_t x_scales, uintptr_t w_scales, uintptr_t bias, uintptr_t out, int64_t rows,
         int64_t columns, int dtype, int threads) {
        check(twinflow_cpu_dequantize(ptr<int32_t>(sums), ptr<float>(x_scales), ptr<float>(w_scales), ptr<void>(bias),
                                      ptr<void>(out), rows, columns, dtype, threads));
      },
      Release());

  m.def("release_threads", [] { return twinflow_cpu_release_threads() == 0; }, Release());
  m.def("threads_apart", twinflow_cpu_threads_apart, Release());
  m.def("threads_together", twinflow_cpu_threads_together, Release());
}
