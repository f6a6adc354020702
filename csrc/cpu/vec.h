// SPDX-License-Identifier: MIT
// SIMD in the compiler's own vector types: one source, as many lanes as the flags of this build allow. Included by
// kernel files alone, inside the namespace of their ISA, so that no function of one ISA can be linked into another.

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif
constexpr int kCacheLine = 64;

template <typename A>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(A));

template <typename A, int N>
struct VecType {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
};
template <typename A, int N>
using Vec = typename VecType<A, N>::type;

template <int N, typename A>
inline Vec<A, N> load(const A* p) {
  Vec<A, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int N, typename A>
inline void store(A* p, Vec<A, N> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename A, int N, int... I>
inline Vec<A, 2 * N> concat(Vec<A, N> low, Vec<A, N> high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, I...);
}

// N elements from each of the `Rows` rows, at the same column, side by side.
template <int N, int Rows, typename A>
inline Vec<A, N * Rows> load_column(const A* const* rows, int64_t column) {
  if constexpr (Rows == 1) {
    return load<N>(rows[0] + column);
  } else {
    constexpr int kHalf = N * Rows / 2;
    return concat<A, kHalf>(load_column<N, Rows / 2>(rows, column), load_column<N, Rows / 2>(rows + Rows / 2, column),
                            std::make_integer_sequence<int, 2 * kHalf>{});
  }
}

template <typename A, int N>
inline A sum(Vec<A, N> v) {
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    constexpr int kHalf = N / 2;
    auto low = [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(v, v, I...);
    }(std::make_integer_sequence<int, kHalf>{});
    auto high = [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(v, v, (I + kHalf)...);
    }(std::make_integer_sequence<int, kHalf>{});
    return sum<A, kHalf>(low + high);
  }
}

// The three loops over n contiguous elements that everything but the pairs is made of.

// dst = x * src
template <typename A>
inline void scale_into(A* dst, A x, const A* src, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(dst + i, x * load<L>(src + i));
  for (; i < n; ++i) dst[i] = x * src[i];
}

// dst += x * src
template <typename A>
inline void add_scaled(A* dst, A x, const A* src, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(dst + i, load<L>(dst + i) + x * load<L>(src + i));
  for (; i < n; ++i) dst[i] += x * src[i];
}

template <typename A>
inline A dot(const A* a, const A* b, int64_t n) {
  constexpr int L = kLanes<A>;
  Vec<A, L> wide = {};
  A narrow = 0;
  int64_t i = 0;
  for (; i + L <= n; i += L) wide += load<L>(a + i) * load<L>(b + i);
  for (; i < n; ++i) narrow += a[i] * b[i];
  return sum<A, L>(wide) + narrow;
}

// Asks for the cache lines of n elements.
template <typename A>
inline void prefetch(const A* p, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(A)); i += kCacheLine) __builtin_prefetch(bytes + i);
}
