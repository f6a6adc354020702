// SPDX-License-Identifier: MIT
// How rows of a table are updated. Included after vec.h, inside the namespace of an ISA.

// v, or a small number where v is less: its inverse root is finite.
template <typename V>
inline V with_inverse_sqrt(V v) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  // Not the smallest normal number: its half is slow, and there are zeros in lanes behind the end of a row.
  constexpr A kSmallest = std::is_same_v<A, float> ? A(0x1p-120) : A(0x1p-1000);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, Vec<float, 16>>) {
    return bit_copy<V>(_mm512_maskz_max_ps(kAllLanes, bit_copy<__m512>(v), _mm512_set1_ps(kSmallest)));
  }
#endif
  return v < kSmallest ? V{} + kSmallest : v;
}
#if defined(__AVX512F__)
// 1 / sqrt(v), to 14 bits.
inline Vec<float, 16> estimated_inverse_sqrt(Vec<float, 16> v) {
  return bit_copy<Vec<float, 16>>(_mm512_maskz_rsqrt14_ps(kAllLanes, bit_copy<__m512>(v)));
}
#endif

// 2 / sqrt(v) for v >= 0, to the last bit or two; a large finite number where v is 0. It is a multiplication shorter
// than its half.
template <typename V>
inline V twice_inverse_sqrt(V v) {
  using A = std::remove_cvref_t<decltype(v[0])>;
  constexpr int N = sizeof(V) / sizeof(A);
  v = with_inverse_sqrt(v);
  // An estimate of 12 bits or more, and a step of Newton's.
  [[maybe_unused]] const auto refine = [v](V y) { return y * (A(3) - (v * y) * y); };
  if constexpr (std::is_same_v<A, float>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return refine(estimated_inverse_sqrt(v));
#endif
#if defined(__AVX__)
    if constexpr (N == 8) return refine(bit_copy<V>(_mm256_rsqrt_ps(bit_copy<__m256>(v))));
#endif
#if defined(__x86_64__)
    if constexpr (N == 4) return refine(bit_copy<V>(_mm_rsqrt_ps(bit_copy<__m128>(v))));
#endif
#if defined(__aarch64__)
    if constexpr (N == 4) return refine(A(0.5) * refine(bit_copy<V>(vrsqrteq_f32(bit_copy<float32x4_t>(v)))));
#endif
  }
  V y;
  for (int i = 0; i < N; ++i) y[i] = A(2) / std::sqrt(v[i]);
  return y;
}
// Unless kRefined, 14 bits of it are enough.
template <bool kRefined = true, typename V>
inline V inverse_sqrt(V v) {
#if defined(__AVX512F__)
  if constexpr (!kRefined && std::is_same_v<V, Vec<float, 16>>) return estimated_inverse_sqrt(with_inverse_sqrt(v));
#endif
  return std::remove_cvref_t<decltype(v[0])>(0.5) * twice_inverse_sqrt(v);
}
template <typename V>
inline V square_root(V v) {
  return v * inverse_sqrt(v);
}

#include "../update_rules.h"

// The random bits of the places i, i + 1, ... of a row.
template <int N>
inline Vec<uint32_t, N> random_bits(const Rounding& rounding, int64_t i) {
  constexpr auto kLane = []<int... I>(std::integer_sequence<int, I...>) {
    return Vec<uint32_t, N>{(I * Rounding::kSpread)...};
  }(std::make_integer_sequence<int, N>{});
  return rounding.random_bits(Vec<uint32_t, N>(kLane + static_cast<uint32_t>(i) * Rounding::kSpread));
}

template <int N>
inline Vec<uint32_t, N> round_at_random(Vec<float, N> v, Vec<uint32_t, N> random) {
#if defined(__AVX512DQ__)
  if constexpr (N == 16) {
    // What is added to an infinity does not reach its upper half.
    const __m512 x = bit_copy<__m512>(v);
    const __m512i bits = bit_copy<__m512i>(v);
    const __mmask16 is_number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    return bit_copy<Vec<uint32_t, N>>(_mm512_mask_add_epi32(bits, is_number, bits, bit_copy<__m512i>(random)));
  }
#endif
  return round_at_random(bit_copy<Vec<uint32_t, N>>(v), random);
}

// weight[row] moves against the gradient x * d at its elements [begin, begin + n); d[0] is that of the first.
template <typename T>
using UpdateRow = void (*)(const UpdatedTable&, const Optimizer&, int64_t row, Sum<T> x, const Sum<T>* d, int64_t begin,
                           int64_t n);

