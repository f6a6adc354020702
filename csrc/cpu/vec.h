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

#if defined(__AVX512F__)
// Masks for intrinsics whose unmasked form has an operand that GCC 12 warns is undefined.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

template <typename T, int N>
inline Vec<Sum<T>, N> widen(Vec<Bits<T>, N> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__AVX512F__)
    // GCC 12 takes the conversion of 16 apart.
    if constexpr (N == 16) {
      const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllLanes, bit_copy<__m256i>(v));
      return bit_copy<Vec<float, N>>(bit_copy<Vec<uint32_t, N>>(wide) << 16);
    }
#endif
    return bit_copy<Vec<float, N>>(__builtin_convertvector(v, Vec<uint32_t, N>) << 16);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bit_copy<Vec<float, N>>(_mm512_maskz_cvtph_ps(kAllLanes, bit_copy<__m256i>(v)));
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

// float32 -> bfloat16, to nearest even, in the upper half of each word.
// A NaN keeps its bits: that of a sum or product has its highest mantissa bit set, and stays a NaN.
template <int N>
inline Vec<uint32_t, N> round_bfloat16(Vec<float, N> v) {
#if defined(__AVX512BW__)
  if constexpr (N == 16) {
    const __m512 x = bit_copy<__m512>(v);
    const __m512i bits = bit_copy<__m512i>(v);
    const __mmask16 is_number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q);
    const __mmask16 is_odd = _mm512_mask_test_epi32_mask(is_number, bits, _mm512_set1_epi32(0x10000));
    const __m512i half_up = _mm512_mask_add_epi32(bits, is_number, bits, _mm512_set1_epi32(0x7fff));
    return bit_copy<Vec<uint32_t, N>>(_mm512_mask_sub_epi32(half_up, is_odd, half_up, _mm512_set1_epi32(-1)));
  }
#endif
  const Vec<uint32_t, N> bits = bit_copy<Vec<uint32_t, N>>(v), is_number = bit_copy<Vec<uint32_t, N>>(v == v);
  return bits + (is_number & (0x7fffu + (bits >> 16 & 1)));
}

template <typename T, int N>
inline Vec<Bits<T>, N> narrow(Vec<Sum<T>, N> v) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const Vec<uint32_t, N> rounded = round_bfloat16<N>(v);
#if defined(__AVX512BW__)
    if constexpr (N == 16) {
      const auto halves = bit_copy<Vec<uint16_t, 32>>(rounded);
      return __builtin_shufflevector(halves, halves, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
#endif
    return __builtin_convertvector(rounded >> 16, Vec<uint16_t, N>);
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__AVX512F__)
    if constexpr (N == 16) return bit_copy<Vec<uint16_t, N>>(_mm512_maskz_cvtps_ph(kAllLanes, bit_copy<__m512>(v), 0));
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

// Stores past the caches, where the CPU can: for what is not read again soon. p is a multiple of the size of v. Other
// threads see it after fence_streams.
template <int N, typename T>
inline void stream(T* p, Vec<Sum<T>, N> v) {
  const Vec<Bits<T>, N> bits = narrow<T, N>(v);
#if defined(__AVX512F__)
  if constexpr (sizeof(bits) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_copy<__m512i>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(bits) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_copy<__m256i>(bits));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(bits) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_copy<__m128i>(bits));
  if constexpr (sizeof(bits) == 8) return _mm_stream_si64(reinterpret_cast<long long*>(p), bit_copy<long long>(bits));
  if constexpr (sizeof(bits) == 4) return _mm_stream_si32(reinterpret_cast<int*>(p), bit_copy<int>(bits));
#endif
  __builtin_memcpy(p, &bits, sizeof(bits));
}
inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
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

// The first n <= N elements at p, and zeros; nothing behind them is read.
template <int N, typename T>
inline Vec<Bits<T>, N> load_first_bits(const T* p, int64_t n) {
  using V = Vec<Bits<T>, N>;
  if (__builtin_constant_p(n) && n == N) return load_bits<N>(p);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  const uint64_t mask = (uint64_t{1} << n) - 1;
  if constexpr (sizeof(T) == 2 && N == 8) return bit_copy<V>(_mm_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 2 && N == 16) return bit_copy<V>(_mm256_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 2 && N == 32) return bit_copy<V>(_mm512_maskz_loadu_epi16(mask, p));
  if constexpr (sizeof(T) == 4 && N == 4) return bit_copy<V>(_mm_maskz_loadu_epi32(mask, p));
  if constexpr (sizeof(T) == 4 && N == 8) return bit_copy<V>(_mm256_maskz_loadu_epi32(mask, p));
  if constexpr (sizeof(T) == 4 && N == 16) return bit_copy<V>(_mm512_maskz_loadu_epi32(mask, p));
  if constexpr (sizeof(T) == 8 && N == 4) return bit_copy<V>(_mm256_maskz_loadu_epi64(mask, p));
  if constexpr (sizeof(T) == 8 && N == 8) return bit_copy<V>(_mm512_maskz_loadu_epi64(mask, p));
#elif defined(__AVX2__)
  const auto mask = [n]<int... I>(std::integer_sequence<int, I...>) {
    return Vec<int32_t, N>{I...} < static_cast<int32_t>(n);
  }(std::make_integer_sequence<int, N>{});
  const int* const words = reinterpret_cast<const int*>(p);
  if constexpr (sizeof(T) == 4 && N == 4) return bit_copy<V>(_mm_maskload_epi32(words, bit_copy<__m128i>(mask)));
  if constexpr (sizeof(T) == 4 && N == 8) return bit_copy<V>(_mm256_maskload_epi32(words, bit_copy<__m256i>(mask)));
#endif
  if constexpr (N == 1) {
    return n ? load_bits<1>(p) : V{};
  } else {
    constexpr int kHalf = N / 2;
    constexpr auto kAll = std::make_integer_sequence<int, N>{};
    if (n <= kHalf) return concat<Bits<T>, kHalf>(load_first_bits<kHalf>(p, n), Vec<Bits<T>, kHalf>{}, kAll);
    return concat<Bits<T>, kHalf>(load_bits<kHalf>(p), load_first_bits<kHalf>(p + kHalf, n - kHalf), kAll);
  }
}
template <int N, typename T>
inline Vec<Sum<T>, N> load_first(const T* p, int64_t n) {
  return widen<T, N>(load_first_bits<N>(p, n));
}

