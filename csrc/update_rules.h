// SPDX-License-Identifier: MIT
// The arithmetic of the optimizers: structs whose update(w, s0, s1, g) takes weights, both states and the gradient, all
// as registers of one kind: vectors of the CPU, or single numbers. Included inside a namespace that has square_root and
// twice_inverse_sqrt of such registers.

template <typename A>
struct Sgd {
  static constexpr int kStates = 0;
  explicit Sgd(const Optimizer& o) : lr(o.lr), weight_decay(o.weight_decay) {}
  template <typename V>
  FFM_HOST_DEVICE void update(V& w, V&, V&, V g) const {
    w -= lr * (g + weight_decay * w);
  }
  A lr, weight_decay;
};

// Duchi, Hazan, Singer, "Adaptive Subgradient Methods", JMLR 12 (2011), without an epsilon: libffm's form.
template <typename A>
struct AdaGrad {
  static constexpr int kStates = 1;
  explicit AdaGrad(const Optimizer& o) : half_lr(o.lr / 2), weight_decay(o.weight_decay) {}
  template <typename V>
  FFM_HOST_DEVICE void update(V& w, V& sum, V&, V g) const {
    g += weight_decay * w;
    sum += g * g;
    w -= half_lr * g * twice_inverse_sqrt(sum);
  }
  A half_lr, weight_decay;
};

// Kingma, Ba, "Adam", ICLR 2015; rows that a batch does not touch stay as they are, and eps is that of
// the paper's last remark in section 2, as in torch.optim.SparseAdam.
template <typename A>
struct Adam {
  static constexpr int kStates = 2;
  explicit Adam(const Optimizer& o)
      : beta1(o.beta1),
        beta2(o.beta2),
        eps(o.eps),
        weight_decay(o.weight_decay),
        rate(o.lr * std::sqrt(o.correction2) / o.correction1) {}
  template <typename V>
  FFM_HOST_DEVICE void update(V& w, V& mean, V& square, V g) const {
    g += weight_decay * w;
    // Subtracted as doubles: in float32 nothing may be left of it.
    mean += A(1 - beta1) * (g - mean);
    square += A(1 - beta2) * (g * g - square);
    w -= rate * mean / (square_root(square) + eps);
  }
  double beta1, beta2;
  A eps, weight_decay, rate;
};

// McMahan et al., "Ad Click Prediction: a View from the Trenches", KDD 2013, Algorithm 1. weight_decay is its lambda_2.
template <typename A>
struct Ftrl {
  static constexpr int kStates = 2;
  explicit Ftrl(const Optimizer& o) : inverse_lr(1 / o.lr), beta(o.beta1), l1(o.l1), l2(o.weight_decay) {}
  template <typename V>
  FFM_HOST_DEVICE void update(V& w, V& z, V& n, V g) const {
    const V sum = n + g * g, root = square_root(sum);
    z += g - (root - square_root(n)) * inverse_lr * w;
    n = sum;
    const V size = z < 0 ? -z : z, shrunk = l1 - size;
    const V toward = (z < 0 ? -shrunk : shrunk) / ((beta + root) * inverse_lr + l2);
    w = size <= l1 ? V{} : toward;
  }
  A inverse_lr, beta, l1, l2;
};

// How the weights of a row are rounded: to nearest, or by a hash of (seed, step, row) and of the place in the row.
class Rounding {
 public:
  FFM_HOST_DEVICE Rounding(const Optimizer& o, int64_t row)
      : Rounding(o.is_stochastic, o.is_stochastic ? key_of_row(key_of_step(o), row) : 0) {}
  FFM_HOST_DEVICE Rounding(bool is_stochastic, uint32_t key) : is_stochastic_(is_stochastic), key_(key) {}

  FFM_HOST_DEVICE static uint64_t key_of_step(const Optimizer& o) {
    return mix(o.seed ^ static_cast<uint64_t>(o.step) * 0x9e3779b97f4a7c15u);
  }
  FFM_HOST_DEVICE static uint32_t key_of_row(uint64_t key_of_step, int64_t row) {
    return static_cast<uint32_t>(mix(key_of_step ^ static_cast<uint64_t>(row)) >> 32);
  }

  // 32 random bits for each place of the row, given as place * kSpread.
  static constexpr uint32_t kSpread = 0x9e3779b9u;
  template <typename U>
  FFM_HOST_DEVICE U random_bits(U spread) const {
    return bits_of_place(spread) ^ key_;
  }
  // The key is well mixed, and of the place one round of a hash is enough (the first of lowbias32, C. Wellons): the
  // bits are uniform at each place and do not depend on those of another row or step. What does not depend on the row
  // is reckoned once for several.
  template <typename U>
  FFM_HOST_DEVICE static U bits_of_place(U spread) {
    const U h = (spread ^ spread >> 16) * 0x7feb352du;
    return h ^ h >> 15;
  }
  FFM_HOST_DEVICE bool is_stochastic() const { return is_stochastic_; }

 private:
  FFM_HOST_DEVICE static uint64_t mix(uint64_t h) { return (h ^ h >> 32) * 0xd6e8feb86659fd93u; }

  bool is_stochastic_;
  uint32_t key_;
};

// The bits of a float32 -> those of a bfloat16, in the upper half. Where a finite number lies between two of them, the
// nearer one is taken the more often: the mean stays. random: 16 bits.
template <typename U>
FFM_HOST_DEVICE U round_at_random(U bits, U random) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : bits + random;
}
