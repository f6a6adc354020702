// SPDX-License-Identifier: MIT
// How rows of a table are updated. Included after vec.h, inside the namespace of an ISA.

// 1 / sqrt(v) for v >= 0, to the last bit or two; a large finite number where v is 0.
template <typename V>
inline V inverse_sqrt(V v) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  constexpr int N = sizeof(V) / sizeof(A);
  constexpr A kSmallest = std::is_same_v<A, float> ? A(0x1p-126) : A(0x1p-1022);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<A, float> && N == 16) {
    v = bit_copy<V>(_mm512_max_ps(bit_copy<__m512>(v), _mm512_set1_ps(kSmallest)));
  } else
#endif
    v = v < kSmallest ? V{} + kSmallest : v;
  // An estimate of 12 bits or more, and a step of Newton's.
  [[maybe_unused]] const auto refine = [v](V y) { return y * (A(1.5) - (A(0.5) * v * y) * y); };
  if constexpr (std::is_same_v<A, float>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return refine(bit_copy<V>(_mm512_rsqrt14_ps(bit_copy<__m512>(v))));
#endif
#if defined(__AVX__)
    if constexpr (N == 8) return refine(bit_copy<V>(_mm256_rsqrt_ps(bit_copy<__m256>(v))));
#endif
#if defined(__x86_64__)
    if constexpr (N == 4) return refine(bit_copy<V>(_mm_rsqrt_ps(bit_copy<__m128>(v))));
#endif
#if defined(__aarch64__)
    if constexpr (N == 4) return refine(refine(bit_copy<V>(vrsqrteq_f32(bit_copy<float32x4_t>(v)))));
#endif
  }
  V y;
  for (int i = 0; i < N; ++i) y[i] = A(1) / std::sqrt(v[i]);
  return y;
}
template <typename V>
inline V square_root(V v) {
  return v * inverse_sqrt(v);
}

#include "../update_rules.h"

// The places i, i + 1, ... of a row.
template <int N>
inline Vec<uint32_t, N> places(int64_t i) {
  constexpr auto kLane = []<int... I>(std::integer_sequence<int, I...>) {
    return Vec<uint32_t, N>{I...};
  }(std::make_integer_sequence<int, N>{});
  return kLane + static_cast<uint32_t>(i);
}

// weight[row] moves against the gradient x * d at its elements [begin, begin + n); d[0] is that of the first.
template <typename T>
using UpdateRow = void (*)(const UpdatedTable&, const Optimizer&, int64_t row, Sum<T> x, const Sum<T>* d, int64_t begin,
                           int64_t n);

// Stores the first kCount weights of a register, which begin at place i of their row.
template <int kCount, int N, typename T>
inline void store_weights(T* p, Vec<Sum<T>, N> w, Rounding rounding, int64_t i) {
  Vec<Bits<T>, N> bits = narrow<T, N>(w);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (rounding.is_stochastic()) {
      const auto rounded = round_at_random(bit_copy<Vec<uint32_t, N>>(w), rounding.random_bits(places<N>(i)));
      bits = __builtin_convertvector(rounded, Vec<uint16_t, N>);
    }
  }
  __builtin_memcpy(p, &bits, kCount * sizeof(T));
}

template <typename T, template <typename> typename Rule>
void update_row(const UpdatedTable& table, const Optimizer& o, int64_t row, Sum<T> x, const Sum<T>* d, int64_t begin,
                int64_t n) {
  using A = Sum<T>;
  const Rule<A> rule(o);
  const Rounding rounding(o, row);
  const int64_t at = row * table.row_size + begin;
  T* const weight = static_cast<T*>(table.weight) + at;
  A* const first = static_cast<A*>(table.states[0]) + at;
  A* const second = static_cast<A*>(table.states[1]) + at;
  for_aligned<kLanes<A>>(weight, n, [=](auto size, int64_t i) __attribute__((always_inline)) {
    constexpr int N = size();
    Vec<A, N> w = load<N>(weight + i), s0 = {}, s1 = {};
    if constexpr (Rule<A>::kStates > 0) s0 = load<N>(first + i);
    if constexpr (Rule<A>::kStates > 1) s1 = load<N>(second + i);
    rule.update(w, s0, s1, x * load<N>(d + i));
    store_weights<N, N>(weight + i, w, rounding, begin + i);
    if constexpr (Rule<A>::kStates > 0) store<N>(first + i, s0);
    if constexpr (Rule<A>::kStates > 1) store<N>(second + i, s1);
  });
}

