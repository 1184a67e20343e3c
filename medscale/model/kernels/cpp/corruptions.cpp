// Scores, losses and gradients of a step's negatives in one go: nothing of size [P, K, C], nor [n, P, K].
//
// For a few queries at a time, scores of all sub-models go to a buffer in the cache, the MED loss turns them into its
// derivatives there, and a reverse scan over sub-models into what each level's columns are worth (equations 2 to 6).
#include <algorithm>
#include <limits>
#include <vector>

#include "parts.h"
#include "tiles.h"

namespace {

// queries scored together, and columns differentiated together: what they share stays in the L1 cache
constexpr int QUERIES = 4, TOGETHER = 2;
constexpr i64 COLUMNS = 32;
// sub-models whose loss is taken in one go
constexpr i64 SUB_MODELS = 8;

}  // namespace

// The arguments of a step's corruption, in the order in which cpu_corruptions.py lists them.
template <class T> struct Corruptions {
    i64 geometry, num_sub_models, num_chunks, num_queries, num_candidates, stride, row_stride;
    i64 plain, losses, raw, over_batch, both, weights_learn, divergence, evaluated, num_moving;
    double w2;
    const i64* ends_n;
    const T *kappas_n, *returns_n, *temperatures_n, *margins_n;
    const i64 *evidence_n, *taught_n;
    const T *hard_weights_n, *mutual_weights_n;
    const T* query_XPC;
    const T* rows_UC;
    const i64* candidates_XK;
    const uint8_t* keep_XPK;
    const T* scale_XPC;
    // of the weights' exponentials over the whole batch
    const T *largest_n, *total_n;
    // results: sums over candidates, per query or, where `plain`, per chunk (see cpu_corruptions.py); gradients
    T* sums_4XPn;
    T *query_gradient_XPC, *scale_gradient_XPC;
    T* tiles_XTCN;
    T* row_gradients_UC;
};