// n, brought into [0, most]. Not std::clamp: GCC may leave that a function, for the linker to take from another ISA.
inline int64_t within(int64_t n, int64_t most) { return n < 0 ? 0 : n < most ? n : most; }

// The number of a lane's run, where runs of kRun lanes lie side by side.
template <typename Lane, int N, int kRun>
inline Vec<Lane, N> run_of_lane() {
  return []<int... I>(std::integer_sequence<int, I...>) {
    return Vec<Lane, N>{(I / kRun)...};
  }(std::make_integer_sequence<int, N>{});
}

// Which elements of some registers are meant.
enum class Part { kAll, kFirst, kLast };

// Stores that part of a register, n <= N elements; p is where its first element would go. In pieces of a power of two:
// some CPUs are slow with masks.
template <int N, Part kPart, typename B, typename T>
inline void store_part_bits(T* p, Vec<B, N> v, int64_t n) {
  if (n == N) {
    __builtin_memcpy(p, &v, sizeof(v));
    return;
  }
  if constexpr (N > 1) {
    constexpr int kHalf = N / 2, kNear = kPart == Part::kLast ? kHalf : 0, kFar = kHalf - kNear;
    const auto half = [&]<int... I>(std::integer_sequence<int, I...>, auto from) {
      return Vec<B, kHalf>(__builtin_shufflevector(v, v, (I + from())...));
    };
    constexpr auto kLanesOfHalf = std::make_integer_sequence<int, kHalf>{};
    Vec<B, kHalf> rest = half(kLanesOfHalf, std::integral_constant<int, kNear>{});
    T* to = p + kNear;
    if (n >= kHalf) {
      __builtin_memcpy(to, &rest, sizeof(rest));
      rest = half(kLanesOfHalf, std::integral_constant<int, kFar>{});
      to = p + kFar;
      n -= kHalf;
    }
    if (n > 0) store_part_bits<kHalf, kPart, B>(to, rest, n);
  }
}
template <int N, Part kPart, typename T>
inline void store_part(T* p, Vec<Sum<T>, N> v, int64_t n) {
  store_part_bits<N, kPart, Bits<T>>(p, narrow<T, N>(v), n);
}

// A square of pieces of N elements, a row a vector: exchanges rows and columns, by halves of ever larger squares.
template <int N, int kSpan = 1, typename V, int Rows>
__attribute__((always_inline)) inline void transpose_halves(V (&rows)[Rows]) {
  if constexpr (kSpan < Rows) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      for (int r = 0; r < Rows; ++r) {
        if (r & kSpan) continue;
        const V a = rows[r], b = rows[r + kSpan];
        rows[r] = __builtin_shufflevector(a, b, (I / N & kSpan ? I - kSpan * N + Rows * N : I)...);
        rows[r + kSpan] = __builtin_shufflevector(a, b, (I / N & kSpan ? I + Rows * N : I + kSpan * N)...);
      }
    }(std::make_integer_sequence<int, Rows * N>{});
    transpose_halves<N, 2 * kSpan>(rows);
  }
}
// The column kColumn of such a square, from the piece kPiece on; what comes behind the last piece stays as it is.
template <int N, int kColumn, int kPiece = 1, typename V, int Rows>
__attribute__((always_inline)) inline V column_of(const V (&rows)[Rows], V column) {
  if constexpr (kPiece == Rows) {
    return column;
  } else {
    constexpr int kLength = sizeof(V) / sizeof(column[0]);
    column = [&]<int... I>(std::integer_sequence<int, I...>) {
      return __builtin_shufflevector(column, rows[kPiece],
                                     (I / N == kPiece        ? kLength + kColumn * N + I % N
                                      : kPiece == 1 && I < N ? kColumn * N + I
                                                             : I)...);
    }(std::make_integer_sequence<int, kLength>{});
    return column_of<N, kColumn, kPiece + 1>(rows, column);
  }
}
template <int N, typename V, int Rows>
__attribute__((always_inline)) inline void transpose(V (&rows)[Rows]) {
  if constexpr (sizeof(rows[0][0]) == 2 && N % 2 == 0) {
    // Larger pieces are cheaper to move.
    Vec<uint32_t, sizeof(V) / 4> words[Rows];
    __builtin_memcpy(&words, &rows, sizeof(rows));
    transpose<N / 2>(words);
    __builtin_memcpy(&rows, &words, sizeof(rows));
  } else if constexpr (Rows * N == sizeof(V) / sizeof(rows[0][0])) {
    transpose_halves<N>(rows);
  } else {
    [&]<int... R>(std::integer_sequence<int, R...>) {
      const V columns[] = {column_of<N, R>(rows, rows[0])...};
      ((rows[R] = columns[R]), ...);
    }(std::make_integer_sequence<int, Rows>{});
  }
}

