#include "kernels.h"

extern const Kernels kAvx512 = KERNELS("avx512");
