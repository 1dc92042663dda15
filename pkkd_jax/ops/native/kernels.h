// Direct convolutions, adder and ordinary, on NHWC images: no im2col, float32 throughout. Included by
// one translation unit an instruction set.
//
// Images are copied a strip of rows at a time into zero-padded scratch, in blocks of 16 channels,
// with columns sorted by stride phase: neighbouring responses then read neighbouring pixels,
// whatever the stride. Filters are packed into panels that stay in the L2 cache while pixels stream.
// Where a group has fewer filters than a vector has lanes, lanes belong to different groups, and
// the copy holds for each lane the channel that it sees ("spread").
//
// With AVX-512 the adder's forward pass takes two channels at once, as |a| + |b| =
// max(|a + b|, |a - b|) and the greater of two magnitudes is one instruction: four instructions
// instead of six. Copy and panels then hold sums and differences of two channels each, whose rounding
// is of the size that images and filters are rounded with themselves.
#pragma once
#include "job.h"
#include "vector.h"

namespace {

constexpr int64_t kMaxTaps = 256;          // MAX_TAPS of ops/cpu.py, which keeps to it
constexpr int64_t kBlock = 16;             // channels in a block of the copy
constexpr int64_t kL2Budget = 192 * 1024;  // bytes for the copy, and as many for a panel
constexpr int64_t kL1Budget = 32 * 1024;
constexpr int kWide = kRegisters == 32 ? 8 : 4;     // pixels of a tile two vectors wide
constexpr int kNarrow = kRegisters == 32 ? 16 : 8;  // pixels of a tile one vector wide
constexpr int kInput = kRegisters == 32 ? 12 : 6;   // pixels of a tile of the input gradient
constexpr int kPanel = 2 * kLanes;
#if defined(__AVX512F__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Calls f(start, count) for nearly equal pieces of `total`, none above `most`.
template <class F>
INLINE void pieces(int64_t total, int64_t most, F f) {
  const int64_t count = ceil_div(total, most);
  for (int64_t i = 0, start = 0; i < count; ++i) {
    const int64_t size = total / count + (i < total % count);
    f(start, size);
    start += size;
  }
}

// Cuts `n` images of `rows` rows into units whose copy fits into the budget, enough for all threads.
inline void cut(Plan* plan, int64_t n, int64_t rows, int64_t row_bytes, int64_t halo_bytes,
                int64_t threads) {
  plan->images = 1;
  plan->rows = rows;
  if (rows * row_bytes + halo_bytes > kL2Budget) {
    const int64_t fit = max(1, (kL2Budget - halo_bytes) / row_bytes);
    plan->rows = ceil_div(rows, ceil_div(rows, fit));
  } else {
    plan->images = max(1, min(kL2Budget / max(1, rows * row_bytes + halo_bytes), n));
    while (plan->images > 1 && ceil_div(n, plan->images) < 8 * threads) --plan->images;
  }
  while (threads > 1 && plan->rows > 2 && n * ceil_div(rows, plan->rows) < 8 * threads) {
    plan->rows = ceil_div(plan->rows, 2);
  }
  plan->strips = ceil_div(rows, plan->rows);
}

// ---- the copy

// Taps `dilation` apart, at every place that is a multiple of `stride`.
struct Steps {
  int64_t stride, taps, dilation;
  int64_t extent() const { return (taps - 1) * dilation + 1; }
  bool reads(int64_t place) const {
    for (int64_t tap = 0; tap < min(taps, stride); ++tap) {
      if ((place - tap * dilation) % stride == 0) return true;
    }
    return false;
  }
};

// A window of NHWC images: `rows` from `top`, columns from `left`, zero where it leaves the image.
struct Window {
  const float* image;
  int64_t height, width, channels;  // of the image
  int64_t top, rows, left, columns;
  Steps down, across;  // what is read of the rows and columns
  int64_t pitch() const { return ceil_div(columns, across.stride); }  // columns of one phase
  int64_t pixels() const { return rows * pitch() * across.stride; }
  // Where the copy begins for tap (u, v), in pixels.
  int64_t offset(int64_t u, int64_t v) const {
    const int64_t row = u * down.dilation, column = v * across.dilation, stride = across.stride;
    return (row * stride + column % stride) * pitch() + column / stride;
  }
};

// Copies `channels` from `first` on, in blocks that are `block_stride` apart, the last filled up with
// zeros. Paired: their sums and differences.
template <bool kIsPaired>
void copy_blocks(const Window& window, int64_t first, int64_t channels, int64_t block_stride,
                 float* to) {
  const int64_t pitch = window.pitch(), stride = window.across.stride;
  for (int64_t row = 0; row < window.rows; ++row, to += pitch * stride * kBlock) {
    if (!window.down.reads(row)) continue;
    const int64_t source = window.top + row;
    const bool inside = source >= 0 && source < window.height;
    const float* from = window.image + source * window.width * window.channels + first;
    for (int64_t phase = 0; phase < stride; ++phase) {
      if (!window.across.reads(phase)) continue;
      float* pixel_to = to + phase * pitch * kBlock;
      for (int64_t q = 0; q < pitch; ++q, pixel_to += kBlock) {
        const int64_t column = window.left + q * stride + phase;
        const bool zeros = !inside || column < 0 || column >= window.width;
        const float* pixel = from + column * window.channels;
        float* p = pixel_to;
        for (int64_t start = 0; start < channels; start += kBlock, p += block_stride) {
          for (int64_t i = 0; i < kBlock; i += kLanes) {
            const int64_t left = channels - start - i;
            Vector here = zeros || left <= 0 ? zero()
                          : left >= kLanes   ? load(pixel + start + i)
                                             : load_some(pixel + start + i, static_cast<int>(left));
#if defined(__AVX512F__)
            if (kIsPaired) here = sums_and_differences(here);
#endif
            store(p + i, here);
          }
        }
      }
    }
  }
}

// Copies for lane l the channel (lane + l) / per_group * group_channels + offset, `width` lanes.
inline void copy_spread(const Window& window, int64_t lane, int64_t total, int64_t per_group,
                        int64_t group_channels, int64_t offset, int64_t width, float* to) {
  const int64_t pitch = window.pitch();
  const int64_t valid = min(width, total - lane);
  const bool plain = per_group == 1 && group_channels == 1;  // lane = channel
  int64_t channels[kPanel];
  for (int64_t l = 0; l < width; ++l) {
    channels[l] = (lane + l) / per_group * group_channels + offset;
  }
  for (int64_t row = 0; row < window.rows; ++row) {
    const int64_t source = window.top + row;
    const bool inside = source >= 0 && source < window.height;
    const float* from = window.image + source * window.width * window.channels;
    for (int64_t phase = 0; phase < window.across.stride; ++phase) {
      for (int64_t q = 0; q < pitch; ++q, to += width) {
        const int64_t column = window.left + q * window.across.stride + phase;
        const bool zeros = !inside || column < 0 || column >= window.width;
        const float* pixel = from + column * window.channels;
        if (plain && !zeros && valid == width) {
          for (int64_t l = 0; l < width; l += kLanes) store(to + l, load(pixel + lane + l));
          continue;
        }
        for (int64_t l = 0; l < width; ++l) to[l] = zeros || l >= valid ? 0 : pixel[channels[l]];
      }
    }
  }
}

// ---- forward

// How filters and channels are divided. Spread: one group of all filters, blocks of one channel.
struct Division {
  bool spread;
  int64_t groups, channels, filters;  // in a group
  int64_t block, blocks;              // channels in a block, blocks in a group
};

inline Division divide(const Shape& s, int64_t sums, int64_t lanes) {
  // `sums` channels are summed over and `lanes` lie side by side, in each of the groups.
  Division d;
  d.spread = s.groups > 1 && lanes < kLanes;
  d.groups = d.spread ? 1 : s.groups;
  d.channels = sums;
  d.filters = d.spread ? lanes * s.groups : lanes;
  d.block = d.spread ? 1 : kBlock;
  d.blocks = ceil_div(sums, d.block);
  return d;
}

// Blocks of one of the nearly equal slices of `blocks`, each of which fits into the L2 cache.
INLINE int64_t slice_of(int64_t blocks, int64_t block_bytes) {
  return ceil_div(blocks, ceil_div(blocks, max(1, kL2Budget / block_bytes)));
}

// Lanes of the panel that starts at filter `start`: two vectors, or one if that is enough.
INLINE int64_t panel_width(const Division& d, int64_t start) {
  return d.filters - start > kLanes ? kPanel : kLanes;
}
INLINE bool paired(const Job& job, const Division& d) {
  return kPairs && job.body != kProduct && !d.spread;
}
// Channels of a panel: with one of zeros, where pairs need it.
INLINE int64_t packed_channels(const Job& job, const Division& d) {
  return d.channels + (paired(job, d) ? d.channels % 2 : 0);
}
INLINE int64_t packed_filters(const Division& d) {
  const int64_t last = d.filters / kPanel * kPanel;
  return last + (last < d.filters ? panel_width(d, last) : 0);
}

struct ForwardTile {
  const int64_t* taps;  // offset of each tap in the copy
  int64_t num_taps, block_stride, channels;
  const float* filters;
  int64_t y_stride, lanes;
  bool first;
};

template <bool kIsProduct, bool kIsSpread, int kPixels, int kVectors>
void forward_tile(const ForwardTile& t, const float* x, float* y) {
  constexpr bool kIsPaired = kPairs && !kIsProduct && !kIsSpread;
  constexpr int kStep = kIsPaired ? 2 : 1;
  Vector sum[kPixels][kVectors];
  Vector one = broadcast(1.0f);
  OPAQUE(one);  // or the compiler would turn the products with it back into sums
UNROLL
  for (int m = 0; m < kPixels; ++m) {
UNROLL
    for (int v = 0; v < kVectors; ++v) {
      sum[m][v] = zero();
      const int lanes = static_cast<int>(t.lanes) - v * kLanes;
      if (!t.first && lanes > 0) {
        const Vector before = load_lanes(y + m * t.y_stride + v * kLanes, lanes);
        sum[m][v] = kIsProduct ? before : sub(zero(), before);
      }
    }
  }
  const float* f = t.filters;
  for (int64_t left = t.channels; left > 0; left -= kIsSpread ? 1 : kBlock, x += t.block_stride) {
    const int64_t channels = kIsSpread ? 1 : min(kBlock, left);
    for (int64_t tap = 0; tap < t.num_taps; ++tap) {
      const float* p = x + t.taps[tap];
      for (int64_t c = 0; c < channels; c += kStep, p += kStep, f += kStep * kVectors * kLanes) {
        Vector w[kStep * kVectors];
UNROLL
        for (int v = 0; v < kStep * kVectors; ++v) w[v] = load(f + v * kLanes);
UNROLL
        for (int m = 0; m < kPixels; ++m) {
UNROLL
          for (int v = 0; v < kVectors; ++v) {
#if defined(__AVX512F__)
            if (kIsPaired) {
              const Vector s = sub(broadcast(p[m * kBlock]), w[v]);
              // Another unit's work, where products have their own.
              Vector d = mul_sub(broadcast(p[m * kBlock + 1]), one, w[kVectors + v]);
              OPAQUE(d);
              sum[m][v] = add(sum[m][v], greater_magnitude(s, d));
              continue;
            }
#endif
            const Vector a = kIsSpread ? load(p + (m * kVectors + v) * kLanes)
                                       : broadcast(p[m * kBlock]);
            if (kIsProduct) {
              sum[m][v] = mul_add(a, w[v], sum[m][v]);
            } else if ((m * kVectors + v) % 2) {
              // Half of the terms take the multiplying units, for more of them in a cycle.
              Vector d = mul_sub(a, one, w[v]);
              OPAQUE(d);
              sum[m][v] = add(sum[m][v], abs(d));
            } else {
              sum[m][v] = mul_add(abs(sub(a, w[v])), one, sum[m][v]);
            }
          }
        }
      }
    }
  }
UNROLL
  for (int m = 0; m < kPixels; ++m) {
UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const int lanes = static_cast<int>(t.lanes) - v * kLanes;
      const Vector result = kIsProduct ? sum[m][v] : sub(zero(), sum[m][v]);
      if (lanes > 0) store_lanes(y + m * t.y_stride + v * kLanes, result, lanes);
    }
  }
}

