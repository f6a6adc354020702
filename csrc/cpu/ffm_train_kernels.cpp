// SPDX-License-Identifier: MIT
// A pass over samples that updates the model with each of them: the rows of a sample are read once, for its score and
// for its update, and no gradient leaves the scratch memory.
//
// The arithmetic is libffm's: with r = 1 / sum x^2 (or 1) and t the score, every pair of entries i, j has the gradients
//   dL/dt r x_i x_j w[j, f_i] + weight_decay w[i, f_j]  of  w[i, f_j],  and the mirror of it,
// and nothing else of their rows moves. Where every field has one entry and no row comes twice, every K-vector is in
// one pair, so many pairs move at once (pair_updates.h); else they move one after the other.

#include <algorithm>
#include <bit>
#include <cmath>
#include <type_traits>
#include <utility>

#include "../dispatch.h"
#include "../optimizer.h"
#include "ffm_kernels.h"
#include "intrinsics.h"

namespace ffm::FFM_ISA {
namespace {

#include "vec.h"
// after vec.h, which they use
#include "field_sums.h"
#include "pair_sum.h"
#include "update_rules.h"
// after update_rules.h
#include "pair_updates.h"

// Loss of a score, and its derivative.
template <typename A>
struct LossAt {
  LossAt(Loss loss, A score, A label) {
    if (loss == Loss::kSquared) {
      slope = score - label;
      value = slope * slope / 2;
      return;
    }
    const A sign = label > 0 ? A(1) : A(-1), margin = sign * score;
    const A e = std::exp(-std::abs(margin));
    value = std::log1p(e) + std::max(-margin, A(0));
    slope = -sign * (margin > 0 ? e / (1 + e) : 1 / (1 + e));
  }
  A value, slope;
};

// Asks for what else an entry's update reads and writes: the states of its row, its linear weight and the states of
// that.
template <typename T>
class OtherRows {
 public:
  using A = Sum<T>;

  explicit OtherRows(const Training& t) : t_(t) {}

  __attribute__((always_inline)) void operator()(int64_t e) const {
    const int64_t row = t_.state_rows[e];
    for (const void* const state : t_.table.states) {
      if (state) prefetch(static_cast<const A*>(state) + row * t_.table.state_row_size, t_.table.state_row_size);
    }
    ask_linear(e);
  }
  __attribute__((always_inline)) void ask_linear(int64_t e) const {
    if (!t_.linear.weight) return;
    const int64_t row = t_.linear_rows[e];
    prefetch_line(static_cast<const A*>(t_.linear.weight) + row);
    for (const void* const state : t_.linear.states) {
      if (state) prefetch_line(static_cast<const A*>(state) + row);
    }
  }

 private:
  const Training& t_;
};

// The rows of weights that later samples need are asked for during an update, the longer half of a sample, the states
// during the forward pass that comes before they are needed: this is told where that pass is.
template <typename T>
class StatesAhead {
 public:
  using A = Sum<T>;
  using Rows = RowsAhead<T, OtherRows<T>>;

  StatesAhead(const Problem& p, const Training& t, Arena& arena, Rows& rows, int64_t end)
      : p_(p),
        t_(t),
        other_rows_(t),
        rows_(rows),
        end_(end),
        has_wide_rows_(t.table.state_row_size == p.row_size()),
        places_{{p, arena, 0, t.table.state_row_size}, {p, arena, 0, t.table.state_row_size}} {}

