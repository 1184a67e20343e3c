// Scores of one candidate for each query, and their gradients: the positives of a step.
#include <vector>

#include "parts.h"
#include "tiles.h"

template <class T> struct Pairs {
    i64 geometry, num_sub_models, stride;
    const i64* ends_n;
    // factor on the sum so far when a level begins; on the way back, on what goes on to the level below
    const T* carried_n;
    const T *query_RC, *target_RC, *scale_RC;
    // [R, n]: scores out; then the loss's derivatives by them in
    T* scores_Rn;
    const T* gradient_Rn;
    T *query_gradient_RC, *target_gradient_RC, *scale_gradient_RC;
};

namespace {

template <int G, class T> INLINE T term(const T* q, const T* t, const T* s, i64 c) {
    if constexpr (G == L1) return std::abs(q[c] - t[c]);
    if constexpr (G == SCALED_L1) return std::abs(q[c] - s[c] * t[c]);
    if constexpr (G == L2) return (q[c] - t[c]) * (q[c] - t[c]);
    if constexpr (G == PRODUCT) return q[c] * t[c];
    T d = q[c] - t[c], e = q[c + 1] - t[c + 1];
    return std::sqrt(d * d + e * e);
}

template <int G, class T> void score(const Pairs<T>& a, i64 first, i64 last) {
    constexpr i64 step = G == MODULUS ? 2 : 1;
    for (i64 r = first; r < last; r++) {
        const T *q = a.query_RC + r * a.stride, *t = a.target_RC + r * a.stride;
        const T* s = G == SCALED_L1 ? a.scale_RC + r * a.stride : nullptr;
        T total = 0;
        for (i64 i = 0, c = 0; i < a.num_sub_models; i++) {
            T parts[4] = {};  // four sums that do not wait for each other
            for (; c + 4 * step <= a.ends_n[i]; c += 4 * step)
                for (int part = 0; part < 4; part++) parts[part] += term<G>(q, t, s, c + part * step);
            for (; c < a.ends_n[i]; c += step) parts[0] += term<G>(q, t, s, c);
            total = (parts[0] + parts[1]) + (parts[2] + parts[3]) + (i ? a.carried_n[i] * total : T(0));
            T score = G == L2 ? std::sqrt(total) : total;
            a.scores_Rn[r * a.num_sub_models + i] = is_distance(G) ? -score : score;
        }
    }
}

template <class T> INLINE T signed_by(T factor, T d) { return d == 0 ? T(0) : std::copysign(T(1), d) * factor; }

template <int G, class T> void differentiate(const Pairs<T>& a, i64 first, i64 last) {
    const i64 n = a.num_sub_models, columns = a.ends_n[n - 1];
    // what a level's own sum is worth, and the same for each of its columns: then one long loop serves them all
    std::vector<T> factors_n(n), factors_C(columns);
    const T* __restrict factor = factors_C.data();
    for (i64 r = first; r < last; r++) {
        const T *__restrict q = a.query_RC + r * a.stride, *__restrict t = a.target_RC + r * a.stride;
        T *__restrict dq = a.query_gradient_RC + r * a.stride, *__restrict dt = a.target_gradient_RC + r * a.stride;
        for (i64 i = n - 1; i >= 0; i--) {
            const T score = a.scores_Rn[r * n + i];
            T own = a.gradient_Rn[r * n + i];
            if constexpr (G == L2) own = score == 0 ? T(0) : own / score;
            if constexpr (is_distance(G) && G != L2) own = -own;
            factors_n[i] = own + (i + 1 < n ? a.carried_n[i + 1] * factors_n[i + 1] : T(0));
        }
        for (i64 i = 0, c = 0; i < n; i++)
            for (; c < a.ends_n[i]; c++) factors_C[c] = factors_n[i];
        if constexpr (G == MODULUS) {
            for (i64 c = 0; c < columns; c += 2) {
                T d = q[c] - t[c], e = q[c + 1] - t[c + 1], square = d * d + e * e;
                T direction = square > 0 ? factor[c] / std::sqrt(square) : T(0);
                dq[c] = direction * d, dq[c + 1] = direction * e;
                dt[c] = -direction * d, dt[c + 1] = -direction * e;
            }
        } else if constexpr (G == SCALED_L1) {
            const T* __restrict s = a.scale_RC + r * a.stride;
            T* __restrict ds = a.scale_gradient_RC + r * a.stride;
            for (i64 c = 0; c < columns; c++) {
                T d = signed_by(factor[c], q[c] - s[c] * t[c]);
                dq[c] = d, dt[c] = -s[c] * d, ds[c] = -d * t[c];
            }
        } else {
            for (i64 c = 0; c < columns; c++) {
                if constexpr (G == PRODUCT) {
                    dq[c] = factor[c] * t[c], dt[c] = factor[c] * q[c];
                } else {
                    T d = q[c] - t[c];
                    d = G == L1 ? signed_by(factor[c], d) : factor[c] * d;
                    dq[c] = d, dt[c] = -d;
                }
            }
        }
    }
}

template <class T> void score_pairs(const Pairs<T>* a, i64 first, i64 last) {
#define SCORE(G) score<G, T>(*a, first, last)
    FOR_GEOMETRY(a->geometry, SCORE)
#undef SCORE
}
template <class T> void differentiate_pairs(const Pairs<T>* a, i64 first, i64 last) {
#define DIFFERENTIATE(G) differentiate<G, T>(*a, first, last)
    FOR_GEOMETRY(a->geometry, DIFFERENTIATE)
#undef DIFFERENTIATE
}

// Add columns [first, last) of values [R][stride] to rows, which may repeat, in order.
template <class T>
void add_to_rows(const T* values_RC, const i64* ids_R, i64 count, i64 stride, T* rows_UC, i64 row_stride, i64 first, i64 last) {
    for (i64 r = 0; r < count; r++) {
        const T* __restrict value = values_RC + r * stride;
        T* __restrict row = rows_UC + ids_R[r] * row_stride;
        for (i64 c = first; c < last; c++) row[c] += value[c];
    }
}

}  // namespace

EXPORT(score_pairs, Pairs)
EXPORT(differentiate_pairs, Pairs)

template <class T>
static void add_rows(const T* values, const i64* ids, i64 count, i64 stride, T* rows, i64 row_stride, i64 columns, i64 multiple, i64 threads) {
    in_parts(columns, multiple, threads, [=](i64 first, i64 last) { add_to_rows(values, ids, count, stride, rows, row_stride, first, last); });
}

extern "C" {
void add_rows_float(const float* values, const i64* ids, i64 count, i64 stride, float* rows, i64 row_stride, i64 columns, i64 multiple, i64 threads) {
    add_rows(values, ids, count, stride, rows, row_stride, columns, multiple, threads);
}
void add_rows_double(const double* values, const i64* ids, i64 count, i64 stride, double* rows, i64 row_stride, i64 columns, i64 multiple, i64 threads) {
    add_rows(values, ids, count, stride, rows, row_stride, columns, multiple, threads);
}
}