template <bool kIsProduct, bool kIsSpread, int kVectors, int kMost>
void forward_row(const ForwardTile& t, int64_t width, const float* x, float* y) {
  const int64_t pixel = kIsSpread ? kVectors * kLanes : kBlock;
  pieces(width, kMost, [&](int64_t start, int64_t count) {
    const float* from = x + start * pixel;
    float* to = y + start * t.y_stride;
    switch (count) {
#define CASE(n)                                                                          \
  case n:                                                                                \
    return forward_tile<kIsProduct, kIsSpread, (n < kMost ? n : kMost), kVectors>(t, from, to)
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
      CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14); CASE(15); CASE(16);
    }
  });
}

INLINE Steps down(const Shape& s) { return {s.sh, s.kh, s.dh}; }
INLINE Steps across(const Shape& s) { return {s.sw, s.kw, s.dw}; }

// What the responses of `rows` rows from `first` on see of the images.
inline Window seen_by(const Shape& s, int64_t first, int64_t rows) {
  return {nullptr, s.h, s.w, s.ci,
          first * s.sh - s.top, (rows - 1) * s.sh + down(s).extent(),
          -s.left, (s.wo - 1) * s.sw + across(s).extent(),
          down(s), across(s)};
}

inline Plan plan_forward(const Job& job) {
  const Shape& s = job.shape;
  const Division d = divide(s, s.ci / s.groups, s.co / s.groups);
  Plan plan = {};
  const int64_t width = d.spread ? kPanel : kBlock;
  const int64_t columns = seen_by(s, 0, 1).pitch() * s.sw;
  const int64_t row_floats = columns * width * d.blocks;
  const int64_t bytes = row_floats * static_cast<int64_t>(sizeof(float));
  cut(&plan, s.n, s.ho, bytes * s.sh, bytes * max(0, down(s).extent() - s.sh), job.threads);
  const int64_t rows = (plan.rows - 1) * s.sh + down(s).extent();
  plan.scratch = plan.images * rows * row_floats;
  plan.shared = d.groups * s.kh * s.kw * packed_channels(job, d) * packed_filters(d);
  const int64_t panel_bytes = s.kh * s.kw * d.block * kPanel * static_cast<int64_t>(sizeof(float));
  plan.slice = d.spread ? d.blocks : slice_of(d.blocks, panel_bytes);
  plan.units[0] = d.groups * ceil_div(d.filters, kPanel);
  plan.units[1] = ceil_div(s.n, plan.images) * plan.strips;
  return plan;
}

