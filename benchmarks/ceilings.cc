// The most that one thread reaches with its data in registers and the L1 cache, compiled once an
// instruction set: what the kernels are measured against.
#include "../pkkd_jax/ops/native/vector.h"

namespace {

constexpr int kDepth = 144;  // terms that are summed into one response

// `term` adds kTerms terms to a total, of the pixel's values a[term] and the filters' f[term][v].
template <int kTerms, int kPixels, int kVectors, class Term>
INLINE void sum(const float* x, const float* w, float* out, Term term) {
  Vector total[kPixels][kVectors];
UNROLL
  for (int m = 0; m < kPixels; ++m) {
UNROLL
    for (int v = 0; v < kVectors; ++v) total[m][v] = zero();
  }
  for (int k = 0; k < kDepth; k += kTerms) {
    Vector f[kTerms][kVectors];
UNROLL
    for (int i = 0; i < kTerms * kVectors; ++i) {
      f[i / kVectors][i % kVectors] = load(w + (k * kVectors + i) * kLanes);
    }
UNROLL
    for (int m = 0; m < kPixels; ++m) {
      Vector a[kTerms];
UNROLL
      for (int i = 0; i < kTerms; ++i) a[i] = broadcast(x[(k + i) * kPixels + m]);
UNROLL
      for (int v = 0; v < kVectors; ++v) total[m][v] = term(a, f, total[m][v], m, v);
    }
  }
UNROLL
  for (int m = 0; m < kPixels; ++m) {
UNROLL
    for (int v = 0; v < kVectors; ++v) store(out + (m * kVectors + v) * kLanes, total[m][v]);
  }
}

constexpr int kWide = kRegisters == 32 ? 8 : 4;
constexpr int kProduct = kRegisters == 32 ? 12 : 6;
constexpr int kInput = kRegisters == 32 ? 12 : 5;

}  // namespace

#define PUBLIC extern "C"

// Each repeats its loop and returns the terms computed.
PUBLIC double forward(long repeats, const float* x, const float* w, float* out) {
  Vector one = broadcast(1.0f);
  OPAQUE(one);
  for (long i = 0; i < repeats; ++i) {
#if defined(__AVX512F__)
    sum<2, kWide, 2>(x, w, out, [=](auto& a, auto& f, Vector total, int, int v) {
      Vector d = mul_sub(a[1], one, f[1][v]);
      OPAQUE(d);
      return add(total, greater_magnitude(sub(a[0], f[0][v]), d));
    });
#else
    sum<1, kWide, 2>(x, w, out, [=](auto& a, auto& f, Vector total, int m, int v) {
      if ((m * 2 + v) % 2) {
        Vector d = mul_sub(a[0], one, f[0][v]);
        OPAQUE(d);
        return add(total, abs(d));
      }
      return mul_add(abs(sub(a[0], f[0][v])), one, total);
    });
#endif
  }
  return static_cast<double>(repeats) * kDepth * kWide * 2 * kLanes;
}

PUBLIC double product(long repeats, const float* x, const float* w, float* out) {
  for (long i = 0; i < repeats; ++i) {
    sum<1, kProduct, 2>(x, w, out, [](auto& a, auto& f, Vector total, int, int v) {
      return mul_add(a[0], f[0][v], total);
    });
  }
  return static_cast<double>(repeats) * kDepth * kProduct * 2 * kLanes;
}

PUBLIC double input_gradient(long repeats, const float* dy, const float* w, float* out) {
  Vector one = broadcast(1.0f);
  OPAQUE(one);
  for (long i = 0; i < repeats; ++i) {
    Vector here[kInput];
    for (int m = 0; m < kInput; ++m) here[m] = load(w + m * kLanes);
    sum<1, kInput, 1>(dy, w, out, [&](auto& g, auto& f, Vector total, int m, int) {
      const bool fused = kRegisters == 32 && m % 2;  // another port's work on AVX-512
      Vector d = fused ? mul_sub(f[0][0], one, here[m]) : sub(f[0][0], here[m]);
      if (fused) OPAQUE(d);
      return mul_add(g[0], clip(d, one), total);
    });
  }
  return static_cast<double>(repeats) * kDepth * kInput * kLanes;
}
