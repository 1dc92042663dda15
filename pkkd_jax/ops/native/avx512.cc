#include "kernels.h"

extern const Kernels kAvx512 = OPERATIONS("avx512");
