// The library: XLA FFI handlers, the choice of the instruction set, and the sharing of work.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "job.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// ---- the instruction set

struct Candidate {
  const Kernels* kernels;
  bool runs;
};

// Those of this build, the best first.
const Candidate* candidates() {
  static const Candidate all[] = {
#if defined(__x86_64__)
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#elif defined(__aarch64__)
      {&kNeon, true},
#endif
      {nullptr, false}};
  return all;
}

const Kernels* find(const char* name) {
  for (const Candidate* c = candidates(); c->kernels; ++c) {
    if (c->runs && (name == nullptr || std::strcmp(name, c->kernels->name) == 0)) {
      return c->kernels;
    }
  }
  return nullptr;
}

std::atomic<const Kernels*> chosen{nullptr};

// ---- sharing

// A call, divided into units that threads claim. A task of the pool that begins late finds no unit
// left and touches only the counters, which is why they alone may outlive the call.
struct Call {
  const Operation* operation;
  Job job;
  Plan plan;
  float* scratch;
  std::atomic<int64_t> threads{0}, next[2] = {{0}, {0}}, done[2] = {{0}, {0}};

  void work(bool is_caller) {
    float* own = nullptr;
    for (int phase = 0; phase < 2; ++phase) {
      for (int64_t unit; (unit = next[phase].fetch_add(1)) < plan.units[phase];) {
        if (own == nullptr) own = scratch + threads.fetch_add(1) * plan.scratch;
        operation->run(job, plan, phase, unit, own);
        done[phase].fetch_add(1);
      }
      if (phase == 1 && !is_caller) return;
      // All units are claimed, so those waited for have begun: a busy pool cannot block a call.
      for (int turns = 0; done[phase].load() < plan.units[phase]; ++turns) {
        if (turns > 1000) std::this_thread::yield();
      }
    }
  }
};

int64_t up(int64_t floats) { return (floats + 15) / 16 * 16; }  // to whole cache lines

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Numbers = ffi::Span<const int64_t>;

// What XLA says of the execution that a call belongs to.
struct Execution {
  ffi::ThreadPool pool;
  ffi::RunId id;
  int32_t device;
};

// XLA maps the buffers of an execution afresh each time, and faults on small pages then cost a tenth
// of a training step. The first call with a large result of each execution on each device asks for
// huge pages in the mapping that the result lies in, which is that of most buffers.
void use_huge_pages(const Execution& execution, Result result) {
#if defined(__linux__)
  constexpr size_t kPage = 2 << 20, kMapped = 32 << 20;  // malloc keeps smaller mappings
  static std::atomic<int64_t> last[64];
  if (result->size_bytes() < kPage) return;
  const int64_t id = execution.id.run_id;
  if (last[execution.device & 63].exchange(id) == id) return;
  std::FILE* maps = std::fopen("/proc/self/maps", "r");
  if (maps == nullptr) return;
  const uintptr_t place = reinterpret_cast<uintptr_t>(result->untyped_data());
  char line[512];
  while (std::fgets(line, sizeof(line), maps)) {
    char* rest;
    const uintptr_t begin = std::strtoull(line, &rest, 16);
    const uintptr_t end = *rest == '-' ? std::strtoull(rest + 1, nullptr, 16) : 0;
    if (begin > place || place >= end) continue;
    const size_t size = end - begin;
    if (size >= kMapped) madvise(reinterpret_cast<void*>(begin), size, MADV_HUGEPAGE);
    break;
  }
  std::fclose(maps);
#endif
}

// Runs an operation on the shapes of images, filters and responses; `dy` may be null.
ffi::Error run(Execution execution, Operation Kernels::*operation, Numbers geometry, Numbers images,
               Numbers filters, Numbers responses, Array x, Array w, const float* dy, Result out) {
  const Kernels* kernels = chosen.load();
  if (kernels == nullptr) return ffi::Error::Internal("no instruction set was selected");
  use_huge_pages(execution, out);
  const int64_t threads = execution.pool.num_threads();
  auto call = std::make_shared<Call>();
  Job& job = call->job;
  job.shape = {images[0],   images[1],   images[2],    images[3],    filters[0],  filters[1],
               filters[3],  responses[1], responses[2], geometry[0], geometry[1], geometry[2],
               geometry[3], geometry[4], geometry[5],  geometry[6]};
  job.body = static_cast<Body>(geometry[7]);
  job.threads = threads < 1 ? 1 : threads;
  job.x = x.typed_data();
  job.w = w.typed_data();
  job.dy = dy;
  job.out = out->typed_data();
  call->operation = &(kernels->*operation);
  call->plan = call->operation->plan(job);
  call->plan.scratch = up(call->plan.scratch);
  const int64_t shared = up(call->plan.shared);
  const size_t floats = static_cast<size_t>(shared + job.threads * call->plan.scratch + 16);
  const std::unique_ptr<float, void (*)(void*)> memory(
      static_cast<float*>(std::aligned_alloc(64, floats * sizeof(float))), std::free);
  if (memory == nullptr) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a convolution's scratch");
  }
  job.shared = memory.get();
  call->scratch = memory.get() + shared;
  for (int64_t i = 1; i < job.threads; ++i) execution.pool.Schedule([call] { call->work(false); });
  call->work(true);
  return ffi::Error::Success();
}

// ---- handlers

ffi::Error forward(ffi::ThreadPool pool, ffi::RunId id, int32_t device, Numbers geometry, Array x,
                   Array w, Result y) {
  return run({pool, id, device}, &Kernels::forward, geometry, x.dimensions(), w.dimensions(),
             y->dimensions(), x, w, nullptr, y);
}

ffi::Error input_gradient(ffi::ThreadPool pool, ffi::RunId id, int32_t device, Numbers geometry,
                          Array x, Array w, Array dy, Result dx) {
  return run({pool, id, device}, &Kernels::input_gradient, geometry, dx->dimensions(),
             w.dimensions(), dy.dimensions(), x, w, dy.typed_data(), dx);
}

ffi::Error weight_gradient(ffi::ThreadPool pool, ffi::RunId id, int32_t device, Numbers geometry,
                           Array x, Array w, Array dy, Result dw) {
  return run({pool, id, device}, &Kernels::weight_gradient, geometry, x.dimensions(),
             dw->dimensions(), dy.dimensions(), x, w, dy.typed_data(), dw);
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

#define BINDING                                                                          \
  ffi::Ffi::Bind()                                                                       \
      .Ctx<ffi::ThreadPool>()                                                            \
      .Ctx<ffi::RunId>()                                                                 \
      .Ctx<ffi::DeviceOrdinal>()                                                         \
      .Attr<Numbers>("geometry")                                                         \
      .Arg<Array>()                                                                      \
      .Arg<Array>()

#define HANDLER(symbol, function, binding)          \
  PUBLIC XLA_FFI_Error* symbol(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function, binding)

HANDLER(pkkd_forward, forward, BINDING.Ret<Array>());
HANDLER(pkkd_input_gradient, input_gradient, BINDING.Arg<Array>().Ret<Array>());
HANDLER(pkkd_weight_gradient, weight_gradient, BINDING.Arg<Array>().Ret<Array>());

// Uses `name` from now on, or the best one for null; returns its name, or null if it cannot run.
PUBLIC const char* pkkd_select(const char* name) {
  const Kernels* kernels = find(name);
  if (kernels != nullptr) chosen.store(kernels);
  return kernels == nullptr ? nullptr : kernels->name;
}
