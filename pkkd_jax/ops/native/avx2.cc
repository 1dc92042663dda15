#include "kernels.h"

extern const Kernels kAvx2 = KERNELS("avx2");
