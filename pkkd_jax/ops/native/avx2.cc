#include "kernels.h"

extern const Kernels kAvx2 = OPERATIONS("avx2");
