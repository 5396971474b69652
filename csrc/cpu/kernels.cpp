// The CPU kernels. Compiled once per instruction set (TWINFLOW_ISA names what returns their table), so the loops are
// plain C++ that the compiler vectorises; `omp simd` allows it to reorder the sums.

#include "kernels.h"

#include "conv.h"
#include "decode.h"
#include "int4.h"
#include "linear.h"
#include "mlp.h"
#include "norm.h"
#include "rope.h"
#include "sample.h"

const twinflow_kernels& TWINFLOW_ISA() {
  static const twinflow_kernels table = {
#define KERNEL(name, ...) launch_##name,
#define KERNEL_CPU KERNEL
#include "twinflow_kernels.h"
  };
  return table;
}