// Stores a part of R registers, n weights; the registers begin at place i of their row. A random number serves two
// registers.
template <int N, Part kPart = Part::kFirst, typename T, int R>
__attribute__((always_inline)) inline void store_weights(T* p, const Vec<Sum<T>, N> (&w)[R], Rounding rounding,
                                                         int64_t i, int64_t n) {
  // Of `count` elements from register r on.
  const auto meant = [n](int r, int count) {
    return within(kPart == Part::kLast ? n - (R - r) * N + count : n - r * N, count);
  };
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (rounding.is_stochastic()) {
      constexpr int kTogether = R > 1 ? 2 : 1, kCount = N * kTogether;
      for (int r = 0; r < R; r += kTogether) {
        const Vec<uint32_t, N> random = random_bits<N>(rounding, i + r * N);
        const auto low = bit_copy<Vec<uint16_t, 2 * N>>(round_at_random<N>(w[r], random >> 16));
        const auto high = bit_copy<Vec<uint16_t, 2 * N>>(round_at_random<N>(w[r + kTogether - 1], random & 0xffffu));
        const auto bits = [&]<int... I>(std::integer_sequence<int, I...>) {
          return Vec<uint16_t, kCount>(__builtin_shufflevector(low, high, (2 * I + 1)...));
        }(std::make_integer_sequence<int, kCount>{});
        store_part_bits<kCount, kPart, uint16_t>(p + r * N, bits, meant(r, kCount));
      }
      return;
    }
  }
  for (int r = 0; r < R; ++r) store_part<N, kPart>(p + r * N, w[r], meant(r, N));
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
    store_weights<N>(weight + i, {w}, rounding, begin + i, N);
    if constexpr (Rule<A>::kStates > 0) store<N>(first + i, s0);
    if constexpr (Rule<A>::kStates > 1) store<N>(second + i, s1);
  });
}

// Sums over K-vectors that lie end to end in R registers, each in K / R lanes of one register: the lane i has that of
// the vector i / (K / R). Pairs of registers are folded into one, so that a sum costs a few instructions a register. P:
// in how many lanes a vector lies in x.
template <typename A, int N, int P, int R>
__attribute__((always_inline)) inline Vec<A, N> sum_vectors(const Vec<A, N> (&x)[R]) {
  constexpr auto kAll = std::make_integer_sequence<int, N>{};
  if constexpr (R > 1) {
    Vec<A, N> folded[R / 2];
    for (int r = 0; r < R / 2; ++r) {
      const Vec<A, N> low = x[2 * r], high = x[2 * r + 1];
      if constexpr (P >= 2 * N) {
        folded[r] = low + high;
      } else {
        [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
          constexpr int kHalf = P / 2;
          folded[r] = __builtin_shufflevector(low, high, (I / kHalf * P + I % kHalf)...) +
                      __builtin_shufflevector(low, high, (I / kHalf * P + I % kHalf + kHalf)...);
        }(kAll);
      }
    }
    return sum_vectors<A, N, P / 2>(folded);
  } else {
    Vec<A, N> sums = x[0];
    const auto add_lanes =
        [&]<int kStep, int... I>(std::integer_sequence<int, kStep>, std::integer_sequence<int, I...>)
            __attribute__((always_inline)) { sums += __builtin_shufflevector(sums, sums, (I ^ kStep)...); };
    if constexpr (P > 1) add_lanes(std::integer_sequence<int, 1>{}, kAll);
    if constexpr (P > 2) add_lanes(std::integer_sequence<int, 2>{}, kAll);
    if constexpr (P > 4) add_lanes(std::integer_sequence<int, 4>{}, kAll);
    if constexpr (P > 8) add_lanes(std::integer_sequence<int, 8>{}, kAll);
    return sums;
  }
}

