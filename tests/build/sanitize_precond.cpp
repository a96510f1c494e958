// The `precond` kernels on buffers of exactly their size, for AddressSanitizer and UndefinedBehaviorSanitizer to watch:
// every tail, sides that are there and not, dtypes of tensors and states, strides, gradients that are not finite, one
// thread and more, and with every allocation failing in turn.
#include <limits>

#include "../../kernels/precond/cpu_ops.h"
// After the kernels.
#include "sanitize.h"

using secant::NewtonRoot;
using secant::NewtonSchulz;
using secant::PrecondLayout;
using secant::PrecondStep;
using secant::PrecondTensor;

namespace {

// One tensor with its states; sides: 1 left, 2 right.
template <class S, class Q>
struct Tensor {
  std::vector<S> param, grad;
  std::vector<Q> exp_avg, exp_avg_sq, left, right, left_root, right_root;
  float step = 3;
  PrecondLayout layout;

  Tensor(int64_t rows, int64_t columns, int64_t down, int64_t across, int sides, bool turned) {
    layout = {rows, columns, down, across, turned ? 1 : columns, turned ? rows : 1};
    const int64_t size = rows * columns, tiles = down * across;
    const int64_t nl = (rows + down - 1) / down, nr = (columns + across - 1) / across;
    param = numbers<S>(size), grad = numbers<S>(size), exp_avg = numbers<Q>(size);
    exp_avg_sq.resize(static_cast<size_t>(size));
    if ((sides & 1) != 0) left = numbers<Q>(tiles * (nl * (nl + 1) / 2)), left_root = numbers<Q>(tiles * nl * nl);
    if ((sides & 2) != 0) right = numbers<Q>(tiles * (nr * (nr + 1) / 2)), right_root = numbers<Q>(tiles * nr * nr);
  }
  PrecondTensor addresses() {
    const auto at = [](auto& x) { return x.empty() ? nullptr : x.data(); };
    return {at(param), at(grad),      at(exp_avg),    at(exp_avg_sq), at(left),
            at(right), at(left_root), at(right_root), &step};
  }
};

template <class S, class Q>
void step(void (*kernel)(const PrecondStep&), int threads, int64_t least = 0) {
  std::vector<Tensor<S, Q>> tensors;
  for (int64_t n : {int64_t(1), int64_t(2), int64_t(5), int64_t(16), int64_t(17), int64_t(33)}) {
    for (int sides = 0; sides < 4; ++sides) {
      tensors.emplace_back(n, 40 - n, 1, 1, sides, n % 2 == 0);
      tensors.emplace_back(40 - n, n, n > 4 ? 1 : 3, 1, sides, n % 2 == 1);
    }
  }
  tensors.emplace_back(70, 131, 3, 4, 3, false);
  tensors.emplace_back(64, 64, 1, 1, 3, false);
  tensors.emplace_back(1, 5000, 1, 3, 0, false);
  tensors[3].grad[0] = Round<S>::from(std::numeric_limits<float>::quiet_NaN());
  std::vector<PrecondTensor> addresses;
  std::vector<PrecondLayout> layout;
  for (auto& x : tensors) {
    if (static_cast<int64_t>(x.param.size()) < least) continue;
    addresses.push_back(x.addresses()), layout.push_back(x.layout);
  }
  for (const bool rotate : {false, true}) {
    for (int graft = 0; graft < (rotate ? 1 : 4); ++graft) {
      for (int phases : {3, 1, 2}) {
        int64_t skipped = 0;
        PrecondStep c{};
        c.count = static_cast<int64_t>(addresses.size()), c.tensors = addresses.data(), c.layout = layout.data();
        c.lr = 1e-3, c.beta1 = 0.9, c.beta2 = 0.95, c.beta_gram = 0.95, c.eps = 1e-8, c.weight_decay = 0.1;
        c.rms = 0.2, c.graft = graft, c.rotate = rotate, c.maximize = graft == 1, c.phases = phases;
        c.skipped = &skipped, c.threads = threads;
        kernel(c);
        expect(phases == 1 ? skipped == 0 : least > 0 || skipped >= 1, "tiles that are skipped");
      }
    }
  }
}

template <class S>
void newton_schulz(void (*kernel)(const NewtonSchulz&), int64_t batch, int64_t m, int64_t n, int threads) {
  const auto x = numbers<S>(batch * m * n);
  std::vector<S> out(x.size());
  kernel({batch, m, n, x.data(), 5, 3.4445, -4.775, 2.0315, 1e-7, out.data(), threads});
}

template <class S>
void newton_root(void (*kernel)(const NewtonRoot&), int64_t batch, int64_t n, int p, int threads) {
  auto a = numbers<S>(batch * n * n);
  std::vector<S> out(a.size());
  std::vector<int32_t> info(static_cast<size_t>(batch), 99);
  if (batch > 2) a[static_cast<size_t>(n * n)] = Round<S>::from(std::numeric_limits<float>::infinity());
  kernel({batch, n, a.data(), p, 30, 5, 1e-3, 1e-4, 1.2, out.data(), info.data(), threads});
  if (batch > 2) expect(info[1] == -1, "a matrix that is not finite");
}

}  // namespace

int main() {
  for (int threads : {1, 3}) {
    step<float, float>(precond::step_f32, threads);
    step<double, double>(precond::step_f64, threads);
    step<bf16, float>(precond::step_bf16, threads);
    step<f16, float>(precond::step_f16, threads);
    step<float, bf16>(precond::step_f32_bf16, threads);
    step<double, bf16>(precond::step_f64_bf16, threads);
    step<bf16, bf16>(precond::step_bf16_bf16, threads);
    step<f16, bf16>(precond::step_f16_bf16, threads);
    without_memory([=] { step<float, float>(precond::step_f32, threads, 4000); });
    without_memory([=] { newton_schulz<float>(precond::newton_schulz_f32, 3, 5, 9, threads); });
    without_memory([=] { newton_root<float>(precond::newton_root_f32, 3, 9, 2, threads); });
    for (int64_t n : {1, 3, 16, 17, 40}) {
      newton_root<float>(precond::newton_root_f32, 3, n, 2, threads);
      newton_root<double>(precond::newton_root_f64, 3, n, 4, threads);
      newton_root<bf16>(precond::newton_root_bf16, 3, n, 1, threads);
      newton_root<f16>(precond::newton_root_f16, 3, n, 4, threads);
    }
    for (int64_t m : {1, 3, 16, 17, 40}) {
      for (int64_t n : {1, 4, 31, 64}) {
        newton_schulz<float>(precond::newton_schulz_f32, 3, m, n, threads);
        newton_schulz<double>(precond::newton_schulz_f64, 3, m, n, threads);
        newton_schulz<bf16>(precond::newton_schulz_bf16, 3, m, n, threads);
        newton_schulz<f16>(precond::newton_schulz_f16, 3, m, n, threads);
      }
    }
  }
  std::puts("clean");
}
