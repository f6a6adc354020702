// SPDX-License-Identifier: MIT
// The update of a sample, pair by pair. Included after vec.h and update_rules.h, inside the namespace of an ISA.
//
// A pair of entries reads and moves two K-vectors, and no other pair of the sample reads or moves them, as long as
// every field has one entry at most and no row comes twice. So the pairs of a few fields with a few others are met at
// once, and what they need of the table is read, moved and stored in registers: no gradient is kept anywhere.
#pragma once

#include "pair_sum.h"

// Entries of a sample as they are learnt: an array for each thing that they have, so that it is made of all at once.
template <typename T>
struct LearntEntries {
  using A = Sum<T>;

  LearntEntries(int64_t n, Arena& arena)
      : weight(arena.take<T*>(n)),
        states{arena.take<A*>(n), arena.take<A*>(n)},
        x(arena.take<A>(n)),
        slope(arena.take<A>(n)),
        key(arena.take<uint32_t>(n)),
        even_key(arena.take<uint32_t>(n)),
        odd_key(arena.take<uint32_t>(n)) {}

  Rounding rounding(int64_t e) const { return {is_stochastic, key[e]}; }

  T** weight;  // their rows
  A** states[2];
  A* x;
  A* slope;       // dL/dt r x: of their own gradients, what all partners have in common
  uint32_t* key;  // of their rounding; and its halves
  uint32_t *even_key, *odd_key;
  bool is_stochastic = false;
};

// The random bits of the places of any row, without a row's key (see Rounding). A place serves two numbers that lie
// side by side: the upper half of its bits the one at the even place, the lower half the one at the odd place.
struct PlaceBits {
  static int64_t size(const Problem& p) { return p.row_size() + kLanes<uint32_t>; }
  void fill(const Problem& p) const {
    for (int64_t i = 0; i < size(p); ++i) {
      const uint32_t bits = Rounding::bits_of_place(static_cast<uint32_t>(i) * Rounding::kSpread);
      even[i] = bits >> 16;
      odd[i] = bits & 0xffffu;
    }
  }
  uint32_t *even, *odd;
};

// In place of the x of entries that are all 1: their slopes are one number, `slope` below.
struct NoScale {};

// What an optimizer does with K-vectors that lie in registers is a class of its own, with
//   kElements       the numbers of a row that fill one of its registers,
//   kVectorLanes    how many lanes of a register of sums a K-vector takes,
//   takes(NoScale)  whether NoScale will do; if not, ones are given,
//   move_registers  moves R rows of registers, weights at the places [i, i + kElements) of their rows, against the
//                   gradients slope * scale * partners, where wide_scale[i] is that of the partner at place i,
//   move_vector     moves one K-vector at place i against a gradient in memory.
// moves(r) masks the lanes of row r that may move; the others keep their weights and states.

// yes or no, by masks of all bits or none: a mask that was a vector is not made one of bits first.
template <typename Mask, typename V>
inline V select(Mask mask, V yes, V no) {
  return bit_copy<V>((bit_copy<Mask>(yes) & mask) | (bit_copy<Mask>(no) & ~mask));
}

// Optimizers whose elements do not know of each other.
template <typename T, template <typename> typename Rule, int K>
class Elementwise {
 public:
  using A = Sum<T>;
  static constexpr int kElements = ::ffm::FFM_ISA::kLanes<A>, kVectorLanes = K;
  using Packed = Vec<Bits<T>, kElements>;

  Elementwise(const Optimizer& o, const PlaceBits&, A) : rule_(o) {}

  bool takes(NoScale) const { return true; }

  template <int R, typename Scale, typename Moves>
  __attribute__((always_inline)) void move_registers(const LearntEntries<T>& entries, int64_t first, int64_t i,
                                                     Scale wide_scale, const Packed (&weights)[R],
                                                     const Packed (&partners)[R], const Moves& moves) const {
    constexpr int N = kElements;
    for (int r = 0; r < R; ++r) {
      const int64_t e = first + r;
      Vec<A, N> w = widen<T, N>(weights[r]), g = widen<T, N>(partners[r]), s0 = {}, s1 = {};
      if constexpr (!std::is_same_v<Scale, NoScale>) g *= load<N>(wide_scale + i);
      g *= entries.slope[e];
      if constexpr (kStates > 0) s0 = load<N>(entries.states[0][e] + i);
      if constexpr (kStates > 1) s1 = load<N>(entries.states[1][e] + i);
      if constexpr (std::is_same_v<Moves, AllLanes>) {
        rule_.update(w, s0, s1, g);
      } else {
        const Vec<A, N> old_w = w, old_s0 = s0, old_s1 = s1;
        rule_.update(w, s0, s1, g);
        const auto mask = moves(r);
        w = select(mask, w, old_w);
        s0 = select(mask, s0, old_s0);
        s1 = select(mask, s1, old_s1);
      }
      store_weights<N>(entries.weight[e] + i, {w}, entries.rounding(e), i, N);
      if constexpr (kStates > 0) store<N>(entries.states[0][e] + i, s0);
      if constexpr (kStates > 1) store<N>(entries.states[1][e] + i, s1);
    }
  }