  // Sample b is next.
  void at_sample(int64_t b) {
    const int64_t later = b + rows_.distance() - 1;
    num_states_ = 0;
    if (!rows_.is_by_place() || later >= end_) return;
    while (num_states_ < 2 && t_.table.states[num_states_]) ++num_states_;
    for (int64_t f = 0; f < p_.num_fields; ++f) {
      const int64_t e = p_.entries_begin(later) + f;
      const int64_t row = t_.state_rows[e];
      for (int i = 0; i < num_states_; ++i) {
        places_[i].set_row(f, static_cast<const A*>(t_.table.states[i]) + row * t_.table.state_row_size);
      }
      other_rows_.ask_linear(e);
    }
  }

  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_tile(int64_t f, int64_t g, Range fields, int64_t embed_dim) const {
    if (!has_wide_rows_) return f == g ? ask_rows<kFields>(f) : void();
    for (int i = 0; i < num_states_; ++i) places_[i].template ask_tile<kEmbedDim, kFields>(f, g, fields, embed_dim);
  }
  template <int kEmbedDim, int kFields>
  __attribute__((always_inline)) void ask_last_tile(int64_t f, int64_t g) const {
    if (!has_wide_rows_) return f == g ? ask_rows<kFields>(f) : void();
    for (int i = 0; i < num_states_; ++i) places_[i].template ask_last_tile<kEmbedDim, kFields>(f, g);
  }
  template <int kEmbedDim, int kFields, bool kAlways = false, int kRows = kFields>
  __attribute__((always_inline)) void ask_vectors(int64_t f, int64_t g, int64_t embed_dim) const {
    if (!has_wide_rows_) return f == g ? ask_rows<kRows>(f) : void();
    for (int i = 0; i < num_states_; ++i) {
      places_[i].template ask_vectors<kEmbedDim, kFields, kAlways, kRows>(f, g, embed_dim);
    }
  }
  void step(int64_t work) const { rows_.step(work); }

 private:
  // Rows of a number a K-vector are short.
  template <int kRows>
  __attribute__((always_inline)) void ask_rows(int64_t f) const {
    for (int i = 0; i < num_states_; ++i) {
      for (int r = 0; r < kRows; ++r) prefetch(places_[i].row(f + r), t_.table.state_row_size);
    }
  }

  const Problem& p_;
  const Training& t_;
  const OtherRows<T> other_rows_;
  Rows& rows_;
  int64_t end_;
  bool has_wide_rows_;
  int num_states_ = 0;
  Places<A> places_[2];
};

// A sample at a time: what its rows, its linear weights and the bias do.
template <typename T, int kEmbedDim>
class Trainer {
 public:
  using A = Sum<T>;

  Trainer(const Problem& p, const Training& t, Arena& arena)
      : p_(p),
        t_(t),
        optimizer_(t.optimizer),
        s_(p, arena),
        entries_(s_.entries()),
        learnt_(std::max<int64_t>(2, p.num_fields), arena),
        rows_(arena.take<int64_t>(std::max<int64_t>(2, p.num_fields) + kLanes<int64_t>)),
        state_rows_(arena.take<int64_t>(std::max<int64_t>(2, p.num_fields))),
        gradients_(arena.take<A>(2 * (p.embed_dim + kLanes<A>))),
        place_bits_{arena.take<uint32_t>(kMayRound ? PlaceBits::size(p) : 0),
                    arena.take<uint32_t>(kMayRound ? PlaceBits::size(p) : 0)},
        update_bias_(choose_update<A>(t.optimizer.kind)) {
    // Behind the last row: no row.
    for (int i = 0; rows_ && i < kLanes<int64_t>; ++i) rows_[p.num_fields + i] = -1;
    if (kMayRound && place_bits_.even && t.optimizer.is_stochastic) place_bits_.fill(p);
  }

