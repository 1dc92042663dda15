#include "kernels.h"

extern const Kernels kNeon = KERNELS("neon");