// AdaGrad with one sum for each K-vector: that of the mean of g^2 over its K elements. For n <= R * N elements, whose
// sums are in one register, where one inverse root serves them all. kLast: what lies before them is read too, and left
// as it is.
template <typename T, int K, int R, Part kPart>
__attribute__((always_inline)) inline void update_vectors(T* weight, Sum<T>* sums, Sgd<Sum<T>> rates, Rounding rounding,
                                                          Sum<T> x, const Sum<T>* d, int64_t begin, int64_t n) {
  using A = Sum<T>;
  constexpr int N = kLanes<A>, kCopies = K / R;
  constexpr auto kAll = std::make_integer_sequence<int, N>{};
  Vec<A, N> w[R], g[R], squares[R];
  for (int r = 0; r < R; ++r) {
    const int64_t count = kPart == Part::kFirst ? within(n - r * N, N) : N;
    w[r] = load_first<N>(weight + r * N, count);
    g[r] = x * load_first<N>(d + r * N, count) + rates.weight_decay * w[r];
    squares[r] = g[r] * g[r];
  }
  Vec<A, N> sum = sum_vectors<A, N, K>(squares) * (A(1) / K);
  if (kPart == Part::kAll) n = N * R;
  constexpr int kSums = N / kCopies;
  const Vec<A, kSums> before = load_first<kSums>(sums, kPart == Part::kFirst ? n / K : kSums);
  [&]<int... I>(std::integer_sequence<int, I...>)
      __attribute__((always_inline)) { sum += __builtin_shufflevector(before, before, (I / kCopies)...); }(kAll);
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    const Vec<A, kSums> after = __builtin_shufflevector(sum, sum, (I * kCopies)...);
    store_part<kSums, kPart>(sums, after, n / K);
  }(std::make_integer_sequence<int, kSums>{});
  const Vec<A, N> rate = rates.lr * inverse_sqrt(sum);
  [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
    const auto move = [&]<int r, int... I>(std::integer_sequence<int, r>, std::integer_sequence<int, I...>)
                          __attribute__((always_inline)) {
                            w[r] -= g[r] * __builtin_shufflevector(rate, rate, ((N * r + I) / K * kCopies)...);
                          };
    (move(std::integer_sequence<int, J>{}, kAll), ...);
  }(std::make_integer_sequence<int, R>{});
  store_weights<N, kPart>(weight, w, rounding, begin, n);
}

template <typename T>
void update_row_vector_wise(const UpdatedTable& table, const Optimizer& o, int64_t row, Sum<T> x, const Sum<T>* d,
                            int64_t begin, int64_t n) {
  using A = Sum<T>;
  const Rounding rounding(o, row);
  T* const weight = static_cast<T*>(table.weight) + row * table.row_size + begin;
  A* const sums = static_cast<A*>(table.states[0]) + row * table.state_row_size + begin / table.embed_dim;
  const Sgd<A> rates(o);
  const auto with_constant = [=](auto embed_dim) __attribute__((always_inline)) {
    constexpr int K = embed_dim(), kMost = std::max(4, K / kLanes<A>), kFew = std::max(1, K / kLanes<A>);
    int64_t i = 0;
    const auto update = [&](auto registers, auto part, int64_t from, int64_t count) __attribute__((always_inline)) {
      update_vectors<T, K, registers(), part()>(weight + from, sums + from / K, rates, rounding, x, d + from,
                                                begin + from, count);
    };
    constexpr int kWhole = kMost * kLanes<A>;
    constexpr std::integral_constant<int, kMost> most;
    for (; i + kWhole <= n; i += kWhole) update(most, std::integral_constant<Part, Part::kAll>{}, i, kWhole);
    // The rest, from before where it can be: what a register reads behind the row is another row, which nobody has
    // asked for.
    const auto update_rest = [&](auto registers) __attribute__((always_inline)) {
      constexpr int kCount = registers() * kLanes<A>;
      if (n >= kCount) {
        update(registers, std::integral_constant<Part, Part::kLast>{}, n - kCount, n - i);
      } else {
        update(registers, std::integral_constant<Part, Part::kFirst>{}, i, n - i);
      }
    };
    constexpr bool has_fewer = kMost / 2 >= kFew;
    if (n - i > kWhole / 2 || (!has_fewer && n > i)) {
      update_rest(most);
    } else if constexpr (has_fewer) {
      if (n > i) update_rest(std::integral_constant<int, kMost / 2>{});
    }
  };
  const auto of_any = [&](int64_t K) {
    for (int64_t i = 0; i < n; i += K) {
      const auto gradient = [&](int64_t k) { return x * d[i + k] + rates.weight_decay * load(weight + i + k); };
      A squares = 0;
      for (int64_t k = 0; k < K; ++k) squares += gradient(k) * gradient(k);
      A& sum = sums[i / K];
      sum += squares / static_cast<A>(K);
      const A rate = rates.lr * inverse_sqrt(Vec<A, 2>{sum})[0];
      for (int64_t k = 0; k < K; ++k) {
        store_weights<1>(weight + i + k, {Vec<A, 1>{load(weight + i + k) - rate * gradient(k)}}, rounding,
                         begin + i + k, 1);
      }
    }
  };
  dispatch_embed_dim(table.embed_dim, [&](auto K) {
    if constexpr (K() == 0) {
      of_any(table.embed_dim);
    } else {
      with_constant(K);
    }
  });
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