  // The loss of the sample with the entries [first, last), weighted.
  A train(int64_t first, int64_t last, A label, A weight, int64_t step, const typename StatesAhead<T>::Rows& rows_ahead,
          const StatesAhead<T>& states_ahead) {
    A r = 1;
    if (t_.normalize) {
      A squares = static_cast<A>(last - first);
      if (entries_.has_values()) {
        squares = 0;
        for (int64_t e = first; e < last; ++e) squares += entries_.value(e) * entries_.value(e);
      }
      r = squares > 0 ? 1 / squares : 0;
    }
    A score = 0;
    s_.with_rows([&](auto rows) { score = r * sum_pairs<kEmbedDim>(p_, s_, rows, states_ahead); });
    if (t_.linear.weight) {
      A sum = 0;
      for (int64_t e = first; e < last; ++e) sum += entries_.value(e) * linear_weight(e);
      score += std::sqrt(r) * sum;
    }
    if (t_.bias.weight) score += *static_cast<const A*>(t_.bias.weight);
    const LossAt<A> loss(t_.loss, score, label);
    const A slope = weight * loss.slope;

    optimizer_.set_step(step);
    switch (optimizer_.kind) {
      case OptimizerKind::kSgd: move<Elementwise<T, Sgd, kEmbedDim>, Sgd>(first, last, slope, r, rows_ahead); break;
      case OptimizerKind::kAdaGrad:
        move<Elementwise<T, AdaGrad, kEmbedDim>, AdaGrad>(first, last, slope, r, rows_ahead);
        break;
      case OptimizerKind::kVectorAdaGrad:
        // A linear weight is a vector of one.
        if (kMayRound && optimizer_.is_stochastic) {
          move<VectorWise<T, kEmbedDim, kMayRound>, AdaGrad>(first, last, slope, r, rows_ahead);
        } else {
          move<VectorWise<T, kEmbedDim, false>, AdaGrad>(first, last, slope, r, rows_ahead);
        }
        break;
      case OptimizerKind::kAdam: move<Elementwise<T, Adam, kEmbedDim>, Adam>(first, last, slope, r, rows_ahead); break;
      case OptimizerKind::kFtrl: move<Elementwise<T, Ftrl, kEmbedDim>, Ftrl>(first, last, slope, r, rows_ahead); break;
    }
    if (t_.bias.weight) {
      Optimizer without_decay = optimizer_;
      without_decay.weight_decay = 0;
      update_bias_(t_.bias, without_decay, 0, A(1), &slope, 0, 1);
    }
    return weight * loss.value;
  }

  FieldSums<T>& sums() { return s_; }

 private:
  // Only bfloat16 weights are rounded at random.
  static constexpr bool kMayRound = std::is_same_v<T, BFloat16>;

  A linear_weight(int64_t e) const { return static_cast<const A*>(t_.linear.weight)[t_.linear_rows[e]]; }

  // The entries [begin, end) of learnt_, whose rows and x are set.
  void learn(int64_t begin, int64_t end, A slope) {
    const UpdatedTable& table = t_.table;
    for (int64_t e = begin; e < end; ++e) learnt_.slope[e] = slope * learnt_.x[e];
    for (int64_t e = begin; e < end; ++e) learnt_.weight[e] = static_cast<T*>(table.weight) + rows_[e] * table.row_size;
    for (int i = 0; i < 2; ++i) {
      A* const state = static_cast<A*>(table.states[i]);
      for (int64_t e = begin; state && e < end; ++e)
        learnt_.states[i][e] = state + state_rows_[e] * table.state_row_size;
    }
    learnt_.is_stochastic = optimizer_.is_stochastic;
    if (!optimizer_.is_stochastic) return;
    const uint64_t key_of_step = Rounding::key_of_step(optimizer_);
    for (int64_t e = begin; e < end; ++e) {
      const uint32_t key = Rounding::key_of_row(key_of_step, rows_[e]);
      learnt_.key[e] = key;
      learnt_.even_key[e] = key >> 16;
      learnt_.odd_key[e] = key & 0xffffu;
    }
  }
  void set_entry(int64_t i, int64_t e) {
    rows_[i] = p_.indices[e];
    state_rows_[i] = t_.state_rows[e];
    learnt_.x[i] = entries_.value(e);
  }

  // Whether every field has one entry, and no two have the same row: then the entries are learnt_, by field.
  bool load_fields(int64_t first, int64_t last, A slope) {
    if (!s_.is_dense() || last - first != p_.num_fields) return false;
    for (int64_t e = first; e < last; ++e) set_entry(entries_.field(e, first), e);
    learn(0, p_.num_fields, slope);
    using Rows = Vec<int64_t, kLanes<int64_t>>;
    Rows is_repeated = {};
    for (int64_t f = 0; f < p_.num_fields; ++f) {
      for (int64_t g = f + 1; g < p_.num_fields; g += kLanes<int64_t>) {
        is_repeated |= load<kLanes<int64_t>>(rows_ + g) == Rows{} + rows_[f];
      }
    }
    return sum<int64_t, kLanes<int64_t>>(is_repeated) == 0;
  }

