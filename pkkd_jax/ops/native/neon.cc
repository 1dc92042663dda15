#include "kernels.h"

extern const Kernels kNeon = OPERATIONS("neon");