// Packs a panel as [block of channels][tap][channel][lane].
inline void pack_panel(const Job& job, const Division& d, int64_t unit) {
  const Shape& s = job.shape;
  const int64_t panels = ceil_div(d.filters, kPanel), taps = s.kh * s.kw;
  const int64_t group = unit / panels, start = unit % panels * kPanel;
  const int64_t width = panel_width(d, start), valid = min(width, d.filters - start);
  const int64_t channels = packed_channels(job, d);
  float* to = job.shared + taps * channels * (group * packed_filters(d) + start);
  for (int64_t first = 0; first < channels; first += d.block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = first; c < min(first + d.block, channels); ++c, to += width) {
        const float* from = job.w + (tap * d.channels + c) * s.co + group * d.filters + start;
        for (int64_t l = 0; l < width; l += kLanes) {
          const bool zeros = l >= valid || c >= d.channels;
          const Vector here =
              zeros ? zero() : load_lanes(from + l, static_cast<int>(min(kLanes, valid - l)));
          if (paired(job, d) && c % 2) {
            const Vector before = load(to + l - width);
            store(to + l - width, add(before, here));
            store(to + l, sub(before, here));
          } else {
            store(to + l, here);
          }
        }
      }
    }
  }
}

template <bool kIsProduct, bool kIsSpread>
void forward_unit(const Job& job, const Plan& plan, const Division& d, int64_t unit,
                  float* scratch) {
  const Shape& s = job.shape;
  const int64_t first_image = unit / plan.strips * plan.images;
  const int64_t images = min(plan.images, s.n - first_image);
  const int64_t first_row = unit % plan.strips * plan.rows;
  const int64_t rows = min(plan.rows, s.ho - first_row);
  Window window = seen_by(s, first_row, rows);
  const int64_t pitch = window.pitch(), taps = s.kh * s.kw, channels = packed_channels(job, d);
  int64_t offsets[kMaxTaps];

  auto image_at = [&](int64_t i) {
    window.image = job.x + (first_image + i) * s.h * s.w * s.ci;
    return window;
  };
  // All rows of one panel of filters against `blocks` blocks of the copy.
  auto panel = [&](int64_t group, int64_t start, int64_t first_block, int64_t blocks,
                   int64_t width) {
    const int64_t lanes = panel_width(d, start);
    const int64_t row_stride = pitch * s.sw * width, image_stride = window.pixels() * width;
    for (int64_t tap = 0; tap < taps; ++tap) {
      offsets[tap] = window.offset(tap / s.kw, tap % s.kw) * width;
    }
    ForwardTile t;
    t.taps = offsets;
    t.num_taps = taps;
    t.block_stride = plan.images * image_stride;
    t.channels = min(blocks * d.block, channels - first_block * d.block);
    t.filters = job.shared + taps * (channels * (group * packed_filters(d) + start) +
                                     first_block * d.block * lanes);
    t.y_stride = s.co;
    t.lanes = min(lanes, d.filters - start);
    t.first = first_block == 0;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t row = 0; row < rows; ++row) {
        const float* x = scratch + first_block * t.block_stride + i * image_stride +
                         row * s.sh * row_stride;
        float* y = job.out + ((first_image + i) * s.ho + first_row + row) * s.wo * s.co +
                   group * d.filters + start;
        if (lanes == kPanel) {
          forward_row<kIsProduct, kIsSpread, 2, kWide>(t, s.wo, x, y);
        } else {
          forward_row<kIsProduct, kIsSpread, 1, kNarrow>(t, s.wo, x, y);
        }
      }
    }
  };

  if (kIsSpread) {
    for (int64_t start = 0; start < d.filters; start += kPanel) {
      const int64_t width = panel_width(d, start);
      for (int64_t c = 0; c < d.blocks; ++c) {
        for (int64_t i = 0; i < images; ++i) {
          copy_spread(image_at(i), start, s.co, s.co / s.groups, d.channels, c, width,
                      scratch + (c * plan.images + i) * window.pixels() * width);
        }
      }
      panel(0, start, 0, d.blocks, width);
    }
    return;
  }
  for (int64_t group = 0; group < d.groups; ++group) {
    const int64_t image_stride = window.pixels() * kBlock;
    for (int64_t i = 0; i < images; ++i) {
      copy_blocks<kPairs && !kIsProduct>(image_at(i), group * d.channels, d.channels,
                                         plan.images * image_stride, scratch + i * image_stride);
    }
    for (int64_t block = 0; block < d.blocks; block += plan.slice) {
      for (int64_t start = 0; start < d.filters; start += kPanel) {
        panel(group, start, block, min(plan.slice, d.blocks - block), kBlock);
      }
    }
  }
}

