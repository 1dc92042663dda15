// Thin wrappers over one instruction set's intrinsics. Everything is in an unnamed namespace: two
// translation units compile the same algorithm for different processors, and must never share a
// function.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#define INLINE __attribute__((always_inline)) inline

// Before loops over registers, which would otherwise live in memory.
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

#if defined(__AVX512F__)

using Vector = __m512;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
INLINE Vector zero() { return _mm512_setzero_ps(); }
INLINE Vector broadcast(float a) { return _mm512_set1_ps(a); }
INLINE Vector load(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store(float* p, Vector a) { _mm512_storeu_ps(p, a); }
INLINE __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
INLINE Vector load_some(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
INLINE void store_some(float* p, Vector a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a); }
INLINE Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
INLINE Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
INLINE Vector mul_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Vector mul_sub(Vector a, Vector b, Vector c) { return _mm512_fmsub_ps(a, b, c); }
INLINE Vector abs(Vector a) { return _mm512_abs_ps(a); }
INLINE Vector greater_magnitude(Vector a, Vector b) { return _mm512_range_ps(a, b, 0x0b); }
// Of lanes (a, b): (a + b, a - b).
INLINE Vector sums_and_differences(Vector a) {
  const Vector swapped = _mm512_maskz_permute_ps(0xffff, a, 0xb1);
  return _mm512_fmsubadd_ps(swapped, broadcast(1.0f), a);
}
// Minimum of |a| and |1| with the sign of a: the clip to [-1, 1] in one instruction.
INLINE Vector clip(Vector a, Vector one) { return _mm512_range_ps(a, one, 0x02); }
INLINE Vector sign(Vector a, Vector one) {
  const Vector signed_one = _mm512_or_ps(_mm512_and_ps(a, broadcast(-0.0f)), one);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, zero(), _CMP_NEQ_UQ), signed_one);
}
#define OPAQUE(a) asm("" : "+v"(a))

#elif defined(__AVX2__)

using Vector = __m256;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
INLINE Vector zero() { return _mm256_setzero_ps(); }
INLINE Vector broadcast(float a) { return _mm256_set1_ps(a); }
INLINE Vector load(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store(float* p, Vector a) { _mm256_storeu_ps(p, a); }
INLINE __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
INLINE Vector load_some(const float* p, int n) { return _mm256_maskload_ps(p, lanes(n)); }
INLINE void store_some(float* p, Vector a, int n) { _mm256_maskstore_ps(p, lanes(n), a); }
INLINE Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
INLINE Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
INLINE Vector mul_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vector mul_sub(Vector a, Vector b, Vector c) { return _mm256_fmsub_ps(a, b, c); }
INLINE Vector abs(Vector a) { return _mm256_andnot_ps(broadcast(-0.0f), a); }
INLINE Vector clip(Vector a, Vector one) {
  return _mm256_min_ps(_mm256_max_ps(a, _mm256_sub_ps(zero(), one)), one);
}
INLINE Vector sign(Vector a, Vector one) {
  const Vector signed_one = _mm256_or_ps(_mm256_and_ps(a, broadcast(-0.0f)), one);
  return _mm256_and_ps(_mm256_cmp_ps(a, zero(), _CMP_NEQ_UQ), signed_one);
}
#define OPAQUE(a) asm("" : "+x"(a))

#else

using Vector = float32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
INLINE Vector zero() { return vdupq_n_f32(0); }
INLINE Vector broadcast(float a) { return vdupq_n_f32(a); }
INLINE Vector load(const float* p) { return vld1q_f32(p); }
INLINE void store(float* p, Vector a) { vst1q_f32(p, a); }
INLINE Vector load_some(const float* p, int n) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n && i < kLanes; ++i) lanes[i] = p[i];
  return load(lanes);
}
INLINE void store_some(float* p, Vector a, int n) {
  float lanes[kLanes];
  store(lanes, a);
  for (int i = 0; i < n && i < kLanes; ++i) p[i] = lanes[i];
}
INLINE Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
INLINE Vector sub(Vector a, Vector b) { return vsubq_f32(a, b); }
INLINE Vector mul_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
INLINE Vector mul_sub(Vector a, Vector b, Vector c) { return vfmaq_f32(vnegq_f32(c), a, b); }
INLINE Vector abs(Vector a) { return vabsq_f32(a); }
INLINE Vector clip(Vector a, Vector one) { return vminq_f32(vmaxq_f32(a, vnegq_f32(one)), one); }
INLINE Vector sign(Vector a, Vector one) {
  const uint32x4_t bits = vandq_u32(vreinterpretq_u32_f32(a), vdupq_n_u32(0x80000000u));
  const uint32x4_t signed_one = vorrq_u32(bits, vreinterpretq_u32_f32(one));
  return vreinterpretq_f32_u32(vbicq_u32(signed_one, vceqzq_f32(a)));
}
#define OPAQUE(a) asm("" : "+w"(a))

#endif

INLINE Vector load_lanes(const float* p, int n) { return n >= kLanes ? load(p) : load_some(p, n); }
INLINE void store_lanes(float* p, Vector a, int n) {
  if (n >= kLanes) {
    store(p, a);
  } else {
    store_some(p, a, n);
  }
}

}  // namespace
