// What the library and the kernels of each instruction set agree on.
#pragma once
#include <stddef.h>
#include <stdint.h>

// Images [n, h, w, ci], filters [kh, kw, ci / groups, co], responses [n, ho, wo, co].
struct Shape {
  int64_t n, h, w, ci, kh, kw, co, ho, wo;
  int64_t sh, sw;     // strides
  int64_t dh, dw;     // dilation
  int64_t top, left;  // padding; negative where it crops
  int64_t groups;
};

// What stands between an image and a filter. kProduct is the ordinary convolution; the others are
// the adder, and name the surrogate for the gradient of its input.
enum Body { kHardTanh, kSign, kFull, kProduct };

struct Job {
  Shape shape;
  Body body;
  int64_t threads;
  const float* x;
  const float* w;
  const float* dy;
  float* out;
  float* shared;  // packed filters, or partial sums
};

// How an operation is cut: phases that follow each other, of units that do not.
struct Plan {
  int64_t units[2];
  int64_t shared, scratch;       // floats: of the job, and of each worker
  int64_t rows, strips, images;  // a unit is `images` images, or one of the `strips` of one image
  int64_t slice;                 // blocks of channels that are summed in one pass
  int64_t chunks;                // parts of the batch with sums of their own
};

struct Operation {
  Plan (*plan)(const Job&);
  void (*run)(const Job&, const Plan&, int phase, int64_t unit, float* scratch);
};

struct Kernels {
  const char* name;
  Operation forward, input_gradient, weight_gradient;
};

extern const Kernels kAvx512, kAvx2, kNeon;