inline void run_forward(const Job& job, const Plan& plan, int phase, int64_t unit,
                        float* scratch) {
  const Shape& s = job.shape;
  const Division d = divide(s, s.ci / s.groups, s.co / s.groups);
  if (phase == 0) return pack_panel(job, d, unit);
  const bool product = job.body == kProduct;
  (product ? d.spread ? forward_unit<true, true> : forward_unit<true, false>
   : d.spread ? forward_unit<false, true>
              : forward_unit<false, false>)(job, plan, d, unit, scratch);
}

// ---- input gradient: vectors of channels of the input; sums over taps and filters

struct InputTile {
  const int64_t* taps;      // offset of each tap in the copy of dy
  const int64_t* in_panel;  // and of its filters in a block of the panel
  int64_t num_taps, all_taps, block_stride, filters;
  const float* panel;
  int64_t stride, lanes;
  bool first;
};

template <Body kBody, bool kIsSpread, int kPixels>
void input_tile(const InputTile& t, const float* dy, const float* x, float* dx) {
  Vector sum[kPixels], here[kPixels];
  Vector one = broadcast(1.0f);
  OPAQUE(one);
  const int lanes = static_cast<int>(t.lanes);
UNROLL
  for (int m = 0; m < kPixels; ++m) {
    sum[m] = t.first ? zero() : load_lanes(dx + m * t.stride, lanes);
    here[m] = kBody == kProduct || t.num_taps == 0 ? zero() : load_lanes(x + m * t.stride, lanes);
    __builtin_prefetch(x + (m + kPixels) * t.stride);
    __builtin_prefetch(dx + (m + kPixels) * t.stride, 1);
  }
  const float* panel = t.panel;
  for (int64_t left = t.filters; left > 0; left -= kIsSpread ? 1 : kBlock) {
    const int64_t filters = kIsSpread ? 1 : min(kBlock, left);
    for (int64_t tap = 0; tap < t.num_taps; ++tap) {
      const float* p = dy + t.taps[tap];
      const float* f = panel + t.in_panel[tap] * filters * kLanes;
      for (int64_t o = 0; o < filters; ++o, ++p, f += kLanes) {
        const Vector w = load(f);
UNROLL
        for (int m = 0; m < kPixels; ++m) {
          const Vector g = kIsSpread ? load(p + m * kLanes) : broadcast(p[m * kBlock]);
          Vector d = w;
          if (kBody != kProduct && m % 2) {
            d = mul_sub(w, one, here[m]);
            OPAQUE(d);
          } else if (kBody != kProduct) {
            d = sub(w, here[m]);
          }
          if (kBody == kHardTanh) d = clip(d, one);
          if (kBody == kSign) d = sign(d, one);
          sum[m] = mul_add(g, d, sum[m]);
        }
      }
    }
    dy += t.block_stride;
    panel += t.all_taps * filters * kLanes;
  }
UNROLL
  for (int m = 0; m < kPixels; ++m) store_lanes(dx + m * t.stride, sum[m], lanes);
}

