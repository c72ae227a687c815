// Runs the CUDA kernels on the CPU, in place of the toolkit's header of this name: each thread of a block is a fiber, and
// blocks run one after another.
//
// Between two barriers the threads run one at a time in an order seeded by CMLM_HOST_ORDER, as do the blocks of a grid: if a
// result depends on the order, a barrier is missing. Every array of shared memory is a separate allocation, filled with garbage
// that depends on the seed, so AddressSanitizer sees an index beyond its end. cp.async copies happen as late as they may: when
// waited for. Misuse (barriers that not all threads reach, more shared memory than the launch asked for) throws.
#pragma once

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define CMLM_CUDA_HOST
#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cmlm_host {

constexpr size_t kStack = 256 << 10;

// A suspended stack, and the switch from one to another. ucontext works everywhere, with two system calls per switch.
#if defined(__x86_64__)
struct Context {
  void** top = nullptr;

  void begin(unsigned char* stack, void (*function)()) {
    top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + kStack) / 16 * 16) - 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(function);  // six registers, then the return address
  }
};
extern "C" void cmlm_host_switch(void*** from, void** to);
asm(".text\n.weak cmlm_host_switch\ncmlm_host_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\nmov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
inline void swap(Context& from, Context& to) { cmlm_host_switch(&from.top, to.top); }
#else
struct Context {
  ucontext_t context;

  void begin(unsigned char* stack, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
};
inline void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Copy {
  void* to;
  const void* from;
  bool whole;
};

struct Thread {
  enum { ready, at_block, at_warp, finished } state = ready;
  dim3 index;
  unsigned linear = 0;
  unsigned turn = 0;                    // warp operations so far
  unsigned char slot[2][64];            // the value it hands to its warp
  std::vector<std::vector<Copy>> copies;  // committed groups, and the open one at the back
  Context context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
};

struct Block {
  dim3 index, size, grid;
  size_t shared_bytes = 0;
  std::vector<std::pair<unsigned char*, size_t>> shared;
  std::vector<Thread>* threads = nullptr;
  Thread* running = nullptr;
  Context scheduler;
  const std::function<void()>* body = nullptr;
  std::string error;
  unsigned char garbage = 0xff;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
};
inline Block block;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("cuda_host: " + what); }


// Switches from one stack to another, and tells AddressSanitizer.
inline void jump(Context& from, Context& to, const void* bottom, size_t size, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &fake, bottom, size);
  swap(from, to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  (void)bottom, (void)size, (void)ends;
  swap(from, to);
#endif
}

inline void wait(decltype(Thread::state) state) {
  Thread* self = block.running;
  self->state = state;
  jump(self->context, block.scheduler, block.stack_bottom, block.stack_size, state == Thread::finished);
}

inline void start_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.stack_bottom, &block.stack_size);
#endif
  try {
    (*block.body)();
  } catch (const std::exception& error) {
    block.error = error.what();
  }
  wait(Thread::finished);
}

// Resumes the threads whose barrier everyone has reached.
inline bool release(std::vector<Thread>& threads) {
  bool any = false, all = true;
  for (const Thread& thread : threads) all = all && (thread.state == Thread::at_block || thread.state == Thread::finished);
  for (size_t warp = 0; warp < threads.size(); warp += 32) {
    bool here = true;
    const size_t end = std::min(warp + 32, threads.size());
    for (size_t t = warp; t < end; ++t) here = here && threads[t].state == Thread::at_warp;
    for (size_t t = warp; here && t < end; ++t) threads[t].state = Thread::ready, any = true;
  }
  if (all)
    for (Thread& thread : threads)
      if (thread.state == Thread::at_block) thread.state = Thread::ready, any = true;
  return any;
}