// AdaGrad with one sum for each K-vector: that of the mean of g^2 over its K elements. kVectors of them in a register
// of N lanes.
template <typename T, int kEmbedDim, int kVectors, int N>
__attribute__((always_inline)) inline void update_vectors(T* weight, Sum<T>* sums, Sgd<Sum<T>> rates, Rounding rounding,
                                                          Sum<T> x, const Sum<T>* d, int64_t begin) {
  using A = Sum<T>;
  constexpr int kCount = kEmbedDim * kVectors;
  Vec<A, N> w = load_first<N>(weight, kCount);
  const Vec<A, N> g = x * load_first<N>(d, kCount) + rates.weight_decay * w;
  // The sum of each K-vector in all of its lanes. Shuffles between registers of one size are single instructions.
  Vec<A, N> squares = g * g;
  constexpr auto kLanesOf = std::make_integer_sequence<int, N>{};
  const auto add_lanes =
      [&]<int kStep, int... I>(std::integer_sequence<int, kStep>, std::integer_sequence<int, I...>)
          __attribute__((always_inline)) { squares += __builtin_shufflevector(squares, squares, (I ^ kStep)...); };
  if constexpr (kEmbedDim > 1) add_lanes(std::integer_sequence<int, 1>{}, kLanesOf);
  if constexpr (kEmbedDim > 2) add_lanes(std::integer_sequence<int, 2>{}, kLanesOf);
  if constexpr (kEmbedDim > 4) add_lanes(std::integer_sequence<int, 4>{}, kLanesOf);
  if constexpr (kEmbedDim > 8) add_lanes(std::integer_sequence<int, 8>{}, kLanesOf);
  const Vec<A, N> before = load_first<N>(sums, kVectors);
  const Vec<A, N> sum = squares * (A(1) / kEmbedDim) + [&]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(before, before, (I / kEmbedDim)...);
  }(kLanesOf);
  const Vec<A, N> after = [&]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(sum, sum, (I * kEmbedDim % N)...);
  }(kLanesOf);
  __builtin_memcpy(sums, &after, kVectors * sizeof(A));
  w -= rates.lr * g * inverse_sqrt(sum);
  store_weights<kCount, N>(weight, w, rounding, begin);
}

template <typename T>
void update_row_vector_wise(const UpdatedTable& table, const Optimizer& o, int64_t row, Sum<T> x, const Sum<T>* d,
                            int64_t begin, int64_t n) {
  using A = Sum<T>;
  const Rounding rounding(o, row);
  T* const weight = static_cast<T*>(table.weight) + row * table.row_size + begin;
  A* const sums = static_cast<A*>(table.states[0]) + row * table.state_row_size + begin / table.embed_dim;
  const Sgd<A> rates(o);
  const auto with_constant = [=](auto embed_dim) {
    constexpr int K = embed_dim();
    constexpr int N = std::max(K, kLanes<A>), kMost = N / K;
    int64_t i = 0;
    const auto update = [&](auto vectors) __attribute__((always_inline)) {
      update_vectors<T, K, vectors(), N>(weight + i, sums + i / K, rates, rounding, x, d + i, begin + i);
      i += vectors() * K;
    };
    while (i + N <= n) update(std::integral_constant<int, kMost>{});
    if constexpr (kMost > 2) {
      if (i + 2 * K <= n) update(std::integral_constant<int, 2>{});
    }
    while (i < n) update(std::integral_constant<int, 1>{});
  };
  switch (table.embed_dim) {
    case 4: return with_constant(std::integral_constant<int, 4>{});
    case 8: return with_constant(std::integral_constant<int, 8>{});
    case 16: return with_constant(std::integral_constant<int, 16>{});
  }
  const int64_t K = table.embed_dim;
  for (int64_t i = 0; i < n; i += K) {
    const auto gradient = [&](int64_t k) { return x * d[i + k] + rates.weight_decay * load(weight + i + k); };
    A squares = 0;
    for (int64_t k = 0; k < K; ++k) squares += gradient(k) * gradient(k);
    A& sum = sums[i / K];
    sum += squares / static_cast<A>(K);
    const A rate = rates.lr * inverse_sqrt(Vec<A, 2>{sum})[0];
    for (int64_t k = 0; k < K; ++k) {
      store_weights<1, 2>(weight + i + k, Vec<A, 2>{load(weight + i + k) - rate * gradient(k)}, rounding,
                          begin + i + k);
    }
  }
}

template <typename T>
UpdateRow<T> choose_update(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::kSgd: return update_row<T, Sgd>;
    case OptimizerKind::kAdaGrad: return update_row<T, AdaGrad>;
    case OptimizerKind::kVectorAdaGrad: return update_row_vector_wise<T>;
    case OptimizerKind::kAdam: return update_row<T, Adam>;
    case OptimizerKind::kFtrl: return update_row<T, Ftrl>;
  }
  return nullptr;
}