  // All that entries have, against the slope dL/dt: rows by their Form, linear weights by their Rule.
  template <typename Form, template <typename> typename Rule, typename Ahead>
  void move(int64_t first, int64_t last, A slope, A r, const Ahead& ahead) {
    const bool rows_differ = update<Form>(first, last, slope * r, ahead);
    if (t_.linear.weight) update_linear<Rule>(first, last, slope * std::sqrt(r), rows_differ);
  }

  // As many at a time as a register takes, where no row comes twice.
  template <template <typename> typename Rule>
  void update_linear(int64_t first, int64_t last, A slope, bool rows_differ) {
    constexpr int L = kLanes<A>, kStates = Rule<A>::kStates;
    const Rule<A> rule(optimizer_);
    A* const lists[] = {static_cast<A*>(t_.linear.weight), static_cast<A*>(t_.linear.states[0]),
                        static_cast<A*>(t_.linear.states[1])};
    int64_t n = rows_differ ? L : 1;
    for (int64_t e = first; e < last; e += n) {
      n = std::min(n, last - e);
      alignas(kCacheLine) A numbers[3][L] = {}, gradients[L] = {};
      for (int64_t i = 0; i < n; ++i) {
        gradients[i] = slope * entries_.value(e + i);
        for (int s = 0; s <= kStates; ++s) numbers[s][i] = lists[s][t_.linear_rows[e + i]];
      }
      Vec<A, L> w = load<L>(numbers[0]), s0 = load<L>(numbers[1]), s1 = load<L>(numbers[2]);
      rule.update(w, s0, s1, load<L>(gradients));
      store<L>(numbers[0], w);
      store<L>(numbers[1], s0);
      store<L>(numbers[2], s1);
      for (int64_t i = 0; i < n; ++i) {
        for (int s = 0; s <= kStates; ++s) lists[s][t_.linear_rows[e + i]] = numbers[s][i];
      }
    }
  }

  // Whether every field had one entry, and no two the same row.
  template <typename Form, typename Ahead>
  bool update(int64_t first, int64_t last, A slope, const Ahead& ahead) {
    const PairUpdates<T, Form, kEmbedDim> updates(optimizer_, place_bits_, slope, p_.embed_dim, gradients_);
    if (load_fields(first, last, slope)) {
      if (!entries_.has_values() && updates.takes(NoScale{})) {
        updates.update_fields(learnt_, p_.num_fields, NoScale{}, ahead);
      } else {
        const A* const wide_scale = entries_.has_values() ? s_.wide_scale() : s_.wide_ones();
        updates.update_fields(learnt_, p_.num_fields, wide_scale, ahead);
      }
      return true;
    }
    ahead.ask_rows();
    for (int64_t i = first; i < last; ++i) {
      set_entry(0, i);
      learn(0, 1, slope);
      const int64_t f = entries_.field(i, first);
      for (int64_t j = i + 1; j < last; ++j) {
        const int64_t g = entries_.field(j, first);
        if (f == g && !p_.within_field) continue;
        set_entry(1, j);
        learn(1, 2, slope);
        updates.update_pair(learnt_, 0, f, 1, g);
      }
    }
    return false;
  }

