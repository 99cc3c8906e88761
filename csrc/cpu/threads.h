// PyTorch's threads, and memory, for the kernels of every target. bindings/library_cpu.cpp defines the functions, once.
#pragma once

#include <stdint.h>

namespace raccgan {
int64_t thread_count();
// work(of, begin, end) for parts of 0 <= i < count, each of `grain` tasks at least.
void run_threads(int64_t count, int64_t grain, void (*work)(const void* of, int64_t begin, int64_t end),
                 const void* of);
void* allocate(int64_t bytes);  // aligned to 64 bytes: the widest vectors, and a line of the caches
void release(void* memory);

namespace {
// Shares out `count` tasks of `elements` each: work(begin, end) does some of them. A thread pays from about as many
// elements on as PyTorch gives one in its own pointwise operations (at::internal::GRAIN_SIZE).
template <class Work> void share_out(int64_t count, int64_t elements, const Work& work) {
  constexpr int64_t kElementsAThread = 32768;
  const int64_t grain = elements > 0 ? kElementsAThread / elements : kElementsAThread;
  run_threads(count, grain > 0 ? grain : 1,
              [](const void* of, int64_t begin, int64_t end) { (*static_cast<const Work*>(of))(begin, end); }, &work);
}

template <class T = float> class Memory {
 public:
  explicit Memory(int64_t count) : data_(static_cast<T*>(allocate(count * sizeof(T)))) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { release(data_); }
  operator T*() const { return data_; }

 private:
  T* const data_;
};
}  // namespace
}  // namespace raccgan
