// How the stages of CBAM's CPU passes are shared out over threads, a group of samples at a time.
#pragma once

#include <utility>
#include "../../cpu/cbam/kernels.h"
#include "arguments.h"

namespace raccgan { namespace {
// do_samples(first, last, group) for all samples, `group` of them at a time so that they stay in a cache from one stage
// to the next. Where one fits a core's own, each thread takes samples through all stages by itself, and none waits for
// another between two stages; else all threads share out each stage of a group.
template <class Samples> void for_groups(const CbamShape& s, int64_t tensors, const Samples& do_samples) {
  constexpr int64_t kBytes = 1 << 19;  // of a second-level cache
  const int64_t elements = s.c * pixels(s), bytes = elements * size_of(s.dtype) * tensors;
  const int64_t threads = torch::stable::get_num_threads();
  if (bytes <= kBytes && s.n >= threads) {
    share_out(s.n, elements, [&](int64_t begin, int64_t end) { do_samples(begin, end, 1); });
  } else {
    do_samples(0, s.n, std::max<int64_t>(1, kBytes * threads / std::max<int64_t>(1, bytes)));
  }
}

// do_group(first, last) for the groups of the samples first <= n < last.
template <class Group> void each_group(int64_t first, int64_t last, int64_t group, const Group& do_group) {
  for (int64_t n = first; n < last; n += group) do_group(n, std::min(last, n + group));
}

// Shares out the tasks, `a_sample` of them each of about `elements`, of the samples first <= n < last.
template <class Work>
void share_out_samples(int64_t first, int64_t last, int64_t a_sample, int64_t elements, const Work& work) {
  share_out((last - first) * a_sample, elements,
            [&](int64_t begin, int64_t end) { work(first * a_sample + begin, first * a_sample + end); });
}

inline int64_t elements_per_chunk(const CbamShape& s) { return std::min(pixels_per_chunk(s), s.h * s.w) * s.c; }

template <class Kernel, class Args>
void by_chunks(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  share_out_samples(first, last, chunks(args.shape), elements_per_chunk(args.shape),
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Kernel, class Args>
void by_samples(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  share_out_samples(first, last, 1, args.shape.c * args.shape.r,
                    [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

template <class Work> void by_tiles(const CbamShape& s, int64_t first, int64_t last, const Work& work) {
  share_out_samples(first, last, tiles(s), rows_per_tile(s) * s.w * s.k, work);
}

template <class Kernel, class Args>
void by_tiles_with_scratch(const Kernel& kernel, const Args& args, int64_t first, int64_t last) {
  by_tiles(args.shape, first, last, [&](int64_t begin, int64_t end) {
    const auto scratch = aligned_floats(scratch_floats(args.shape));
    kernel(args, scratch.get(), begin, end);
  });
}

// A tensor as the kernels read it. From any other layout than channels_last it is copied group by group, each group to
// the same place: that stays in a cache, and costs no memory that the system has to hand out first.
class ChannelsLast {
 public:
  ChannelsLast(const CbamShape& shape, const Tensor& t, int64_t group) : shape_(shape), tensor_(t) {
    if (is_channels_last(t)) return;
    tensor_ = dense(t);
    copy_.emplace(empty_channels_last(t, std::min(group, shape.n), shape.c, shape.h, shape.w));
  }

  CbamSamples samples(int64_t first, int64_t last) const {
    if (!copy_) return {tensor_.const_data_ptr(), 0};
    const auto copy = RACCGAN_SELECT(cbam_to_channels_last);
    void* const to = copy_->mutable_data_ptr();
    share_out_samples(first, last, chunks(shape_), elements_per_chunk(shape_), [&](int64_t begin, int64_t end) {
      copy(shape_, tensor_.const_data_ptr(), to, first, begin, end);
    });
    return {to, first};
  }

 private:
  CbamShape shape_;
  Tensor tensor_;
  Optional copy_;
};

struct ScratchMemory {
  AlignedFloats all;
  float* at;

  explicit ScratchMemory(int64_t count) : all(aligned_floats(count)), at(all.get()) {}
  float* next(int64_t count) { return std::exchange(at, at + count); }
};
}}  // namespace raccgan