inline void run_block(std::vector<Thread>& threads, std::mt19937_64& order) {
  for (Thread& thread : threads) {
    thread.state = Thread::ready, thread.turn = 0;
    thread.copies.assign(1, {});
    thread.context.begin(thread.stack.get(), start_thread);
  }
  std::vector<Thread*> ready;
  do {
    ready.clear();
    for (Thread& thread : threads)
      if (thread.state == Thread::ready) ready.push_back(&thread);
    std::shuffle(ready.begin(), ready.end(), order);
    for (Thread* thread : ready) {
      block.running = thread;
      jump(block.scheduler, thread->context, thread->stack.get(), kStack);
      if (!block.error.empty()) fail(block.error);
    }
  } while (release(threads));
  for (const Thread& thread : threads) {
    if (thread.state != Thread::finished) fail("a barrier or warp operation that not all threads reach");
    for (const auto& group : thread.copies)
      if (!group.empty()) fail("a cp.async copy that nobody waits for");
  }
  for (auto& [memory, bytes] : block.shared) std::free(memory);
  block.shared.clear();
}

inline void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& body) {
  const char* seed = std::getenv("CMLM_HOST_ORDER");
  std::mt19937_64 order(seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10));
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535) fail("an empty or too high grid");
  if (size.x == 0 || size.x > 1024) fail("a block of " + std::to_string(size.x) + " threads");
  static std::map<unsigned, std::vector<Thread>> of_size;  // stacks cost more than most launches
  std::vector<Thread>& threads = of_size[size.x];
  if (threads.empty()) threads = std::vector<Thread>(size.x);
  for (unsigned t = 0; t < size.x; ++t) threads[t].index = dim3(t, 0, 0), threads[t].linear = t;
  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y);
  for (size_t b = 0; b < blocks.size(); ++b) blocks[b] = b;
  std::shuffle(blocks.begin(), blocks.end(), order);
  block.grid = grid, block.size = size, block.shared_bytes = shared_bytes;
  block.threads = &threads, block.body = &body;
  block.error.clear();
  for (auto& [memory, bytes] : block.shared) std::free(memory);  // left by a launch that stopped
  block.shared.clear();
  for (uint64_t b : blocks) {
    block.index = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x), 0);
    block.garbage = order() % 2 ? 0xff : 0x5a;
    try {
      run_block(threads, order);
    } catch (...) {
      threads.clear();  // their stacks hold calls that never return
      throw;
    }
  }
}

// Hands `mine` to the warp and waits; the result returns any lane's.
template <class X>
auto exchange(const X& mine) {
  static_assert(sizeof(X) <= 64);
  Thread* self = block.running;
  const unsigned turn = self->turn++ % 2, warp = self->linear / 32 * 32;
  std::memcpy(self->slot[turn], &mine, sizeof(X));
  wait(Thread::at_warp);
  return [turn, warp](unsigned lane) {
    X other;
    std::memcpy(&other, (*block.threads)[warp + lane].slot[turn], sizeof(X));
    return other;
  };
}
inline unsigned lane() { return block.running->linear % 32; }

}  // namespace cmlm_host

#define threadIdx (::cmlm_host::block.running->index)
#define blockIdx (::cmlm_host::block.index)
#define blockDim (::cmlm_host::block.size)
#define gridDim (::cmlm_host::block.grid)

inline void __syncthreads() { ::cmlm_host::wait(::cmlm_host::Thread::at_block); }
inline void __syncwarp() { ::cmlm_host::exchange(0); }
inline void __threadfence() {}
template <class X>
X __shfl_xor_sync(unsigned, X value, int with) {
  return ::cmlm_host::exchange(value)(::cmlm_host::lane() ^ with);
}
template <class X>
X __shfl_up_sync(unsigned, X value, unsigned by) {
  const unsigned lane = ::cmlm_host::lane();
  return ::cmlm_host::exchange(value)(lane < by ? lane : lane - by);
}
template <class X>
X __shfl_sync(unsigned, X value, int from) {
  return ::cmlm_host::exchange(value)(from);
}
template <class X>
X atomicAdd(X* to, X value) {
  const X before = *to;
  *to += value;
  return before;
}
template <class X>
X atomicCAS(X* to, X expected, X value) {
  const X before = *to;
  if (before == expected) *to = value;
  return before;
}

#include "ptx.h"
