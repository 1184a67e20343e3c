// Softmax over candidates for several sub-models at once: log-partition functions, mutual learning, and gradients.
//
// A row of candidates of all sub-models is worked on together, so that neighbours meet in registers, and
// the derivatives by the scores overwrite them on their way back to the levels.
#include <cstddef>
#include <limits>

#include "parts.h"
#include "tiles.h"

template <class T> struct Softmax {
    i64 num_sub_models, num_queries, num_candidates, both;
    // [m, Q, M]: scores; then the derivatives by each level's own scores
    T* scores_mQM;
    // [M]: added to the scores of every query; may be missing
    const T* bias_M;
    // [m, Q]: out of the forward pass, into the backward one
    T* partition_mQ;
    // [m, Q]: divergence between sub-model m and the one before it, where `taught_m` says so
    const i64* taught_m;
    T* divergence_mQ;
    // [m, Q], [m]: the loss's derivatives by a query's log-probabilities, summed, and by the divergences
    const T *pull_mQ, *mutual_m;
    // [m]: weight of the sub-model before in a sub-model's score
    const T* carry_m;
};

namespace {

constexpr i64 MOST = 64;

template <class T> void softmax_forward(const Softmax<T>* arguments, i64 first, i64 last) {
    const Softmax<T>& a = *arguments;
    const i64 plane = a.num_queries * a.num_candidates, whole = a.num_candidates / WIDTH<T> * WIDTH<T>;
    for (i64 q = first; q < last; q++) {
        for (i64 m = 0; m < a.num_sub_models; m++) {
            const T* s = a.scores_mQM + m * plane + q * a.num_candidates;
            const T* before = a.taught_m[m] ? s - plane : s;
            auto biased = [&](i64 k) { return a.bias_M ? s[k] + a.bias_M[k] : s[k]; };
            auto biased_vector = [&](i64 k) { return a.bias_M ? load(s + k) + load(a.bias_M + k) : load(s + k); };
            V<T> tops = all(-std::numeric_limits<T>::infinity()), sums = {}, gaps = {};
            for (i64 k = 0; k < whole; k += WIDTH<T>) tops = larger<T>(biased_vector(k), tops);
            T top = largest(tops);
            for (i64 k = whole; k < a.num_candidates; k++) top = biased(k) > top ? biased(k) : top;
            for (i64 k = 0; k < whole; k += WIDTH<T>) {
                V<T> e = exponential(biased_vector(k) - top);
                sums += e;
                gaps += e * (load(s + k) - load(before + k));
            }
            T total = sum(sums), gap = sum(gaps);
            for (i64 k = whole; k < a.num_candidates; k++) {
                T e = std::exp(biased(k) - top);
                total += e, gap += e * (s[k] - before[k]);
            }
            const i64 at = m * a.num_queries + q;
            a.partition_mQ[at] = top + std::log(total);
            a.divergence_mQ[at] = gap / total;
        }
        // KL(this || before) = mean gap of scores - (log partition of this - of the one before)
        for (i64 m = a.num_sub_models - 1; m >= 0; m--) {
            const i64 at = m * a.num_queries + q;
            T divergence = 0;
            if (a.taught_m[m]) divergence = a.divergence_mQ[at] - (a.partition_mQ[at] - a.partition_mQ[at - a.num_queries]);
            a.divergence_mQ[at] = divergence;
        }
        if (!a.both) continue;
        for (i64 m = 1; m < a.num_sub_models; m++) {
            if (!a.taught_m[m]) continue;
            const T *s = a.scores_mQM + m * plane + q * a.num_candidates, *before = s - plane;
            const i64 at = m * a.num_queries + q;
            const T partition = a.partition_mQ[at - a.num_queries];
            T gap = 0;
            for (i64 k = 0; k < a.num_candidates; k++)
                gap += std::exp(before[k] + (a.bias_M ? a.bias_M[k] : T(0)) - partition) * (before[k] - s[k]);
            a.divergence_mQ[at] += gap - (partition - a.partition_mQ[at]);
        }
    }
}

// Derivatives of one vector of candidates, all sub-models; `get` and `put` read and write it.
template <class T, class Get, class Put> INLINE void differentiate(const Softmax<T>& a, i64 q, V<T> bias, Get get, Put put) {
    const i64 n = a.num_sub_models;
    V<T> d[MOST], before = {};
    for (i64 m = 0; m < n; m++) {
        const i64 at = m * a.num_queries + q;
        V<T> p = exponential(get(m) + bias - a.partition_mQ[at]);
        d[m] = -a.pull_mQ[at] * p;
        if (m && a.taught_m[m]) {
            V<T> difference = a.mutual_m[m] * (before - p);
            d[m - 1] += difference;
            if (a.both) d[m] -= difference;
        }
        before = p;
    }
    V<T> carried = {};
    for (i64 m = n - 1; m >= 0; m--) {
        carried = m + 1 < n ? d[m] + a.carry_m[m + 1] * carried : d[m];
        put(m, carried);
    }
}

template <class T> void softmax_backward(const Softmax<T>* arguments, i64 first, i64 last) {
    const Softmax<T>& a = *arguments;
    const i64 plane = a.num_queries * a.num_candidates, whole = a.num_candidates / WIDTH<T> * WIDTH<T>;
    for (i64 q = first; q < last; q++) {
        T* row = a.scores_mQM + q * a.num_candidates;
        for (i64 k = 0; k < whole; k += WIDTH<T>)
            differentiate<T>(
                a, q, a.bias_M ? load(a.bias_M + k) : V<T>{}, [&](i64 m) { return load(row + m * plane + k); },
                [&](i64 m, V<T> v) { store(row + m * plane + k, v); });
        if (whole == a.num_candidates) continue;
        // the candidates left over, in one vector that ends in nothing
        const i64 rest = (a.num_candidates - whole) * sizeof(T);
        V<T> bias = {};
        if (a.bias_M) memcpy(&bias, a.bias_M + whole, rest);
        differentiate<T>(
            a, q, bias,
            [&](i64 m) {
                V<T> v = {};
                memcpy(&v, row + m * plane + whole, rest);
                return v;
            },
            [&](i64 m, V<T> v) { memcpy(row + m * plane + whole, &v, rest); });
    }
}

}  // namespace

EXPORT(softmax_forward, Softmax)
EXPORT(softmax_backward, Softmax)