  template <int N>
  __attribute__((always_inline)) void move_vector(const LearntEntries<T>& entries, int64_t e, int64_t i,
                                                  const A* gradient, int64_t embed_dim) const {
    for (int64_t k = 0; k < embed_dim; k += N) {
      const int64_t n = std::min<int64_t>(N, embed_dim - k), at = i + k;
      Vec<A, N> w = load_first<N>(entries.weight[e] + at, n), s0 = {}, s1 = {};
      if constexpr (kStates > 0) s0 = load_first<N>(entries.states[0][e] + at, n);
      if constexpr (kStates > 1) s1 = load_first<N>(entries.states[1][e] + at, n);
      rule_.update(w, s0, s1, load_first<N>(gradient + k, n));
      store_weights<N>(entries.weight[e] + at, {w}, entries.rounding(e), at, n);
      if constexpr (kStates > 0) store_part<N, Part::kFirst>(entries.states[0][e] + at, s0, n);
      if constexpr (kStates > 1) store_part<N, Part::kFirst>(entries.states[1][e] + at, s1, n);
    }
  }

 private:
  static constexpr int kStates = Rule<A>::kStates;
  const Rule<A> rule_;
};

// AdaGrad with one sum for each K-vector: that of the mean of g^2 over its K elements. The sums of several registers
// are brought into one, where one inverse root serves them all. A register of bfloat16 is two of floats, those of even
// and of odd places: a shift and a mask, and a vector's own sum is shorter by one step.
// kRoundsAtRandom: as the optimizer says, for bfloat16; known beforehand, rows do not wait for each other's branches.
template <typename T, int K, bool kRoundsAtRandom>
class VectorWise {
 public:
  using A = Sum<T>;
  static constexpr int L = ::ffm::FFM_ISA::kLanes<A>, kParts = std::is_same_v<T, BFloat16> ? 2 : 1;
  static constexpr int kElements = kParts * L, kVectorLanes = K / kParts;
  using Packed = Vec<Bits<T>, kElements>;

  VectorWise(const Optimizer& o, const PlaceBits& place_bits, A slope)
      : rates_(o),
        place_bits_(place_bits),
        slope_(slope),
        decay_by_slope_(rates_.weight_decay / slope),
        lr_by_slope_(rates_.lr * slope),
        mean_by_slope_(slope * slope / K) {}

  // With one slope for all, gradients are reckoned without it: partners + weight_decay / slope * weights. No number
  // here may overflow or vanish for that; a slope that is NaN is not taken either.
  bool takes(NoScale) const {
    const A size = std::abs(slope_);
    return size >= A(0x1p-60) && size <= A(0x1p60) && size * A(0x1p40) >= rates_.weight_decay;
  }