namespace {

// What a sub-model's loss takes of itself and of its neighbours: logits a s + b, also in powers of two, and by what
// derivatives are multiplied.
template <class T> struct Level {
    T a, b, a_of_two, b_of_two, a_below, b_below, pull, pull_below, pull_above, return_above;
};

// Neighbours that are missing, or not taught, pull with no weight: one loop serves all sub-models.
template <class T> Level<T> level_of(const Corruptions<T>& a, i64 i) {
    const i64 below = std::max<i64>(i - 1, 0), above = std::min(i + 1, a.num_sub_models - 1);
    const T own = a.temperatures_n[i], sign = a.geometry == PRODUCT || a.geometry == L2 ? 1 : -1;
    return {
        own, own * a.margins_n[i], LOG2_E<T> * own, LOG2_E<T> * own * a.margins_n[i], a.temperatures_n[below], a.temperatures_n[below] * a.margins_n[below],
        sign * a.hard_weights_n[i] * own,
        i > 0 && a.taught_n[i] && a.both ? sign * a.mutual_weights_n[i] * own : T(0),
        above > i && a.taught_n[above] ? sign * a.mutual_weights_n[above] * own : T(0),
        above > i ? a.returns_n[above] : T(0),
    };
}

// Buffers of one thread.
template <class T> struct Workspace {
    i64 tiles, padded;
    std::vector<Level<T>> levels_n;
    // scores of a few queries, which become what each level's own sum is worth
    std::vector<T> candidates_TCN, scores_PnK;
    // of one query and a few sub-models: unnormalised weights, exp(-|z|)
    std::vector<T> weights_mK, decays_mK;
    // whether those weights are e^z
    std::vector<uint8_t> own_n;
    // of one query: how to normalise weights, derivatives by the gap to the sub-model above
    std::vector<T> tops_n, totals_n, slopes_K, present_K, kept_K, zeros_K;
    // of one query: how much labels count beside what the sub-model above teaches
    std::vector<T> trust_K;
    // of a chunk: losses, still side by side
    std::vector<T> hard_nV, mutual_nV;

    explicit Workspace(const Corruptions<T>& a)
        : tiles((a.num_candidates + LANES - 1) / LANES), padded(tiles * LANES),
          candidates_TCN(tiles * a.ends_n[a.num_sub_models - 1] * LANES), scores_PnK(QUERIES * a.num_sub_models * padded),
          weights_mK(SUB_MODELS * padded), decays_mK(SUB_MODELS * padded), own_n(a.num_sub_models), tops_n(a.num_sub_models), totals_n(a.num_sub_models),
          slopes_K(padded), present_K(padded), kept_K(padded), zeros_K(padded), trust_K(padded),
          hard_nV(a.num_sub_models * WIDTH<T>), mutual_nV(a.num_sub_models * WIDTH<T>) {
        for (i64 i = 0; i < a.num_sub_models; i++) levels_n.push_back(level_of(a, i));
        std::fill(present_K.begin(), present_K.begin() + a.num_candidates, T(1));
    }
};

// Score Q queries against one tile.
template <int G, int Q, class T>
void score(const Corruptions<T>& a, const T* query_PC, const T* scale_PC, const T* tile_CN, i64 padded, T* __restrict scores_PnK) {
    V<T> sums[Q][VECTORS<T>] = {};
    i64 begin = 0;
    for (i64 i = 0; i < a.num_sub_models; i++) {
        if (a.kappas_n[i] != 1)
            for (int p = 0; p < Q; p++)
                for (int v = 0; v < VECTORS<T>; v++) sums[p][v] *= a.kappas_n[i];
        add_columns<G, Q, T>(query_PC, scale_PC, a.stride, tile_CN, begin, a.ends_n[i], sums);
        begin = a.ends_n[i];
#pragma GCC unroll 8
        for (int p = 0; p < Q; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS<T>; v++) {
                V<T> s = sums[p][v];
                if (G == L2) s *= inverse_root(s);
                store(scores_PnK + (p * a.num_sub_models + i) * padded + v * WIDTH<T>, is_distance(G) ? -s : s);
            }
    }
}

// Whether e^-|z| is wanted beside weights; from weights that are e^z it can be had.
enum class Decays { NONE, OF_ANY, OF_ALL };

// Fill in, for sub-models [first, last), weights e^z of kept candidates, 0 of others, with their sum, and with DECAYS also
// e^-|z|: one exponential is all of it where the evidence is the sub-model's own logit z and w2 is 1. Nothing is taken off
// z against overflow; where that would be needed, own_n gets false, and what was filled in is worth nothing.
template <bool DECAYS, class T>
void take_own_exponentials(i64 first, i64 last, const T* scores_nK, Workspace<T>& w) {
    // far from where float ends; a weight of 2^86 makes the total more than MOST
    constexpr T FAR = 86, MOST = T(7e25), LEAST = T(1e-26);
    const i64 padded = w.padded;
    const T* __restrict kept = w.kept_K.data();
    V<T> totals_mV[SUB_MODELS];
    for (i64 i = first; i < last; i++) {
        const T own_a = w.levels_n[i].a_of_two, own_b = w.levels_n[i].b_of_two;
        const T* scores = scores_nK + i * padded;
        T *__restrict weights = w.weights_mK.data() + (i - first) * padded, *__restrict decays = w.decays_mK.data() + (i - first) * padded;
        V<T> totals = {};
        for (i64 k = 0; k < padded; k += PAIR<T>) {
            Pair<T> z = own_a * load_pair(scores + k) + own_b, e = power_of_two(smaller(FAR, z)), weight = load_pair(kept + k) * e;
            store(weights + k, weight);
            if (DECAYS) store(decays + k, where_negative(z, e, reciprocal(e)));
            totals += weight.a + weight.b;
        }
        totals_mV[i - first] = totals;
    }
    for (i64 i = first; i < last; i++) {
        const T total = sum(totals_mV[i - first]);
        w.tops_n[i] = 0;
        w.totals_n[i] = total;
        // also false where something is not a number
        w.own_n[i] = total >= LEAST && total < MOST;
    }
}

// The same for any evidence and w2, for sub-models [first, last): weights exp(w2 evidence - top) of kept candidates, with
// (top, their sum). The evidence is the logit, or raw score, of sub-model j; none if that is below 0.
//
// Sweeps over some sub-models, each with a short chain of operations that wait for each other: many then overlap.
template <bool DECAYS, class T>
void take_any_exponentials(const Corruptions<T>& a, i64 block, i64 first, i64 last, const T* scores_nK, Workspace<T>& w) {
    const T lowest = -std::numeric_limits<T>::infinity();
    for (i64 i = first; i < last; i++) {
        const i64 j = a.evidence_n[i];
        const T slope = T(a.w2) * (a.raw || j < 0 ? T(1) : a.temperatures_n[j]), gamma = a.raw || j < 0 ? T(0) : a.margins_n[j];
        const T* scores = j < 0 ? w.zeros_K.data() : scores_nK + j * w.padded;
        const T* kept = a.hard_weights_n[i] == 0 ? w.zeros_K.data() : w.kept_K.data();
        T* weights = w.weights_mK.data() + (i - block) * w.padded;
        Pair<T> tops = {all(lowest), all(lowest)};
        for (i64 k = 0; k < w.padded; k += PAIR<T>) {
            Pair<T> exponent = where_above(load_pair(kept + k), T(0), slope * (gamma + load_pair(scores + k)), lowest);
            // kept, not taken again: another rounding of huge logits could come out far above the top
            store(weights + k, exponent);
            tops = larger(exponent, tops);
        }
        T top = largest(tops);
        w.tops_n[i] = top > lowest ? top : 0;
    }
    for (i64 i = first; i < last; i++) {
        const T top = w.tops_n[i], own_a = a.temperatures_n[i], gamma = a.margins_n[i];
        const T* scores = scores_nK + i * w.padded;
        T *weights = w.weights_mK.data() + (i - block) * w.padded, *decays = w.decays_mK.data() + (i - block) * w.padded;
        V<T> totals = {};
        for (i64 k = 0; k < w.padded; k += WIDTH<T>) {
            V<T> exponent = load(weights + k);
            Pair<T> both = exponential(Pair<T>{exponent - top, -absolute<T>(own_a * (gamma + load(scores + k)))});
            V<T> weight = exponent > lowest ? both.a : V<T>{};
            store(weights + k, weight);
            if (DECAYS) store(decays + k, both.b);
            totals += weight;
        }
        w.totals_n[i] = sum(totals);
    }
}

// Fill in sub-models [first, last) of a query.
template <Decays DECAYS, class T>
void take_exponentials(const Corruptions<T>& a, i64 first, i64 last, const T* scores_nK, Workspace<T>& w) {
    constexpr bool OF_ANY = DECAYS != Decays::NONE;
    bool own = a.w2 == 1 && !a.raw;
    for (i64 i = first; i < last; i++) own = own && a.evidence_n[i] == i && a.hard_weights_n[i] != 0;
    if (!own) {
        std::fill(w.own_n.begin() + first, w.own_n.begin() + last, false);
        return take_any_exponentials<OF_ANY>(a, first, first, last, scores_nK, w);
    }
    take_own_exponentials<DECAYS == Decays::OF_ALL>(first, last, scores_nK, w);
    for (i64 i = first; i < last; i++)
        if (!w.own_n[i]) take_any_exponentials<OF_ANY>(a, first, i, i + 1, scores_nK, w);
}

// Sum weight x evidence, and loss x evidence: what the derivative by w2 is made of. Even weights have none.
template <class T>
void slope_sums(const Corruptions<T>& a, i64 i, i64 query, T scale, const T* scores_nK, i64 padded, const T* weights, const T* decays) {
    const i64 j = a.evidence_n[i], n = a.num_sub_models, per_sum = a.num_chunks * a.num_queries * n;
    const T evidence_a = a.raw || j < 0 ? T(1) : a.temperatures_n[j], evidence_gamma = a.raw || j < 0 ? T(0) : a.margins_n[j];
    Pair<T> mean = {}, product = {};
    for (i64 k = 0; j >= 0 && k < padded; k += PAIR<T>) {
        Pair<T> weight = load_pair(weights + k), z = a.temperatures_n[i] * (a.margins_n[i] + load_pair(scores_nK + i * padded + k));
        Pair<T> evidence = weight * (evidence_a * (evidence_gamma + load_pair(scores_nK + j * padded + k)));
        evidence = where_above(weight, T(0), evidence, T(0));
        mean += evidence;
        product += evidence * (larger(T(0), z) + log_1_plus(load_pair(decays + k)));
    }
    a.sums_4XPn[per_sum + query * n + i] = scale * sum(mean);
    a.sums_4XPn[2 * per_sum + query * n + i] = scale * sum(product);
}

// What the loop over a sub-model's candidates is told beside its constants.
template <class T> struct Candidates {
    i64 i;
    const T *weights, *decays, *decays_below, *scores_below, *factors_above;
    T* scores;
    // what losses on labels are multiplied by
    T scale;
};

// Take a sub-model's losses for one query, and turn its scores into what its own level's sum is worth to them and to those
// of larger ones. z = a (gamma + s). Weight x softplus(z) is equation 5, Huber between neighbours' z equation 2; instead of
// it the KL divergence between their sigmoids, or labels weighed by what a teacher is right about (see negatives.py).
//
// PLAIN, which is nearly always: the larger teaches the smaller by Huber's loss, each query has weights of its own, and
// they do not learn. Where weights are e^z too (OWN), they tell sigmoids. Derivatives need no LOSSES, which are logarithms;
// they are the same bits with and without.
template <int G, bool PLAIN, bool OWN, bool LOSSES, class T>
void differentiate_sub_model(const Corruptions<T>& a, const Candidates<T>& c, Workspace<T>& w, Pair<T>& hard, Pair<T>& mutual) {
    const bool both = !PLAIN && a.both, divergence = !PLAIN && a.divergence, evaluated = !PLAIN && a.evaluated;
    const Level<T> level = w.levels_n[c.i];
    const T pull = level.pull * c.scale, *present = w.present_K.data();
    T *__restrict slopes = w.slopes_K.data(), *__restrict scores = c.scores;
    for (i64 k = 0; k < w.padded; k += PAIR<T>) {
        Pair<T> s = load_pair(scores + k), weight = load_pair(c.weights + k);
        Pair<T> z = level.a * s + level.b;
        Pair<T> u, truth, loss;
        if constexpr (OWN) {
            // those that are not kept have weight 0, and need neither truth nor loss
            truth = weight * reciprocal(T(1) + weight);
            if (LOSSES) u = where_negative(z, weight, reciprocal(larger(T(1), weight)));
        } else {
            u = load_pair(c.decays + k);
            Pair<T> sigmoid = reciprocal(T(1) + u);
            truth = where_negative(z, u * sigmoid, sigmoid);
        }
        // larger(0, z) is z where that is not a number
        if (LOSSES) loss = larger(T(0), z) + log_1_plus(u);
        Pair<T> gap = level.a_below * load_pair(c.scores_below + k) + (level.b_below - z);
        Pair<T> slope, apart;
        if (divergence) [[unlikely]] {
            Pair<T> z_below = z + gap;
            Pair<T> u_below = c.decays_below ? load_pair(c.decays_below + k) : exponential(-absolute(z_below));
            Pair<T> sigmoid_below = reciprocal(T(1) + u_below);
            slope = load_pair(present + k) * (where_negative(z_below, u_below * sigmoid_below, sigmoid_below) - truth);
            apart = larger(T(0), z_below) + log_1_plus(u_below) - loss - truth * gap;
            apart = both ? slope * gap : load_pair(present + k) * apart;
        } else {
            slope = load_pair(present + k) * smaller(T(1), larger(T(-1), gap));
            if (LOSSES) apart = slope * (gap - T(0.5) * slope);
        }
        if (evaluated) [[unlikely]] {
            weight = weight * load_pair(w.trust_K.data() + k);
            slope = slope * (T(1) - truth), apart = apart * (T(1) - truth);
            store(w.trust_K.data() + k, a.taught_n[c.i] ? truth : Pair<T>{all(T(1)), all(T(1))});
        }
        if (LOSSES) {
            hard += weight * loss;
            mutual += apart;
        }
        Pair<T> factor = (pull * weight) * truth;
        // the gap to the one above was taken when that one's turn was
        factor += level.pull_above * load_pair(slopes + k);
        if (both) factor += -level.pull_below * slope;
        store(slopes + k, slope);
        // where the distance is 0 so are the differences that this is multiplied by
        if constexpr (G == L2) factor = factor * reciprocal(smaller(-std::numeric_limits<T>::min(), s));
        store(scores + k, factor + level.return_above * load_pair(c.factors_above + k));
    }
}

// Take one query's losses, and turn its scores into what each level's own sum is worth to them, last level first.
// PLAIN losses are added to those of the chunk.
template <int G, bool PLAIN, bool LOSSES, class T>
void differentiate_losses(const Corruptions<T>& a, i64 query, T* __restrict scores_nK, Workspace<T>& w) {
    static_assert(PLAIN || LOSSES);
    const TinyIsZero tiny_is_zero;
    const i64 n = a.num_sub_models, padded = w.padded, per_sum = a.num_chunks * a.num_queries * n;
    const T share = T(1) / T(a.num_chunks * a.num_queries);
    std::fill(w.slopes_K.begin(), w.slopes_K.end(), T(0));
    if (!PLAIN && a.evaluated) std::fill(w.trust_K.begin(), w.trust_K.end(), T(1));
    i64 first = n;
    for (i64 i = n - 1; i >= 0; i--) {
        if (i < first) {
            first = std::max<i64>(0, i + 1 - SUB_MODELS);
            take_exponentials<PLAIN ? Decays::OF_ANY : Decays::OF_ALL>(a, first, i + 1, scores_nK, w);
        }
        const T *weights = w.weights_mK.data() + (i - first) * padded, *decays = w.decays_mK.data() + (i - first) * padded;
        const T total = w.totals_n[i];
        T* scores = scores_nK + i * padded;
        T scale = 0;
        if (total > 0) scale = !PLAIN && a.over_batch ? std::exp(w.tops_n[i] - a.largest_n[i]) / a.total_n[i] : share / total;
        if (!PLAIN && a.weights_learn) slope_sums(a, i, query, scale, scores_nK, padded, weights, decays);
        const Candidates<T> candidates = {
            i, weights, decays, i > first ? decays - padded : nullptr, i > 0 ? scores - padded : scores,
            i + 1 < n ? scores + padded : w.zeros_K.data(), scores, scale,
        };
        Pair<T> hard = {}, mutual = {};
        if (PLAIN && w.own_n[i])
            differentiate_sub_model<G, PLAIN, PLAIN, LOSSES>(a, candidates, w, hard, mutual);
        else
            differentiate_sub_model<G, PLAIN, false, LOSSES>(a, candidates, w, hard, mutual);
        if constexpr (!PLAIN) {
            T* sums = a.sums_4XPn + query * n + i;
            sums[0] = scale * sum(hard);
            sums[3 * per_sum] = a.taught_n[i] ? sum(mutual) : T(0);
        } else if constexpr (LOSSES) {
            T *chunk_hard = w.hard_nV.data() + i * WIDTH<T>, *chunk_mutual = w.mutual_nV.data() + i * WIDTH<T>;
            store(chunk_hard, load(chunk_hard) + scale * (hard.a + hard.b));
            if (a.taught_n[i]) store(chunk_mutual, load(chunk_mutual) + (mutual.a + mutual.b));
        }
    }
}

// Leave chunk x's losses, and begin the next one's.
template <class T> void leave_losses(const Corruptions<T>& a, i64 x, Workspace<T>& w) {
    const i64 n = a.num_sub_models;
    for (i64 i = 0; i < n; i++) {
        a.sums_4XPn[x * n + i] = sum(load(w.hard_nV.data() + i * WIDTH<T>));
        a.sums_4XPn[(3 * a.num_chunks + x) * n + i] = sum(load(w.mutual_nV.data() + i * WIDTH<T>));
    }
    std::fill(w.hard_nV.begin(), w.hard_nV.end(), T(0));
    std::fill(w.mutual_nV.begin(), w.mutual_nV.end(), T(0));
}

// Take the gradients of Q queries and of one tile.
template <int G, int Q, class T>
void differentiate(
    const Corruptions<T>& a, const T* factors_PnK, i64 padded, const T* query_PC, const T* scale_PC, const T* tile_CN, i64 level,
    i64 first, i64 last, T* query_gradient_PC, T* scale_gradient_PC, T* gradient_CN) {
    V<T> factors[Q][VECTORS<T>];
#pragma GCC unroll 8
    for (int p = 0; p < Q; p++)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS<T>; v++)
            factors[p][v] = load(factors_PnK + (p * a.num_sub_models + level) * padded + v * WIDTH<T>);
    differentiate_columns<G, Q, T>(
        factors, query_PC, scale_PC, a.stride, tile_CN, first, last, query_gradient_PC, scale_gradient_PC, gradient_CN);
}