  const Problem& p_;
  const Training& t_;
  Optimizer optimizer_;
  FieldSums<T> s_;
  const Entries<T>& entries_;
  LearntEntries<T> learnt_;
  int64_t *rows_, *state_rows_;
  A* gradients_;
  PlaceBits place_bits_;
  UpdateRow<A> update_bias_;
};

template <typename T, int kEmbedDim>
double train(const Problem& p, const Training& t, const float* labels, const float* weights, int64_t step,
             int64_t begin, int64_t end, void* scratch) {
  using A = Sum<T>;
  Arena arena(scratch);
  Trainer<T, kEmbedDim> trainer(p, t, arena);
  typename StatesAhead<T>::Rows rows_ahead(p, arena, Ask::kByPlace, {begin, end}, {0, p.num_fields}, OtherRows<T>(t));
  StatesAhead<T> states_ahead(p, t, arena, rows_ahead, end);
  double loss = 0;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = p.entries_begin(b), last = p.entries_begin(b + 1);
    FieldSums<T>& s = trainer.sums();
    s.load_sample(first, last);
    rows_ahead.at_sample(b, s.num_active() * (s.num_active() - 1) / 2);
    states_ahead.at_sample(b);
    const A weight = weights ? A(weights[b]) : A(1);
    loss += trainer.train(first, last, A(labels[b]), weight, step + b, rows_ahead, states_ahead);
    rows_ahead.after_sample();
  }
  return loss;
}

template <typename T>
size_t train_bytes(const Problem& p) {
  Arena arena(nullptr);
  Trainer<T, 0>(p, {}, arena);
  return arena.used() + 3 * Places<T>::bytes(p);
}

template <typename T>
double dispatch_train(const Problem& p, const Training& t, const float* labels, const float* weights, int64_t step,
                      int64_t begin, int64_t end, void* scratch) {
  double loss = 0;
  dispatch_embed_dim(p.embed_dim, [&](auto embed_dim) {
    loss = train<T, embed_dim()>(p, t, labels, weights, step, begin, end, scratch);
  });
  return loss;
}

template <typename T>
void update_rows(const Update& update, const int64_t* rows, const void* grad_rows, int64_t begin, int64_t end,
                 void* scratch) {
  using A = Sum<T>;
  const int64_t row_size = update.table.row_size;
  const UpdateRow<T> update_row = choose_update<T>(update.optimizer.kind);
  for (int64_t i = begin; i < end; ++i) {
    const T* const gradient = static_cast<const T*>(grad_rows) + i * row_size;
    const A* wide;
    if constexpr (kIsNarrow<T>) {
      scale_into(static_cast<A*>(scratch), A(1), gradient, row_size);
      wide = static_cast<const A*>(scratch);
    } else {
      wide = gradient;
    }
    update_row(update.table, update.optimizer, rows ? rows[i] : i, A(1), wide, 0, row_size);
  }
}

// to += own - before, and all three become that.
template <typename A, typename T, typename Store>
void join(T* to, T* own, T* before, int64_t n, const Store& store) {
  constexpr int L = kLanes<A>;
  for (int64_t i = 0; i < n; i += L) {
    const int64_t count = std::min<int64_t>(L, n - i);
    const Vec<A, L> change = load_first<L>(own + i, count) - load_first<L>(before + i, count);
    store(to + i, load_first<L>(to + i, count) + change, i, count);
    const auto joined = load_first_bits<L>(to + i, count);
    store_part_bits<L, Part::kFirst, Bits<T>>(own + i, joined, count);
    store_part_bits<L, Part::kFirst, Bits<T>>(before + i, joined, count);
  }
}

template <typename T>
void join_row(const Update& update, int64_t row, const UpdatedTable& own, const UpdatedTable& before, int64_t slot) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const UpdatedTable& table = update.table;
  const Rounding rounding(update.optimizer, row);
  const auto weight = [](const UpdatedTable& t, int64_t i) { return static_cast<T*>(t.weight) + i * t.row_size; };
  join<A>(weight(table, row), weight(own, slot), weight(before, slot), table.row_size,
          [&](T* to, Vec<A, L> w, int64_t i, int64_t count) { store_weights<L>(to, {w}, rounding, i, count); });
  for (int s = 0; s < 2 && table.states[s]; ++s) {
    const auto state = [s](const UpdatedTable& t, int64_t i) {
      return static_cast<A*>(t.states[s]) + i * t.state_row_size;
    };
    join<A>(state(table, row), state(own, slot), state(before, slot), table.state_row_size,
            [](A* to, Vec<A, L> sum, int64_t, int64_t count) { store_part<L, Part::kFirst>(to, sum, count); });
  }
}

}  // namespace

template <typename T>
const TrainKernels& train_kernels() {
  static constexpr TrainKernels kKernels = {train_bytes<T>, dispatch_train<T>, update_rows<T>, join_row<T>};
  return kKernels;
}
template const TrainKernels& train_kernels<FFM_DTYPE>();

}  // namespace ffm::FFM_ISA