template <Body kBody, bool kIsSpread>
void input_row(const InputTile& t, int64_t width, const float* dy, const float* x, float* dx) {
  pieces(width, kInput, [&](int64_t start, int64_t count) {
    const float* g = dy + start * (kIsSpread ? kLanes : kBlock);
    const float* from = x + start * t.stride;
    float* to = dx + start * t.stride;
    switch (count) {
#undef CASE
#define CASE(n)                                                                     \
  case n:                                                                           \
    return input_tile<kBody, kIsSpread, (n < kInput ? n : kInput)>(t, g, from, to)
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6);
      CASE(7); CASE(8); CASE(9); CASE(10); CASE(11); CASE(12);
    }
  });
}

// The rows of dy that the input's rows from `first` to before `last` see, and all its columns.
inline Window seen(const Shape& s, int64_t first, int64_t last) {
  Window window = {nullptr, s.ho, s.wo, s.co, 0, 0, 0, 0, {1, 1, 1}, {1, 1, 1}};
  window.top = floor_div(first + s.top - (s.kh - 1) * s.dh, s.sh);
  window.rows = floor_div(last - 1 + s.top, s.sh) + 1 - window.top;
  window.left = floor_div(s.left - (s.kw - 1) * s.dw, s.sw);
  window.columns = floor_div(s.w - 1 + s.left, s.sw) + 1 - window.left;
  return window;
}

inline Plan plan_input(const Job& job) {
  const Shape& s = job.shape;
  const Division d = divide(s, s.co / s.groups, s.ci / s.groups);
  Plan plan = {};
  const int64_t width = d.spread ? kLanes : kBlock;
  const int64_t row_floats = seen(s, 0, 1).columns * width * d.blocks;
  const int64_t bytes = row_floats * static_cast<int64_t>(sizeof(float));
  cut(&plan, s.n, s.h, ceil_div(bytes, s.sh), bytes * ceil_div(down(s).extent(), s.sh),
      job.threads);
  plan.scratch = plan.images * (ceil_div(plan.rows + down(s).extent(), s.sh) + 2) * row_floats;
  const int64_t panels = ceil_div(d.filters, kLanes);
  plan.shared = d.groups * panels * kLanes * s.kh * s.kw * d.channels;
  const int64_t panel_bytes = s.kh * s.kw * d.block * kLanes * static_cast<int64_t>(sizeof(float));
  plan.slice = d.spread ? d.blocks : slice_of(d.blocks, panel_bytes);
  plan.units[0] = d.groups * panels;
  plan.units[1] = ceil_div(s.n, plan.images) * plan.strips;
  return plan;
}

// Packs a panel of channels as [block of filters][tap][filter][lane].
inline void pack_channels(const Job& job, const Division& d, int64_t unit) {
  const Shape& s = job.shape;
  const int64_t panels = ceil_div(d.filters, kLanes), taps = s.kh * s.kw;
  const int64_t group = unit / panels, start = unit % panels * kLanes;
  const int64_t in_group = s.ci / s.groups, filters = s.co / s.groups;
  float* to = job.shared + unit * kLanes * taps * d.channels;
  for (int64_t first = 0; first < d.channels; first += d.block) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t o = first; o < min(first + d.block, d.channels); ++o) {
        for (int64_t l = 0; l < kLanes; ++l, ++to) {
          // Spread: the lane is a channel of the whole input, of its own group.
          const int64_t channel = start + l;
          const int64_t of_group = d.spread ? channel / in_group : group;
          const int64_t c = d.spread ? channel % in_group : channel;
          *to = channel < d.filters ? job.w[(tap * in_group + c) * s.co + of_group * filters + o]
                                    : 0;
        }
      }
    }
  }
}