// Take losses and gradients of all queries of chunks [first, last), counted from chunk `offset`. With `only_weights`,
// sums get the largest exponent of a query's weights and the sum of exponentials, and nothing else is done.
template <int G, class T>
void corrupt(const Corruptions<T>& a, i64 offset, bool only_weights, i64 first, i64 last) {
    Workspace<T> w(a);
    const i64 n = a.num_sub_models, columns = a.ends_n[n - 1], tile = columns * LANES, per_query = n * w.padded;
    const i64 per_sum = a.num_chunks * a.num_queries * n;
    for (i64 item = first; item < last; item++) {
        const i64 x = offset + item;
        const i64* ids = a.candidates_XK + x * a.num_candidates;
        for (i64 t = 0; t < w.tiles; t++)
            load_tile(
                a.rows_UC, a.row_stride, ids + t * LANES, (int)std::min<i64>(LANES, a.num_candidates - t * LANES), columns,
                w.candidates_TCN.data() + t * tile);
        T* gradients_TCN = a.tiles_XTCN + item * w.tiles * tile;
        if (!only_weights) memset(gradients_TCN, 0, w.tiles * tile * sizeof(T));
        for (i64 start = 0; start < a.num_queries; start += QUERIES) {
            const i64 count = std::min<i64>(QUERIES, a.num_queries - start), at = (x * a.num_queries + start) * a.stride;
            const T *query_PC = a.query_XPC + at, *scale_PC = G == SCALED_L1 ? a.scale_XPC + at : nullptr;
            for (i64 t = 0; t < w.tiles; t++)
                for (i64 p = 0; p < count; p += TOGETHER) {
                    const T* scale = G == SCALED_L1 ? scale_PC + p * a.stride : nullptr;
                    T* scores = w.scores_PnK.data() + p * per_query + t * LANES;
                    const T* tile_CN = w.candidates_TCN.data() + t * tile;
                    if (p + TOGETHER <= count)
                        score<G, TOGETHER>(a, query_PC + p * a.stride, scale, tile_CN, w.padded, scores);
                    else
                        score<G, 1>(a, query_PC + p * a.stride, scale, tile_CN, w.padded, scores);
                }
            for (i64 p = 0; p < count; p++) {
                const i64 query = x * a.num_queries + start + p;
                T* scores_nK = w.scores_PnK.data() + p * per_query;
                const uint8_t* keep = a.keep_XPK + query * a.num_candidates;
                for (i64 k = 0; k < a.num_candidates; k++) w.kept_K[k] = keep[k];
                if (only_weights) {
                    for (i64 i = 0; i < n; i += SUB_MODELS) take_exponentials<Decays::NONE>(a, i, std::min(i + SUB_MODELS, n), scores_nK, w);
                    std::copy(w.tops_n.begin(), w.tops_n.end(), a.sums_4XPn + query * n);
                    std::copy(w.totals_n.begin(), w.totals_n.end(), a.sums_4XPn + per_sum + query * n);
                } else if (!a.plain) {
                    differentiate_losses<G, false, true>(a, query, scores_nK, w);
                } else if (a.losses) {
                    differentiate_losses<G, true, true>(a, query, scores_nK, w);
                } else {
                    differentiate_losses<G, true, false>(a, query, scores_nK, w);
                }
            }
            if (only_weights) continue;
            T* query_gradient_PC = a.query_gradient_XPC + at;
            T* scale_gradient_PC = G == SCALED_L1 ? a.scale_gradient_XPC + at : nullptr;
            for (i64 t = 0; t < w.tiles; t++)
                for (i64 level = 0, begin = 0; level < a.num_moving; begin = a.ends_n[level++])
                    for (i64 c = begin; c < a.ends_n[level]; c += COLUMNS)
                        for (i64 p = 0; p < count; p += TOGETHER) {
                            const i64 end = std::min(c + COLUMNS, a.ends_n[level]), shift = p * a.stride;
                            const T* factors = w.scores_PnK.data() + p * per_query + t * LANES;
#define DIFFERENTIATE(Q)                                                                                          \
    differentiate<G, Q>(a, factors, w.padded, query_PC + shift, G == SCALED_L1 ? scale_PC + shift : nullptr,       \
                        w.candidates_TCN.data() + t * tile, level, c, end, query_gradient_PC + shift,              \
                        G == SCALED_L1 ? scale_gradient_PC + shift : nullptr, gradients_TCN + t * tile)
                            if (p + TOGETHER <= count)
                                DIFFERENTIATE(TOGETHER);
                            else
                                DIFFERENTIATE(1);
#undef DIFFERENTIATE
                        }
        }
        if (a.plain && !only_weights) leave_losses(a, x, w);
    }
}

