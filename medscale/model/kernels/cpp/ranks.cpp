// Ranks of all sub-models in one scan over the entities: at each level's end, how many score better than the target.
//
// Entities come as tiles, transposed once for all queries. A few columns of a tile stay in the L1 cache while all
// queries pass over them; their running sums wait in between. An entity that does not count starts from a sum that
// never gets better. The target's own sums come from the same code over a tile of targets, so that equal rows tie.
#include <algorithm>
#include <limits>
#include <vector>

#include "parts.h"
#include "tiles.h"

template <class T> struct Ranks {
    i64 geometry, num_sub_models, num_tiles, stride;
    const i64* ends_n;
    const T* kappas_n;
    const T *query_QC, *scale_QC;
    // entities [tiles][columns][LANES]; the last tile's lanes left over are excluded like the pairs below
    const T* tiles_TCN;
    i64 num_present;
    // pairs (query, entity) that do not count, sorted by entity; tile t's are [begin[t], begin[t + 1])
    const i64 *excluded_begin, *excluded_query, *excluded_entity;
    // [Q, n]: the targets' sums
    T* target_Qn;
    // [Q, n]: twice the number of better entities plus the number of equal ones, added to
    i64* halves_Qn;
};

namespace {

constexpr int TOGETHER = 2;
// numbers of a tile that stay in the L1 cache
constexpr i64 CACHED = 4096;

// Levels [from, to) of Q queries: what their sums were before is in `sums_QN`, and is left there again.
template <int G, int Q, bool TARGETS, class T>
INLINE void scan(const Ranks<T>& a, i64 query, const T* tile_CN, i64 from, i64 to, T* sums_QN, Bits<T>* counts_Qn, int lane) {
    const T *query_PC = a.query_QC + query * a.stride, *scale_PC = G == SCALED_L1 ? a.scale_QC + query * a.stride : nullptr;
    const i64 n = a.num_sub_models;
    V<T> sums[Q][VECTORS<T>];
    for (int p = 0; p < Q; p++)
        for (int v = 0; v < VECTORS<T>; v++) sums[p][v] = load(sums_QN + p * LANES + v * WIDTH<T>);
    i64 begin = from ? a.ends_n[from - 1] : 0;
    for (i64 i = from; i < to; i++) {
        if (i && a.kappas_n[i] != 1)
            for (int p = 0; p < Q; p++)
                for (int v = 0; v < VECTORS<T>; v++) sums[p][v] *= a.kappas_n[i];
        add_columns<G, Q, T>(query_PC, scale_PC, a.stride, tile_CN, begin, a.ends_n[i], sums);
        begin = a.ends_n[i];
#pragma GCC unroll 8
        for (int p = 0; p < Q; p++) {
            if constexpr (TARGETS) {
                T lanes[LANES];
                for (int v = 0; v < VECTORS<T>; v++) store(lanes + v * WIDTH<T>, sums[p][v]);
                a.target_Qn[(query + p) * n + i] = lanes[lane + p];
            } else {
                const V<T> target = all(a.target_Qn[(query + p) * n + i]);
                Bits<T> count = counts_Qn[p * n + i];
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS<T>; v++)  // a true comparison is -1
                    if constexpr (is_distance(G))
                        count -= (sums[p][v] < target) + (sums[p][v] <= target);
                    else
                        count -= (sums[p][v] > target) + (sums[p][v] >= target);
                counts_Qn[p * n + i] = count;
            }
        }
    }
    for (int p = 0; p < Q; p++)
        for (int v = 0; v < VECTORS<T>; v++) store(sums_QN + p * LANES + v * WIDTH<T>, sums[p][v]);
}

// Scan all levels of one tile for queries [first, last).
template <int G, bool TARGETS, class T>
void scan_tile(const Ranks<T>& a, const T* tile_CN, i64 first, i64 last, T* sums_QN, Bits<T>* counts_Qn) {
    const i64 n = a.num_sub_models;
    for (i64 from = 0, to; from < n; from = to) {
        const i64 begin = from ? a.ends_n[from - 1] : 0;
        to = from + 1;
        while (to < n && (a.ends_n[to] - begin) * LANES <= CACHED) to++;
        i64 q = first;
        for (; q + TOGETHER <= last; q += TOGETHER)
            scan<G, TOGETHER, TARGETS>(
                a, q, tile_CN, from, to, sums_QN + (q - first) * LANES, counts_Qn + (q - first) * n, int(q - first));
        for (; q < last; q++)
            scan<G, 1, TARGETS>(a, q, tile_CN, from, to, sums_QN + (q - first) * LANES, counts_Qn + (q - first) * n, int(q - first));
    }
}