template <Body kBody, bool kIsSpread>
void input_unit(const Job& job, const Plan& plan, const Division& d, int64_t unit,
                float* scratch) {
  const Shape& s = job.shape;
  const int64_t first_image = unit / plan.strips * plan.images;
  const int64_t images = min(plan.images, s.n - first_image);
  const int64_t first_row = unit % plan.strips * plan.rows;
  const int64_t last_row = min(first_row + plan.rows, s.h);
  const int64_t width = kIsSpread ? kLanes : kBlock, all_taps = s.kh * s.kw;
  Window window = seen(s, first_row, last_row);
  const int64_t row_stride = window.columns * width, image_stride = window.rows * row_stride;
  int64_t taps[kMaxTaps], in_panel[kMaxTaps];

  auto image_at = [&](int64_t i) {
    window.image = job.dy + (first_image + i) * s.ho * s.wo * s.co;
    return window;
  };
  auto panel = [&](int64_t group, int64_t start, int64_t first_block, int64_t blocks,
                   int64_t from_row, int64_t to_row, int64_t from_column, int64_t to_column) {
    InputTile t;
    t.taps = taps;
    t.in_panel = in_panel;
    t.all_taps = all_taps;
    t.block_stride = plan.images * image_stride;
    t.filters = min(blocks * d.block, d.channels - first_block * d.block);
    const int64_t index = group * ceil_div(d.filters, kLanes) + start / kLanes;
    t.panel = job.shared +
              kLanes * all_taps * (index * d.channels + first_block * d.block);
    t.stride = s.sw * s.ci;
    t.lanes = min(kLanes, d.filters - start);
    t.first = first_block == 0;
    for (int64_t row = from_row; row < to_row; ++row) {
      for (int64_t phase = 0; phase < min(s.sw, s.w); ++phase) {
        t.num_taps = 0;
        for (int64_t tap = 0; tap < all_taps; ++tap) {
          const int64_t y = row + s.top - tap / s.kw * s.dh;
          const int64_t z = phase + s.left - tap % s.kw * s.dw;
          const int64_t i = floor_div(y, s.sh), j = floor_div(z, s.sw);
          if (i * s.sh != y || j * s.sw != z || i < 0 || i >= s.ho) continue;
          taps[t.num_taps] = (i - window.top) * row_stride + (j - window.left) * width;
          in_panel[t.num_taps++] = tap;
        }
        for (int64_t i = 0; i < images; ++i) {
          const int64_t pixel = ((first_image + i) * s.h + row) * s.w + phase + from_column * s.sw;
          const int64_t place = pixel * s.ci + group * d.filters + start;
          const float* dy = scratch + first_block * t.block_stride + i * image_stride;
          const int64_t columns = min(to_column, ceil_div(s.w - phase, s.sw)) - from_column;
          input_row<kBody, kIsSpread>(t, columns, dy + from_column * width, job.x + place,
                                      job.out + place);
        }
      }
    }
  };

  if (kIsSpread) {
    for (int64_t start = 0; start < d.filters; start += kLanes) {
      for (int64_t o = 0; o < d.blocks; ++o) {
        for (int64_t i = 0; i < images; ++i) {
          copy_spread(image_at(i), start, s.ci, s.ci / s.groups, d.channels, o, kLanes,
                      scratch + (o * plan.images + i) * image_stride);
        }
      }
      panel(0, start, 0, d.blocks, first_row, last_row, 0, s.w);
    }
    return;
  }
  for (int64_t group = 0; group < d.groups; ++group) {
    for (int64_t i = 0; i < images; ++i) {
      copy_blocks<false>(image_at(i), group * d.channels, d.channels,
                         plan.images * image_stride, scratch + i * image_stride);
    }
    // A panel for all pixels keeps its filters in the cache. Those of a single tap are few: there a
    // tile for all panels reads the image in order.
    const int64_t rows = all_taps == 1 ? 1 : last_row - first_row;
    const int64_t columns = ceil_div(s.w, s.sw), most = all_taps == 1 ? kInput : columns;
    for (int64_t block = 0; block < d.blocks; block += plan.slice) {
      for (int64_t row = first_row; row < last_row; row += rows) {
        pieces(columns, most, [&](int64_t column, int64_t count) {
          for (int64_t start = 0; start < d.filters; start += kLanes) {
            panel(group, start, block, min(plan.slice, d.blocks - block), row, row + rows, column,
                  column + count);
          }
        });
      }
    }
  }
}

template <bool kIsSpread>
void input_unit_of(const Job& job, const Plan& plan, const Division& d, int64_t unit,
                   float* scratch) {
  switch (job.body) {
    case kHardTanh: return input_unit<kHardTanh, kIsSpread>(job, plan, d, unit, scratch);
    case kSign: return input_unit<kSign, kIsSpread>(job, plan, d, unit, scratch);
    case kFull: return input_unit<kFull, kIsSpread>(job, plan, d, unit, scratch);
    case kProduct: return input_unit<kProduct, kIsSpread>(job, plan, d, unit, scratch);
  }
}

inline void run_input(const Job& job, const Plan& plan, int phase, int64_t unit, float* scratch) {
  const Shape& s = job.shape;
  const Division d = divide(s, s.co / s.groups, s.ci / s.groups);
  if (phase == 0) return pack_channels(job, d, unit);
  (d.spread ? input_unit_of<true> : input_unit_of<false>)(job, plan, d, unit, scratch);
}

// ---- weight gradient: an ordinary correlation of images and dy, less w times the sum of dy

constexpr int kChannelsWide = kRegisters == 32 ? 8 : 5;     // channels of a tile two vectors wide
constexpr int kChannelsNarrow = kRegisters == 32 ? 16 : 10;  // and of one a single vector wide
constexpr int kTapsSpread = 8;

struct WeightTile {
  const int64_t* taps;  // spread: offsets of the rows of the tile
  int64_t images, rows, columns;
  int64_t x_image, x_row, x_pixel;
  int64_t dy_image, dy_row, dy_pixel;
  int64_t out_row, lanes;
};

