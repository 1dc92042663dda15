// The kernels of one instruction set (-DISA=kAvx512 and so on) against float64 loops, on random
// shapes that are multiples of nothing, with guards around every buffer. Needs no Python, so that a
// sanitizer or an emulator can run it. Prints the largest error; exits with 1 if it is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../pkkd_jax/ops/native/job.h"

namespace {

constexpr float kGuard = 12345.5f;
#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kGuards = 0;  // it has its own, and sees reads as well
#else
constexpr int64_t kGuards = 32;
#endif

struct Buffer {
  std::vector<float> all;
  explicit Buffer(int64_t size) : all(static_cast<size_t>(size + 2 * kGuards), kGuard) {}
  float* data() { return all.data() + kGuards; }
  int64_t size() const { return static_cast<int64_t>(all.size()) - 2 * kGuards; }
  bool intact() const {
    for (int64_t i = 0; i < kGuards; ++i) {
      if (all[i] != kGuard || all[all.size() - 1 - i] != kGuard) return false;
    }
    return true;
  }
};

struct Random {
  std::mt19937 engine;
  int64_t of(std::initializer_list<int64_t> values) {
    return *(values.begin() + std::uniform_int_distribution<size_t>(0, values.size() - 1)(engine));
  }
  void fill(Buffer* buffer) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < buffer->size(); ++i) buffer->data()[i] = normal(engine);
  }
};

double surrogate(Body body, double d, double w) {
  switch (body) {
    case kHardTanh: return std::fmin(std::fmax(d, -1.0), 1.0);
    case kSign: return (d > 0) - (d < 0);
    case kFull: return d;
    case kProduct: return w;
  }
  return 0;
}

// Runs both phases as `threads` threads could, the units of each in a random order.
void run(const Operation& operation, Job job, Random* random, bool* intact) {
  const Plan plan = operation.plan(job);
  Buffer shared(plan.shared), scratch(plan.scratch);
  job.shared = shared.data();
  for (int phase = 0; phase < 2; ++phase) {
    std::vector<int64_t> units(static_cast<size_t>(plan.units[phase]));
    for (size_t i = 0; i < units.size(); ++i) units[i] = static_cast<int64_t>(i);
    std::shuffle(units.begin(), units.end(), random->engine);
    for (const int64_t unit : units) operation.run(job, plan, phase, unit, scratch.data());
  }
  *intact = *intact && shared.intact() && scratch.intact();
}

double error(Buffer* actual, const std::vector<double>& wanted) {
  double largest = 1e-30, difference = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    largest = std::fmax(largest, std::fabs(wanted[i]));
    const double each = std::fabs(actual->data()[i] - wanted[i]);
    difference = each <= difference ? difference : each;  // a NaN stays
  }
  return difference / largest;
}

double check(const Kernels& kernels, int seed, bool* intact) {
  Random random{std::mt19937(static_cast<unsigned>(seed))};
  Shape s;
  s.groups = random.of({1, 1, 1, 1, 2, 3, 5, 24});
  const int64_t per_input = random.of({1, 2, 3, 5, 16, 17, 33});
  const int64_t per_output = random.of({1, 2, 5, 16, 17, 33, 50});
  s.ci = s.groups * per_input;
  s.co = s.groups * per_output;
  s.n = random.of({1, 2, 3, 9});
  s.h = random.of({5, 7, 8, 12, 19});
  s.w = random.of({5, 9, 11, 16, 23});
  s.kh = random.of({1, 2, 3, 5});
  s.kw = random.of({1, 3, 4});
  s.sh = random.of({1, 1, 2, 3});
  s.sw = random.of({1, 1, 2, 3});
  s.dh = random.of({1, 1, 2});
  s.dw = random.of({1, 1, 2});
  s.top = random.of({-1, 0, 1, 2, 3});
  s.left = random.of({-1, 0, 1, 2, 3});
  s.ho = (s.h + s.top + random.of({-1, 0, 1, 4}) - (s.kh - 1) * s.dh - 1) / s.sh + 1;
  s.wo = (s.w + s.left + random.of({-1, 0, 1, 4}) - (s.kw - 1) * s.dw - 1) / s.sw + 1;
  if (s.ho < 1 || s.wo < 1) return 0;
  Job job = {};
  job.shape = s;
  job.threads = random.of({1, 2, 3, 8});
  Buffer x(s.n * s.h * s.w * s.ci), w(s.kh * s.kw * per_input * s.co);
  Buffer dy(s.n * s.ho * s.wo * s.co), y(dy.size()), dx(x.size()), dw(w.size());
  for (Buffer* buffer : {&x, &w, &dy}) random.fill(buffer);
  job.x = x.data();
  job.w = w.data();
  job.dy = dy.data();
  double worst = 0;
  for (const Body body : {kHardTanh, kSign, kFull, kProduct}) {
    job.body = body;
    std::vector<double> y64(static_cast<size_t>(y.size())), dx64(static_cast<size_t>(dx.size()));
    std::vector<double> dw64(static_cast<size_t>(dw.size()));
    for (int64_t p = 0; p < s.n * s.ho * s.wo; ++p) {
      const int64_t j = p % s.wo, i = p / s.wo % s.ho, image = p / s.wo / s.ho;
      for (int64_t tap = 0; tap < s.kh * s.kw; ++tap) {
        const int64_t row = i * s.sh - s.top + tap / s.kw * s.dh;
        const int64_t column = j * s.sw - s.left + tap % s.kw * s.dw;
        const bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
        for (int64_t o = 0; o < s.co; ++o) {
          for (int64_t c = 0; c < per_input; ++c) {
            const int64_t at =
                ((image * s.h + row) * s.w + column) * s.ci + o / per_output * per_input + c;
            const int64_t f = (tap * per_input + c) * s.co + o;
            const double a = inside ? x.data()[at] : 0, b = w.data()[f];
            const double g = dy.data()[p * s.co + o];
            y64[p * s.co + o] += body == kProduct ? a * b : -std::fabs(a - b);
            dw64[f] += g * (body == kProduct ? a : a - b);
            if (inside) dx64[at] += g * surrogate(body, b - a, b);
          }
        }
      }
    }
    job.out = y.data();
    run(kernels.forward, job, &random, intact);
    job.out = dx.data();
    run(kernels.input_gradient, job, &random, intact);
    job.out = dw.data();
    run(kernels.weight_gradient, job, &random, intact);
    for (const double each : {error(&y, y64), error(&dx, dx64), error(&dw, dw64)}) {
      worst = each <= worst ? worst : each;
    }
  }
  for (Buffer* buffer : {&x, &w, &dy, &y, &dx, &dw}) *intact = *intact && buffer->intact();
  if (!(worst <= 5e-6) || !*intact) std::printf("seed %d: %g\n", seed, worst);
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const int shapes = argc > 1 ? std::atoi(argv[1]) : 100;
  double worst = 0;
  bool intact = true;
  for (int seed = 0; seed < shapes; ++seed) {
    const double each = check(ISA, seed, &intact);
    worst = each <= worst ? worst : each;
  }
  std::printf("%s: largest error %.2g of the largest value, guards %s\n", ISA.name, worst,
              intact ? "intact" : "BROKEN");
  return worst <= 5e-6 && intact ? 0 : 1;
}