template <class T> void corrupt_chunks(const Corruptions<T>* a, i64 offset, i64 only_weights, i64 first, i64 last) {
#define CORRUPT(G) corrupt<G, T>(*a, offset, only_weights != 0, first, last)
    FOR_GEOMETRY(a->geometry, CORRUPT)
#undef CORRUPT
}

// Add the gradients of candidates of `count` chunks to columns [first, last) of their rows, in order.
template <class T> void add_chunks(const Corruptions<T>* a, i64 offset, i64 count, i64 first, i64 last) {
    const i64 tiles = (a->num_candidates + LANES - 1) / LANES, tile = a->ends_n[a->num_sub_models - 1] * LANES;
    for (i64 item = 0; item < count; item++)
        for (i64 t = 0; t < tiles; t++)
            add_tile(
                a->tiles_XTCN + (item * tiles + t) * tile, a->candidates_XK + (offset + item) * a->num_candidates + t * LANES,
                (int)std::min<i64>(LANES, a->num_candidates - t * LANES), first, last, a->row_gradients_UC, a->row_stride);
}

}  // namespace

template <class T> static void corrupt_in_parts(const Corruptions<T>* a, i64 offset, i64 only_weights, i64 count, i64 multiple, i64 threads) {
    in_parts(count, multiple, threads, [=](i64 first, i64 last) { corrupt_chunks(a, offset, only_weights, first, last); });
}

template <class T> static void add_in_parts(const Corruptions<T>* a, i64 offset, i64 chunks, i64 columns, i64 multiple, i64 threads) {
    in_parts(columns, multiple, threads, [=](i64 first, i64 last) { add_chunks(a, offset, chunks, first, last); });
}

extern "C" {
void corrupt_float(const Corruptions<float>* a, i64 offset, i64 only_weights, i64 count, i64 multiple, i64 threads) {
    corrupt_in_parts(a, offset, only_weights, count, multiple, threads);
}
void corrupt_double(const Corruptions<double>* a, i64 offset, i64 only_weights, i64 count, i64 multiple, i64 threads) {
    corrupt_in_parts(a, offset, only_weights, count, multiple, threads);
}
void add_chunks_float(const Corruptions<float>* a, i64 offset, i64 chunks, i64 columns, i64 multiple, i64 threads) {
    add_in_parts(a, offset, chunks, columns, multiple, threads);
}
void add_chunks_double(const Corruptions<double>* a, i64 offset, i64 chunks, i64 columns, i64 multiple, i64 threads) {
    add_in_parts(a, offset, chunks, columns, multiple, threads);
}
}