// Adds to `out` the sum over the places of a copy, which starts at zero: one sum over a whole batch
// would lose what is small beside it.
template <bool kIsSpread, bool kIsWhole, int kRows, int kVectors>
void weight_tile(const WeightTile& t, const float* x, const float* dy, float* out) {
  Vector sum[kRows][kVectors];
  auto lanes = [&](int v) { return static_cast<int>(t.lanes) - v * kLanes; };
UNROLL
  for (int r = 0; r < kRows; ++r) {
UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = zero();
  }
  for (int64_t image = 0; image < t.images; ++image) {
    for (int64_t row = 0; row < t.rows; ++row) {
      const float* p = x + image * t.x_image + row * t.x_row;
      const float* g = dy + image * t.dy_image + row * t.dy_row;
      for (int64_t column = 0; column < t.columns; ++column, p += t.x_pixel, g += t.dy_pixel) {
        Vector d[kVectors];
UNROLL
        for (int v = 0; v < kVectors; ++v) {
          d[v] = kIsWhole ? load(g + v * kLanes) : load_lanes(g + v * kLanes, lanes(v));
        }
UNROLL
        for (int r = 0; r < kRows; ++r) {
          const Vector a = kIsSpread ? load(p + t.taps[r]) : broadcast(p[r]);
UNROLL
          for (int v = 0; v < kVectors; ++v) sum[r][v] = mul_add(a, d[v], sum[r][v]);
        }
      }
    }
  }
UNROLL
  for (int r = 0; r < kRows; ++r) {
UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* p = out + r * t.out_row + v * kLanes;
      if (kIsWhole) {
        store(p, add(load(p), sum[r][v]));
      } else {
        store_lanes(p, add(load_lanes(p, lanes(v)), sum[r][v]), lanes(v));
      }
    }
  }
}

template <bool kIsSpread, bool kIsWhole, int kVectors, int kMost>
void weight_rows(const WeightTile& tile, int64_t rows, const float* x, const float* dy,
                 float* out) {
  WeightTile t = tile;
  pieces(rows, kMost, [&](int64_t start, int64_t count) {
    const float* from = kIsSpread ? x : x + start;
    t.taps = tile.taps + start;
    float* to = out + start * t.out_row;
    switch (count) {
#undef CASE
#define CASE(n)                                                                           \
  case n:                                                                                 \
    return weight_tile<kIsSpread, kIsWhole, (n < kMost ? n : kMost), kVectors>(t, from, dy, to)
      CASE(1); CASE(2); CASE(3); CASE(4); CASE(5); CASE(6); CASE(7); CASE(8);
      CASE(9); CASE(10); CASE(11); CASE(12); CASE(13); CASE(14); CASE(15); CASE(16);
    }
  });
}

inline Plan plan_weight(const Job& job) {
  const Shape& s = job.shape;
  const Division d = divide(s, s.ci / s.groups, s.co / s.groups);
  Plan plan = {};
  // As many blocks in a part as the cache holds sums of: they share what is read of dy.
  const int64_t sums = s.kh * s.kw * kBlock * d.filters * static_cast<int64_t>(sizeof(float));
  plan.slice = slice_of(d.blocks, sums);
  const int64_t parts =
      d.spread ? ceil_div(d.filters, kLanes) : d.groups * ceil_div(d.blocks, plan.slice);
  const int64_t size = s.kh * s.kw * d.channels * s.co;
  // Enough for all threads; beyond one for each, no more than 64 MB of sums.
  const int64_t most = max(job.threads, (16 << 20) / size);
  plan.chunks = job.threads == 1 ? 1 : min(min(s.n, most), ceil_div(8 * job.threads, parts));
  plan.shared = plan.chunks * (size + s.co) - size;  // the first chunk sums into the result
  const int64_t width = d.spread ? kLanes : kBlock;
  const int64_t columns = seen_by(s, 0, 1).pitch() * s.sw;
  const int64_t size_of = static_cast<int64_t>(sizeof(float));
  const int64_t row_bytes = (columns * width * s.sh + s.wo * min(d.filters, kPanel)) * size_of;
  plan.rows = min(s.ho, max(ceil_div(128, s.wo), kL1Budget / row_bytes));
  plan.strips = ceil_div(s.ho, plan.rows);
  plan.rows = ceil_div(s.ho, plan.strips);
  plan.images = plan.strips > 1 ? 1 : max(1, min(s.n, kL1Budget / (row_bytes * s.ho)));
  plan.scratch = plan.images * columns * width *
                 ((plan.rows - 1) * s.sh + down(s).extent()) * (d.spread ? d.channels : plan.slice);
  plan.units[0] = plan.chunks * parts;
  plan.units[1] = s.kh * s.kw * d.channels;
  return plan;
}

