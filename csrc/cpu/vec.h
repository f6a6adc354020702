// SPDX-License-Identifier: MIT
// SIMD in the compiler's own vector types: one source, as many lanes as the flags of this build allow. Included by
// kernel files alone, inside the namespace of their ISA, so that no function of one ISA can be linked into another.
//
// A table holds a storage type T; arithmetic is done in Sum<T>. Loads widen, stores round to nearest even.

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

// What an element is in memory, and what sums of it are kept in.
template <typename T>
struct Element {
  using bits_t = T;
  using sum_t = T;
};
template <>
struct Element<BFloat16> {
  using bits_t = uint16_t;
  using sum_t = float;
};
template <>
struct Element<Float16> {
  using bits_t = uint16_t;
  using sum_t = float;
};
template <typename T>
using Bits = typename Element<T>::bits_t;
template <typename T>
using Sum = typename Element<T>::sum_t;
template <typename T>
constexpr bool kIsNarrow = !std::is_same_v<T, Sum<T>>;

template <typename V, typename U>
inline V bit_copy(const U& from) {
  static_assert(sizeof(V) == sizeof(U));
  V to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// One float16 <-> float32: an instruction of every AArch64 CPU, elsewhere arithmetic.
#if defined(__aarch64__)
inline float widen_float16(uint16_t h) { return bit_copy<__fp16>(h); }
inline uint16_t narrow_float16(float f) { return bit_copy<uint16_t>(static_cast<__fp16>(f)); }
#else
inline float widen_float16(uint16_t h) {
  // Exponent and mantissa moved into place are the number times 2^-112; infinities and NaNs keep the highest exponent.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  float f = bit_copy<float>(magnitude) * 0x1p112f;
  if ((h & 0x7c00) == 0x7c00) f = bit_copy<float>(magnitude | 0x7f800000u);
  return bit_copy<float>(bit_copy<uint32_t>(f) | static_cast<uint32_t>(h & 0x8000) << 16);
}
inline uint16_t narrow_float16(float f) {
  const uint32_t bits = bit_copy<uint32_t>(f), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // rounds past the largest, 65504
  if (magnitude < 0x38800000u) {
    // Below the smallest normal number the steps are 2^-24: adding 2^-1 leaves them as the float's last bits, rounded.
    return sign | static_cast<uint16_t>(bit_copy<uint32_t>(bit_copy<float>(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}
#endif

template <typename T, int N>
inline Vec<Sum<T>, N> widen(Vec<Bits<T>, N> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_copy<Vec<float, N>>(__builtin_convertvector(v, Vec<uint32_t, N>) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bit_copy<Vec<float, N>>(_mm512_cvtph_ps(bit_copy<__m256i>(v)));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bit_copy<Vec<float, N>>(_mm256_cvtph_ps(bit_copy<__m128i>(v)));
    if constexpr (N == 4) return bit_copy<Vec<float, N>>(_mm_cvtph_ps(_mm_cvtsi64_si128(bit_copy<int64_t>(v))));
#endif
#if defined(__aarch64__)
    if constexpr (N == 4) return bit_copy<Vec<float, N>>(vcvt_f32_f16(bit_copy<float16x4_t>(v)));
#endif
    Vec<float, N> wide;
    for (int i = 0; i < N; ++i) wide[i] = widen_float16(v[i]);
    return wide;
  } else {
    return v;
  }
}

template <typename T, int N>
inline Vec<Bits<T>, N> narrow(Vec<Sum<T>, N> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Vec<uint32_t, N> bits = bit_copy<Vec<uint32_t, N>>(v);
    const Vec<uint32_t, N> rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    const Vec<uint32_t, N> nan = bits >> 16 | 0x40u;  // rounding could turn a NaN into an infinity
    return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Vec<uint16_t, N>);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bit_copy<Vec<uint16_t, N>>(_mm512_cvtps_ph(bit_copy<__m512>(v), 0));
#endif
#if defined(__F16C__)
    if constexpr (N == 8) return bit_copy<Vec<uint16_t, N>>(_mm256_cvtps_ph(bit_copy<__m256>(v), 0));
#endif
#if defined(__aarch64__)
    if constexpr (N == 4) return bit_copy<Vec<uint16_t, N>>(vcvt_f16_f32(bit_copy<float32x4_t>(v)));
#endif
    Vec<uint16_t, N> bits;
    for (int i = 0; i < N; ++i) bits[i] = narrow_float16(v[i]);
    return bits;
  } else {
    return v;
  }
}

template <int N, typename T>
inline Vec<Bits<T>, N> load_bits(const T* p) {
  Vec<Bits<T>, N> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <int N, typename T>
inline Vec<Sum<T>, N> load(const T* p) {
  return widen<T, N>(load_bits<N>(p));
}

template <int N, typename T>
inline void store(T* p, Vec<Sum<T>, N> v) {
  const Vec<Bits<T>, N> bits = narrow<T, N>(v);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

template <typename T>
inline Sum<T> load(const T* p) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return bit_copy<float>(static_cast<uint32_t>(p->bits) << 16);
  else if constexpr (std::is_same_v<T, Float16>)
    return widen_float16(p->bits);
  else
    return *p;
}

template <typename T>
inline void store(T* p, Sum<T> x) {
  if constexpr (kIsNarrow<T>) {
    const Vec<Bits<T>, 2> bits = narrow<T, 2>(Vec<Sum<T>, 2>{x, x});
    p->bits = bits[0];
  } else {
    *p = x;
  }
}

template <typename B, int N, int... I>
inline Vec<B, 2 * N> concat(Vec<B, N> low, Vec<B, N> high, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(low, high, I...);
}

// N elements from each of the `Rows` rows, at the same column, side by side; joined before they are widened.
template <int N, int Rows, typename T>
inline Vec<Bits<T>, N * Rows> load_column_bits(const T* const* rows, int64_t column) {
  if constexpr (Rows == 1) {
    return load_bits<N>(rows[0] + column);
  } else {
    constexpr int kHalf = N * Rows / 2;
    return concat<Bits<T>, kHalf>(load_column_bits<N, Rows / 2>(rows, column),
                                  load_column_bits<N, Rows / 2>(rows + Rows / 2, column),
                                  std::make_integer_sequence<int, 2 * kHalf>{});
  }
}
template <int N, int Rows, typename T>
inline Vec<Sum<T>, N * Rows> load_column(const T* const* rows, int64_t column) {
  return widen<T, N * Rows>(load_column_bits<N, Rows>(rows, column));
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

// The loops over n contiguous elements that everything but the pairs is made of.

// dst = x * src
template <typename To, typename From>
inline void scale_into(To* dst, Sum<To> x, const From* src, int64_t n) {
  constexpr int L = kLanes<Sum<To>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(dst + i, x * load<L>(src + i));
  for (; i < n; ++i) store(dst + i, x * load(src + i));
}

// dst += x * src
template <typename A, typename From>
inline void add_scaled(A* dst, A x, const From* src, int64_t n) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(dst + i, load<L>(dst + i) + x * load<L>(src + i));
  for (; i < n; ++i) dst[i] += x * load(src + i);
}

template <typename T, typename A>
inline A dot(const T* a, const A* b, int64_t n) {
  constexpr int L = kLanes<A>;
  Vec<A, L> wide = {};
  A rest = 0;
  int64_t i = 0;
  for (; i + L <= n; i += L) wide += load<L>(a + i) * load<L>(b + i);
  for (; i < n; ++i) rest += load(a + i) * b[i];
  return sum<A, L>(wide) + rest;
}

// Asks for the cache lines of n elements: into the second level, since the first has no room for two samples.
template <typename T>
inline void prefetch(const T* p, int64_t n) {
  const char* bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += kCacheLine) __builtin_prefetch(bytes + i, 0, 2);
}