  template <int R, typename Scale, typename Moves>
  __attribute__((always_inline)) void move_registers(const LearntEntries<T>& entries, int64_t first, int64_t i,
                                                     Scale wide_scale, const Packed (&weights)[R],
                                                     const Packed (&partners)[R], const Moves& moves) const {
    constexpr int P = kVectorLanes, V = L / P, G = std::min(R, P), kCopies = P / G, kSums = L / kCopies;
    constexpr auto kAll = std::make_integer_sequence<int, L>{};
    constexpr bool kHasOneSlope = std::is_same_v<Scale, NoScale>;
    [[maybe_unused]] const Parts scale = parts_of_scale(wide_scale, i);
    // Unrolled: rows are arrays of registers.
#pragma GCC unroll 16
    for (int done = 0; done < R; done += G) {
      const int64_t e = first + done;
      Parts w[G], g[G];
      Vec<A, L> squares[G];
      for (int r = 0; r < G; ++r) {
        w[r] = parts(weights[done + r]);
        g[r] = parts(partners[done + r]);
        for (int h = 0; h < kParts; ++h) {
          if constexpr (kHasOneSlope) {
            g[r].of[h] += decay_by_slope_ * w[r].of[h];
          } else {
            g[r].of[h] = entries.slope[e + r] * (g[r].of[h] * scale.of[h]) + rates_.weight_decay * w[r].of[h];
          }
          // Without a gradient nothing moves: the sum stays as it is, and the weight, which needs no rounding.
          if constexpr (!std::is_same_v<Moves, AllLanes>) g[r].of[h] = select(moves(done + r), g[r].of[h], Vec<A, L>{});
          squares[r] = h == 0 ? g[r].of[h] * g[r].of[h] : squares[r] + g[r].of[h] * g[r].of[h];
        }
      }
      Vec<A, L> sum = sum_vectors<A, L, P>(squares) * (kHasOneSlope ? mean_by_slope_ : A(1) / K);
      const Vec<A, kSums> before = load_states<G, V>(entries, e, i / K);
      [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        sum += Vec<A, L>(__builtin_shufflevector(before, before, (I / kCopies)...));
      }(kAll);
      [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        store_states<G, V>(entries, e, i / K, __builtin_shufflevector(sum, sum, (I * kCopies)...));
      }(std::make_integer_sequence<int, kSums>{});
      // Weights of 8 or 11 bits need no rate of 24.
      const Vec<A, L> rate = (kHasOneSlope ? lr_by_slope_ : rates_.lr) * inverse_sqrt<!kIsNarrow<T>>(sum);
      [&]<int... J>(std::integer_sequence<int, J...>) __attribute__((always_inline)) {
        const auto move = [&]<int r, int... I>(std::integer_sequence<int, r>, std::integer_sequence<int, I...>)
                              __attribute__((always_inline)) {
                                const auto own = __builtin_shufflevector(rate, rate, ((V * r + I / P) * kCopies)...);
                                for (int h = 0; h < kParts; ++h) w[r].of[h] -= g[r].of[h] * own;
                              };
        (move(std::integer_sequence<int, J>{}, kAll), ...);
      }(std::make_integer_sequence<int, G>{});
      for (int r = 0; r < G; ++r) store_packed<kHasOneSlope>(entries, e + r, i, w[r]);
    }
  }