template <typename A, int N>
inline A sum(Vec<A, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else if constexpr (N == 2) {
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

// bfloat16 numbers at even places and those at odd ones, as floats: a pair of bfloat16 is 32 bits, and its halves are
// floats by a shift and by a mask.
template <typename Floats>
struct Halves {
  Floats even, odd;
};
template <typename Bits16>
inline auto halves_of_bfloat16(Bits16 v) {
  using Words = Vec<uint32_t, sizeof(v) / 4>;
  using Floats = Vec<float, sizeof(v) / 4>;
  return Halves<Floats>{bit_copy<Floats>(bit_copy<Words>(v) << 16), bit_copy<Floats>(bit_copy<Words>(v) & 0xffff0000u)};
}
// sums + the products of a and b, those of two neighbours into one sum.
template <typename Floats, typename Bits16>
inline Floats add_bfloat16_products(Floats sums, Bits16 a, Bits16 b) {
  const auto left = halves_of_bfloat16(a), right = halves_of_bfloat16(b);
  return sums + left.even * right.even + left.odd * right.odd;
}

// dst = x * src
template <typename To, typename From>
inline void scale_into(To* dst, Sum<To> x, const From* src, int64_t n) {
  constexpr int L = kLanes<Sum<To>>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store<L>(dst + i, x * load<L>(src + i));
  // As a register, for to narrow a number takes as long.
  if (i < n) store_part<L, Part::kFirst>(dst + i, x * load_first<L>(src + i, n - i), n - i);
}

// Cuts n elements at p into registers that begin at a multiple of their size, and smaller pieces, of a power of two,
// before and behind them: no access to a piece touches two cache lines. Calls fn(its size as a constant, where it
// begins).
template <int L, typename T, typename Fn>
__attribute__((always_inline)) inline void for_aligned(const T* p, int64_t n, const Fn& fn) {
  int64_t i = 0;
  const auto piece = [&](auto size) __attribute__((always_inline)) {
    fn(size, i);
    i += size();
  };
  const auto before = [&](auto size) __attribute__((always_inline)) {
    const bool ends_on_multiple = reinterpret_cast<uintptr_t>(p + i) % (2 * size() * sizeof(T)) != 0;
    if (ends_on_multiple && i + size() <= n) piece(size);
  };
  const auto behind = [&](auto size) __attribute__((always_inline)) {
    if (i + size() <= n) piece(size);
  };
  constexpr int kPowers = std::countr_zero(static_cast<unsigned>(L));
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (before(std::integral_constant<int, (1 << I)>{}), ...);
    while (i + L <= n) piece(std::integral_constant<int, L>{});
    (behind(std::integral_constant<int, (L / 2 >> I)>{}), ...);
  }(std::make_integer_sequence<int, kPowers>{});
}

// dst = x * src, past the caches
template <typename To, typename From>
inline void stream_into(To* dst, Sum<To> x, const From* src, int64_t n) {
  for_aligned<kLanes<Sum<To>>>(dst, n,
                               [&](auto size, int64_t i) { stream<size()>(dst + i, x * load<size()>(src + i)); });
}

// dst += x * src, in pieces of src, not of dst: src was often stored just now, and a load across two stores would wait
// for both.
template <typename A, typename From>
inline void add_scaled(A* dst, A x, const From* src, int64_t n) {
  for_aligned<kLanes<A>>(
      src, n, [&](auto size, int64_t i) { store<size()>(dst + i, load<size()>(dst + i) + x * load<size()>(src + i)); });
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

// Asks for a cache line: into the second level, since the first has no room for two samples.
// Inlined by force: GCC takes a function that does nothing else for one without effect, and drops its calls.
__attribute__((always_inline)) inline void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// Asks for the cache lines of n elements. As many requests for every row, wherever it begins, so that the end of the
// loop is foreseen; the last may ask twice.
template <typename T>
__attribute__((always_inline)) inline void prefetch(const T* p, int64_t n) {
  const char* const first = reinterpret_cast<const char*>(p);
  const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < bytes; i += kCacheLine) prefetch_line(first + i);
  prefetch_line(first + bytes - 1);
}
