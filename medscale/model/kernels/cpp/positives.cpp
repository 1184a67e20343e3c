// Losses of scored positives, and the loss's derivatives by their scores: what a step does with [R, n] numbers.
//
// Sub-models lie side by side, so that what is summed over positives is never summed across a vector.
#include <vector>

#include "parts.h"

// The arguments of a step's positives, in the order in which cpu_positives.py lists them.
template <class T> struct Positives {
    i64 num_sub_models, num_positives, block;
    double w1;
    // logits z = a s + b; weights of the losses, signed, and of what neighbours say, by sub-model
    const T *a_n, *b_n, *pull_n, *pull_below_n, *pull_above_n;
    const T* scores_Rn;
    // weights e^(-w1 p), and their sums by block of positives; then, with pulls over all their sum, the rest
    T *weights_Rn, *totals_Bn;
    T *gradient_Rn, *hard_Bn, *mutual_Bn;
};

namespace {

// Numbers of one positive, or sums, with room for whole vectors and for a neighbour at either end.
template <class T> struct Row {
    std::vector<T> numbers;
    explicit Row(i64 count) : numbers(WIDTH<T> + (count + PAIR<T> - 1) / PAIR<T> * PAIR<T> + WIDTH<T>) {}
    T* begin() { return numbers.data() + WIDTH<T>; }
    void fill(const T* from, i64 count) { memcpy(begin(), from, count * sizeof(T)); }
};

// e^-|z|, and the probability of truth
template <class T> INLINE Pair<T> truth_of(Pair<T> z, Pair<T>& u) {
    u = exponential(-absolute(z));
    Pair<T> sigmoid = reciprocal(T(1) + u);
    return where_negative(z, u * sigmoid, sigmoid);
}

template <class T> void weigh_positives(const Positives<T>* arguments, i64 first, i64 last) {
    const TinyIsZero tiny_is_zero;
    const Positives<T>& p = *arguments;
    const i64 n = p.num_sub_models;
    Row<T> a(n), b(n), scores(n), totals(n);
    a.fill(p.a_n, n), b.fill(p.b_n, n);
    for (i64 block = first; block < last; block++) {
        std::fill(totals.numbers.begin(), totals.numbers.end(), T(0));
        for (i64 r = block * p.block; r < std::min((block + 1) * p.block, p.num_positives); r++) {
            scores.fill(p.scores_Rn + r * n, n);
            for (i64 i = 0; i < n; i += PAIR<T>) {
                Pair<T> u, truth = truth_of(load_pair(a.begin() + i) * load_pair(scores.begin() + i) + load_pair(b.begin() + i), u);
                Pair<T> weight = exponential(T(-p.w1) * truth);
                store(scores.begin() + i, weight);
                store(totals.begin() + i, load_pair(totals.begin() + i) + weight);
            }
            memcpy(p.weights_Rn + r * n, scores.begin(), n * sizeof(T));
        }
        memcpy(p.totals_Bn + block * n, totals.begin(), n * sizeof(T));
    }
}

template <class T> void differentiate_positives(const Positives<T>* arguments, i64 first, i64 last) {
    const TinyIsZero tiny_is_zero;
    const Positives<T>& p = *arguments;
    const i64 n = p.num_sub_models;
    Row<T> a(n), b(n), pull(n), pull_below(n), pull_above(n), logits(n), weights(n), hard(n), mutual(n);
    a.fill(p.a_n, n), b.fill(p.b_n, n), pull.fill(p.pull_n, n);
    pull_below.fill(p.pull_below_n, n), pull_above.fill(p.pull_above_n, n);
    for (i64 block = first; block < last; block++) {
        std::fill(hard.numbers.begin(), hard.numbers.end(), T(0));
        std::fill(mutual.numbers.begin(), mutual.numbers.end(), T(0));
        for (i64 r = block * p.block; r < std::min((block + 1) * p.block, p.num_positives); r++) {
            logits.fill(p.scores_Rn + r * n, n), weights.fill(p.weights_Rn + r * n, n);
            for (i64 i = 0; i < n; i += PAIR<T>)
                store(logits.begin() + i, load_pair(a.begin() + i) * load_pair(logits.begin() + i) + load_pair(b.begin() + i));
            for (i64 i = 0; i < n; i += PAIR<T>) {
                Pair<T> z = load_pair(logits.begin() + i), weight = load_pair(weights.begin() + i), u, wrong = truth_of(-z, u);
                // larger(0, -z) is -z where that is not a number
                Pair<T> loss = larger(T(0), -z) + log_1_plus(u);
                Pair<T> below = load_pair(logits.begin() + i - 1) - z, above = z - load_pair(logits.begin() + i + 1);
                Pair<T> slope_below = smaller(T(1), larger(T(-1), below)), slope_above = smaller(T(1), larger(T(-1), above));
                Pair<T> gradient = load_pair(pull.begin() + i) * (weight * wrong);
                gradient += load_pair(pull_above.begin() + i) * slope_above;
                gradient += load_pair(pull_below.begin() + i) * slope_below;
                store(weights.begin() + i, gradient);
                store(hard.begin() + i, load_pair(hard.begin() + i) + weight * loss);
                store(mutual.begin() + i, load_pair(mutual.begin() + i) + slope_below * (below - T(0.5) * slope_below));
            }
            memcpy(p.gradient_Rn + r * n, weights.begin(), n * sizeof(T));
        }
        memcpy(p.hard_Bn + block * n, hard.begin(), n * sizeof(T));
        memcpy(p.mutual_Bn + block * n, mutual.begin(), n * sizeof(T));
    }
}

}  // namespace

EXPORT(weigh_positives, Positives)
EXPORT(differentiate_positives, Positives)