template <bool kIsSpread>
void weight_unit(const Job& job, const Plan& plan, const Division& d, int64_t unit,
                 float* scratch) {
  const Shape& s = job.shape;
  const int64_t parts = plan.units[0] / plan.chunks, part = unit % parts, chunk = unit / parts;
  const int64_t taps = s.kh * s.kw, size = taps * d.channels * s.co;
  const int64_t width = kIsSpread ? kLanes : kBlock;
  float* sums = chunk ? job.shared + plan.chunks * s.co + (chunk - 1) * size : job.out;
  float* totals = job.shared + chunk * s.co;
  // Spread: all channels of some filters; else some blocks of channels and all filters of a group.
  const int64_t slices = ceil_div(d.blocks, plan.slice), most = plan.slice * kBlock;
  const int64_t group = kIsSpread ? 0 : part / slices;
  const int64_t first_channel = kIsSpread ? 0 : part % slices * most;
  const int64_t channels = kIsSpread ? d.channels : min(most, d.channels - first_channel);
  const int64_t first_filter = kIsSpread ? part * kLanes : group * d.filters;
  const int64_t filters = kIsSpread ? min(kLanes, d.filters - first_filter) : d.filters;

  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) {
      float* p = sums + (tap * d.channels + first_channel + c) * s.co + first_filter;
      memset(p, 0, sizeof(float) * static_cast<size_t>(filters));
    }
  }
  const bool adds_up = job.body != kProduct && first_channel == 0;
  if (adds_up) memset(totals + first_filter, 0, sizeof(float) * static_cast<size_t>(filters));

  const int64_t last_image = s.n * (chunk + 1) / plan.chunks;
  for (int64_t image = s.n * chunk / plan.chunks; image < last_image; image += plan.images) {
    const int64_t images = min(plan.images, last_image - image);
    for (int64_t first_row = 0; first_row < s.ho; first_row += plan.rows) {
      const int64_t rows = min(plan.rows, s.ho - first_row);
      Window window = seen_by(s, first_row, rows);
      const int64_t pitch = window.pitch(), copied = window.pixels() * width;
      for (int64_t i = 0; i < images; ++i) {
        window.image = job.x + (image + i) * s.h * s.w * s.ci;
        if (kIsSpread) {
          for (int64_t c = 0; c < channels; ++c) {
            copy_spread(window, first_filter, s.co, s.co / s.groups, d.channels, c, width,
                        scratch + (c * images + i) * copied);
          }
        } else {
          copy_blocks<false>(window, group * d.channels + first_channel, channels,
                             images * copied, scratch + i * copied);
        }
      }
      const float* dy = job.dy + ((image * s.ho + first_row) * s.wo) * s.co + first_filter;
      WeightTile t;
      t.images = images;
      t.rows = rows;
      t.columns = s.wo;
      t.x_image = copied;
      t.x_row = s.sh * pitch * s.sw * width;
      t.x_pixel = width;
      t.dy_image = s.ho * s.wo * s.co;
      t.dy_row = s.wo * s.co;
      t.dy_pixel = s.co;
      auto offset = [&](int64_t tap) { return window.offset(tap / s.kw, tap % s.kw) * width; };
      if (adds_up) {
        for (int64_t o = 0; o < filters; o += kLanes) {
          const int lanes = static_cast<int>(min(kLanes, filters - o));
          Vector sum = zero();
          for (int64_t i = 0; i < images; ++i) {
            for (int64_t q = 0; q < rows * s.wo; ++q) {
              sum = add(sum, load_lanes(dy + i * t.dy_image + q * s.co + o, lanes));
            }
          }
          float* total = totals + first_filter + o;
          store_lanes(total, add(load_lanes(total, lanes), sum), lanes);
        }
      }
      if (kIsSpread) {
        int64_t offsets[kMaxTaps];
        for (int64_t tap = 0; tap < taps; ++tap) offsets[tap] = offset(tap);
        t.taps = offsets;
        t.out_row = d.channels * s.co;
        t.lanes = filters;
        for (int64_t c = 0; c < channels; ++c) {
          const float* x = scratch + c * images * copied;
          float* out = sums + c * s.co + first_filter;
          (filters == kLanes ? weight_rows<kIsSpread, true, 1, kTapsSpread>
                             : weight_rows<kIsSpread, false, 1, kTapsSpread>)(t, taps, x, dy, out);
        }
        continue;
      }
      t.taps = nullptr;
      t.out_row = s.co;
      for (int64_t o = 0; o < filters; o += kPanel) {
        t.lanes = min(kPanel, filters - o);
        for (int64_t c = 0; c < channels; c += kBlock) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            float* out = sums + (tap * d.channels + first_channel + c) * s.co + first_filter + o;
            const float* x = scratch + c / kBlock * images * copied + offset(tap);
            (t.lanes == kPanel   ? weight_rows<kIsSpread, true, 2, kChannelsWide>
             : t.lanes > kLanes  ? weight_rows<kIsSpread, false, 2, kChannelsWide>
             : t.lanes == kLanes ? weight_rows<kIsSpread, true, 1, kChannelsNarrow>
                                 : weight_rows<kIsSpread, false, 1, kChannelsNarrow>)(
                t, min(kBlock, channels - c), x, dy + o, out);
          }
        }
      }
    }
  }
}

// Adds the chunks up in their order, whichever thread made them, and takes w times the sum off.
inline void finish_weight(const Job& job, const Plan& plan, int64_t row) {
  const Shape& s = job.shape;
  const int64_t size = plan.units[1] * s.co;
  const float* others = job.shared + plan.chunks * s.co;
  for (int64_t o = 0; o < s.co; o += kLanes) {
    const int lanes = static_cast<int>(min(kLanes, s.co - o));
    float* out = job.out + row * s.co + o;
    Vector sum = load_lanes(out, lanes), total = zero();
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
      sum = add(sum, load_lanes(others + (chunk - 1) * size + row * s.co + o, lanes));
    }
    if (job.body != kProduct) {
      for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
        total = add(total, load_lanes(job.shared + chunk * s.co + o, lanes));
      }
      const Vector w = load_lanes(job.w + row * s.co + o, lanes);
      sum = sub(sum, mul_add(w, total, zero()));
    }
    store_lanes(out, sum, lanes);
  }
}

inline void run_weight(const Job& job, const Plan& plan, int phase, int64_t unit, float* scratch) {
  const Shape& s = job.shape;
  if (phase == 1) return finish_weight(job, plan, unit);
  const Division d = divide(s, s.ci / s.groups, s.co / s.groups);
  (d.spread ? weight_unit<true> : weight_unit<false>)(job, plan, d, unit, scratch);
}

#define OPERATIONS(name)                                                    \
  {name, {plan_forward, run_forward}, {plan_input, run_input}, {plan_weight, run_weight}}

}  // namespace