template <int G, class T> void rank(const Ranks<T>& a, i64 first, i64 last) {
    const T never = is_distance(G) ? std::numeric_limits<T>::infinity() : -std::numeric_limits<T>::infinity();
    const i64 n = a.num_sub_models, tile = a.ends_n[n - 1] * LANES;
    std::vector<T> sums_QN((last - first) * LANES);
    std::vector<Bits<T>> counts_Qn((last - first) * n);
    for (i64 t = 0; t < a.num_tiles; t++) {
        std::fill(sums_QN.begin(), sums_QN.end(), T(0));
        for (i64 lane = a.num_present - t * LANES; lane < LANES; lane++)
            for (i64 q = 0; q < last - first; q++) sums_QN[q * LANES + lane] = never;
        for (i64 e = a.excluded_begin[t]; e < a.excluded_begin[t + 1]; e++)
            if (a.excluded_query[e] >= first && a.excluded_query[e] < last)
                sums_QN[(a.excluded_query[e] - first) * LANES + a.excluded_entity[e] - t * LANES] = never;
        scan_tile<G, false>(a, a.tiles_TCN + t * tile, first, last, sums_QN.data(), counts_Qn.data());
    }
    for (i64 q = first; q < last; q++)
        for (i64 i = 0; i < n; i++)
            for (int lane = 0; lane < WIDTH<T>; lane++) a.halves_Qn[q * n + i] += counts_Qn[(q - first) * n + i][lane];
}

// Fill in the targets' sums; tile t holds the targets of queries [t LANES, (t + 1) LANES). Parts are tiles.
template <int G, class T> void score_targets(const Ranks<T>& a, i64 first, i64 last) {
    const i64 tile = a.ends_n[a.num_sub_models - 1] * LANES;
    std::vector<T> sums_QN(LANES * LANES);
    for (i64 t = first; t < last; t++) {
        std::fill(sums_QN.begin(), sums_QN.end(), T(0));
        scan_tile<G, true, T>(
            a, a.tiles_TCN + t * tile, t * LANES, std::min<i64>((t + 1) * LANES, a.num_present), sums_QN.data(), nullptr);
    }
}

template <class T> void rank_queries(const Ranks<T>* a, i64 first, i64 last) {
#define RANK(G) rank<G, T>(*a, first, last)
    FOR_GEOMETRY(a->geometry, RANK)
#undef RANK
}
template <class T> void target_sums(const Ranks<T>* a, i64 first, i64 last) {
#define SCORE(G) score_targets<G, T>(*a, first, last)
    FOR_GEOMETRY(a->geometry, SCORE)
#undef SCORE
}

// Copy rows [R][stride] into tiles [first, last) of [tiles][columns][LANES].
template <class T> void make_tiles(const T* rows_RC, i64 count, i64 stride, i64 columns, T* tiles_TCN, i64 first, i64 last) {
    for (i64 t = first; t < last; t++) {
        i64 ids[LANES];
        for (int k = 0; k < LANES; k++) ids[k] = t * LANES + k;
        load_tile(rows_RC, stride, ids, int(std::min<i64>(LANES, count - t * LANES)), columns, tiles_TCN + t * columns * LANES);
    }
}

}  // namespace

EXPORT(rank_queries, Ranks)
EXPORT(target_sums, Ranks)

extern "C" {
void make_tiles_float(const float* rows, i64 count, i64 stride, i64 columns, float* tiles, i64 num_tiles, i64 multiple, i64 threads) {
    in_parts(num_tiles, multiple, threads, [=](i64 first, i64 last) { make_tiles(rows, count, stride, columns, tiles, first, last); });
}
void make_tiles_double(const double* rows, i64 count, i64 stride, i64 columns, double* tiles, i64 num_tiles, i64 multiple, i64 threads) {
    in_parts(num_tiles, multiple, threads, [=](i64 first, i64 last) { make_tiles(rows, count, stride, columns, tiles, first, last); });
}
}
