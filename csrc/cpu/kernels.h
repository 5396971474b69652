// The tables of kernels.cpp, one for each instruction set that it is compiled for; dispatch.cpp picks one.
#pragma once

#include "twinflow_rt.h"

const twinflow_kernels& twinflow_kernels_baseline();
const twinflow_kernels& twinflow_kernels_avx2();
const twinflow_kernels& twinflow_kernels_avx512();