  template <int N>
  __attribute__((always_inline)) void move_vector(const LearntEntries<T>& entries, int64_t e, int64_t i,
                                                  const A* gradient, int64_t embed_dim) const {
    const auto decayed = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
      return load_first<N>(gradient + k, n) + rates_.weight_decay * load_first<N>(entries.weight[e] + i + k, n);
    };
    Vec<A, N> squares = {};
    for (int64_t k = 0; k < embed_dim; k += N) {
      const Vec<A, N> g = decayed(k, std::min<int64_t>(N, embed_dim - k));
      squares += g * g;
    }
    A& total = entries.states[0][e][i / embed_dim];
    total += sum<A, N>(squares) / static_cast<A>(embed_dim);
    const A rate = rates_.lr * inverse_sqrt(Vec<A, 4>{total})[0];
    for (int64_t k = 0; k < embed_dim; k += N) {
      const int64_t n = std::min<int64_t>(N, embed_dim - k);
      const Vec<A, N> w = load_first<N>(entries.weight[e] + i + k, n) - rate * decayed(k, n);
      store_weights<N>(entries.weight[e] + i + k, {w}, entries.rounding(e), i + k, n);
    }
  }

 private:
  struct Parts {
    Vec<A, L> of[kParts];
  };

  static Parts parts(Packed v) {
    if constexpr (kParts == 1) {
      return {widen<T, L>(v)};
    } else {
      const auto [even, odd] = halves_of_bfloat16(v);
      return {even, odd};
    }
  }
  static Parts parts_of_scale(NoScale, int64_t) { return {}; }
  static Parts parts_of_scale(const A* scale, int64_t i) {
    if constexpr (kParts == 1) {
      return {load<L>(scale + i)};
    } else {
      // Neighbours of a K-vector have the same.
      const Vec<A, L> low = load<L>(scale + i), high = load<L>(scale + i + L);
      return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        const Vec<A, L> even = __builtin_shufflevector(low, high, (2 * I)...);
        return Parts{even, even};
      }(std::make_integer_sequence<int, L>{});
    }
  }

  template <int G, int V>
  __attribute__((always_inline)) static Vec<A, G * V> load_states(const LearntEntries<T>& entries, int64_t e,
                                                                  int64_t i) {
    if constexpr (G == 1) {
      return load<V>(entries.states[0][e] + i);
    } else {
      return concat<A, G / 2 * V>(load_states<G / 2, V>(entries, e, i), load_states<G / 2, V>(entries, e + G / 2, i),
                                  std::make_integer_sequence<int, G * V>{});
    }
  }
  template <int G, int V>
  __attribute__((always_inline)) static void store_states(const LearntEntries<T>& entries, int64_t e, int64_t i,
                                                          Vec<A, G * V> sums) {
    [&]<int... R>(std::integer_sequence<int, R...>) __attribute__((always_inline)) {
      const auto store_row = [&]<int r, int... I>(std::integer_sequence<int, r>,
                                                  std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        store<V>(entries.states[0][e + r] + i, Vec<A, V>(__builtin_shufflevector(sums, sums, (r * V + I)...)));
      };
      (store_row(std::integer_sequence<int, R>{}, std::make_integer_sequence<int, V>{}), ...);
    }(std::make_integer_sequence<int, G>{});
  }

  // kNaNsAreNarrow: a NaN among w comes from bfloat16 numbers alone, or is the one that arithmetic makes. Its lower
  // half is zero, and nothing that is added there reaches the upper half.
  template <bool kNaNsAreNarrow>
  __attribute__((always_inline)) void store_packed(const LearntEntries<T>& entries, int64_t e, int64_t i,
                                                   const Parts& w) const {
    if constexpr (kParts == 1) {
      store_weights<L>(entries.weight[e] + i, {w.of[0]}, entries.rounding(e), i, L);
    } else {
      Vec<uint32_t, L> even, odd;
      if constexpr (kRoundsAtRandom) {
        const Vec<uint32_t, L> random[] = {load<L>(place_bits_.even + i) ^ entries.even_key[e],
                                           load<L>(place_bits_.odd + i) ^ entries.odd_key[e]};
        if constexpr (kNaNsAreNarrow) {
          even = bit_copy<Vec<uint32_t, L>>(w.of[0]) + random[0];
          odd = bit_copy<Vec<uint32_t, L>>(w.of[1]) + random[1];
        } else {
          even = round_at_random<L>(w.of[0], random[0]);
          odd = round_at_random<L>(w.of[1], random[1]);
        }
      } else {
        even = round_bfloat16<L>(w.of[0]);
        odd = round_bfloat16<L>(w.of[1]);
      }
      const Vec<uint32_t, L> words = even >> 16 | (odd & 0xffff0000u);
      __builtin_memcpy(entries.weight[e] + i, &words, sizeof(words));
    }
  }

  const Sgd<A> rates_;
  const PlaceBits place_bits_;
  const A slope_, decay_by_slope_, lr_by_slope_, mean_by_slope_;
};

template <typename T, typename Form, int kEmbedDim>
class PairUpdates {
 public:
  using A = Sum<T>;

  // slope: of all entries, where no x is given. gradients: scratch for two K-vectors, each filled up to whole
  // registers.
  PairUpdates(const Optimizer& o, const PlaceBits& place_bits, A slope, int64_t embed_dim, A* gradients)
      : form_(o, place_bits, slope), embed_dim_(embed_dim), gradients_(gradients) {}

  bool takes(NoScale none) const { return form_.takes(none); }

  // The pair of a, which is of field f, and b, of field g: one after the other, and may be the same vector.
  __attribute__((always_inline)) void update_pair(const LearntEntries<T>& entries, int64_t a, int64_t f, int64_t b,
                                                  int64_t g) const {
    constexpr int N = kEmbedDim > 0 && kEmbedDim < kLanes<A> ? kEmbedDim : kLanes<A>;
    const int64_t K = kEmbedDim ? kEmbedDim : embed_dim_;
    const A x = entries.slope[a] * entries.x[b];
    A* const of_a = gradients_;
    A* const of_b = gradients_ + (K + N - 1) / N * N;
    for (int64_t k = 0; k < K; k += N) {
      const int64_t n = std::min<int64_t>(N, K - k);
      store<N>(of_a + k, x * load_first<N>(entries.weight[b] + f * K + k, n));
      store<N>(of_b + k, x * load_first<N>(entries.weight[a] + g * K + k, n));
    }
    form_.template move_vector<N>(entries, a, g * K, of_a, K);
    form_.template move_vector<N>(entries, b, f * K, of_b, K);
  }

