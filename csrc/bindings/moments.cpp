// The moments of each channel on a CPU, and the schemas.
#include "../cpu/moments.h"
#include "moments.h"

namespace raccgan { namespace {
struct Cpu {
  explicit Cpu(const Tensor&) {}
  static Tensor image(const Tensor& x) { return raccgan::image(x, "x"); }

  static void find(const Tensor&, const MomentsArgs& args, float* mean, float* var) {
    const int64_t m = args.pixels, c = args.channels, tasks = moments_tasks(m, c);
    std::vector<float> partial(moments_chunks(m) * 2 * c), center(c);
    RACCGAN_SELECT(find_center)(args, center.data());
    const auto moments = RACCGAN_SELECT(moments);
    share_out(tasks, m * c / tasks,
              [&](int64_t begin, int64_t end) { moments(args, center.data(), partial.data(), begin, end); });
    for (int64_t i = 0; i < c; ++i) {
      double sum = 0, squares = 0;
      for (int64_t chunk = 0; chunk < moments_chunks(m); ++chunk) {
        sum += partial[chunk * 2 * c + i];
        squares += partial[(chunk * 2 + 1) * c + i];
      }
      const double distance = sum / m, spread = squares / m - distance * distance;
      mean[i] = static_cast<float>(center[i] + distance);
      var[i] = static_cast<float>(spread < 0 ? 0 : spread);  // NaN stays NaN
    }
  }

  static void spread(const MomentsArgs& args, const float* grad_mean, const float* grad_var, const float* mean,
                     void* grad) {
    const int64_t m = args.pixels, c = args.channels;
    std::vector<float> slope(c), constant(c);
    for (int64_t i = 0; i < c; ++i) {
      slope[i] = static_cast<float>(2.0 * grad_var[i] / m);
      constant[i] = static_cast<float>(grad_mean[i] / static_cast<double>(m));
    }
    const AffineArgs affine_args{args, slope.data(), mean, constant.data(), grad};
    const auto affine = RACCGAN_SELECT(affine);
    share_out(m, c, [&](int64_t begin, int64_t end) { affine(affine_args, begin, end); });
  }
};
}}  // namespace raccgan

STABLE_TORCH_LIBRARY_FRAGMENT(raccgan, m) {
  m.def("moments_native(Tensor x) -> (Tensor, Tensor)");
  m.def("moments_native_backward(Tensor grad_mean, Tensor grad_var, Tensor x, Tensor mean) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(raccgan, CPU, m) {
  m.impl("moments_native", TORCH_BOX(&raccgan::moments<raccgan::Cpu>));
  m.impl("moments_native_backward", TORCH_BOX(&raccgan::moments_backward<raccgan::Cpu>));
}