  // All pairs of the fields 0 .. F - 1, entry f being field f's. wide_scale: the x of entry g, K times for each g.
  // Entries by value: their arrays are known to stay where they are, whatever is stored. `ahead`: see rows_ahead.h.
  template <typename Scale, typename Ahead>
  void update_fields(LearntEntries<T> entries, int64_t F, Scale wide_scale, const Ahead& ahead) const {
    if constexpr (kFields > 1) {
      if (F >= kFields) {
        const Range whole = {0, F / kFields * kFields};
        for_tiles<kFields>(
            F,
            [&](int64_t f, int64_t g) {
              ahead.template ask_tile<kEmbedDim, kFields>(f, g, whole, kEmbedDim);
              update_tile(entries, f, g, AllLanes{}, AllLanes{}, wide_scale);
            },
            [&](int64_t f, int64_t g, int64_t done) {
              ahead.template ask_last_tile<kEmbedDim, kFields>(f, g);
              update_last(entries, f, g, done, wide_scale);
            },
            [&](int64_t f, int64_t done) {
              ahead.template ask_last_tile<kEmbedDim, kFields>(f, f);
              update_diagonal(entries, f, done, wide_scale);
            });
        return;
      }
    }
    for (int64_t f = 0; f < F; ++f) {
      ahead.template ask_tile<kEmbedDim, 1>(f, f, {0, F}, embed_dim_);
      for (int64_t g = f + 1; g < F; ++g) {
        ahead.template ask_tile<kEmbedDim, 1>(f, g, {0, F}, embed_dim_);
        update_pair(entries, f, f, g, g);
      }
    }
  }

 private:
  static constexpr int kFields = kPairsPerRegister<kEmbedDim, Form::kElements>;
  static constexpr int kVectorLanes = kFields > 1 ? Form::kVectorLanes : 1;
  using Packed = typename Form::Packed;
  using Lane = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  using Mask = Vec<Lane, kLanes<A>>;

  // Which of the fields of a register a lane is of.
  static Mask field_of_lane() { return run_of_lane<Lane, kLanes<A>, kVectorLanes>(); }

  static void load_square(const LearntEntries<T>& entries, int64_t e, int64_t i, Packed (&rows)[kFields]) {
    for (int r = 0; r < kFields; ++r) rows[r] = load_bits<Form::kElements>(entries.weight[e + r] + i);
  }

  template <typename Right, typename Below, typename Scale>
  __attribute__((always_inline)) void update_tile(const LearntEntries<T>& entries, int64_t f, int64_t g,
                                                  const Right& right, const Below& below, Scale wide_scale) const {
    const int64_t K = kEmbedDim;
    Packed a[kFields], b[kFields], from_a[kFields], from_b[kFields];
    load_square(entries, f, g * K, a);
    load_square(entries, g, f * K, b);
    for (int r = 0; r < kFields; ++r) from_a[r] = a[r], from_b[r] = b[r];
    transpose<kEmbedDim>(from_a);
    transpose<kEmbedDim>(from_b);
    form_.move_registers(entries, f, g * K, wide_scale, a, from_b, right);
    form_.move_registers(entries, g, f * K, wide_scale, b, from_a, below);
  }

  // The last fields, of which the first `done` have met those of f.
  template <typename Scale>
  __attribute__((noinline)) void update_last(LearntEntries<T> entries, int64_t f, int64_t g, int64_t done,
                                             Scale wide_scale) const {
    const Mask is_new = field_of_lane() >= static_cast<Lane>(done);
    update_tile(
        entries, f, g, [&](int) { return is_new; }, [&](int r) { return r >= done ? Mask{} == 0 : Mask{}; },
        wide_scale);
  }

  // Fields among themselves, of which the first `done` have met already.
  template <typename Scale>
  __attribute__((noinline)) void update_diagonal(LearntEntries<T> entries, int64_t f, int64_t done,
                                                 Scale wide_scale) const {
    const int64_t i = f * kEmbedDim;
    Packed rows[kFields], partners[kFields];
    load_square(entries, f, i, rows);
    for (int r = 0; r < kFields; ++r) partners[r] = rows[r];
    transpose<kEmbedDim>(partners);
    const Mask field = field_of_lane(), is_new = field >= static_cast<Lane>(done);
    form_.move_registers(entries, f, i, wide_scale, rows, partners,
                         [&](int r) { return r >= done ? is_new & (field != static_cast<Lane>(r)) : Mask{}; });
  }

  const Form form_;
  int64_t embed_dim_;
  A* gradients_;
};
