// Tiles: candidates side by side, and what is done with their columns.
//
// Candidates' rows are copied, transposed, into a tile [columns][LANES]. A vector then holds one column of several
// candidates, a query's column is one number for all of them, and the running sum at a level's end is the score:
// nothing is added up across a vector, so 64 sub-models cost what one does, and levels may end anywhere.
#pragma once
#include "vectors.h"

// SCALED_L1 is PairRE's: |q - scale x t|
enum Geometry { L1, L2, MODULUS, PRODUCT, SCALED_L1 };
constexpr bool is_distance(int geometry) { return geometry != PRODUCT; }

// rows read or written at the same time: as many accesses to memory are on their way
constexpr int ROWS = 8;

INLINE void transpose(V<float> r[8]) {
#ifdef __AVX__
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0x44);
            u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + 2 + j], 0xEE);
        }
    for (int i = 0; i < 4; i++) {
        r[i] = (V<float>)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
        r[i + 4] = (V<float>)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
#else
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            float swapped = r[i][j];
            r[i][j] = r[j][i];
            r[j][i] = swapped;
        }
#endif
}

// Copy `width` rows into the tile [columns][LANES]; lanes left over get 0.
template <class T>
static void load_tile(const T* rows_UC, i64 stride, const i64* ids, int width, i64 columns, T* __restrict tile_CN) {
    if (width < LANES) memset(tile_CN, 0, columns * LANES * sizeof(T));
    int k = 0;
    for (; k + ROWS <= width; k += ROWS) {
        const T* r[ROWS];
        for (int j = 0; j < ROWS; j++) r[j] = rows_UC + ids[k + j] * stride;
        i64 c = 0;
        if constexpr (std::is_same_v<T, float>)
            for (; c + 8 <= columns; c += 8) {
                V<float> block[8];
                for (int j = 0; j < 8; j++) block[j] = load(r[j] + c);
                transpose(block);
                for (int j = 0; j < 8; j++) store(tile_CN + (c + j) * LANES + k, block[j]);
            }
        for (; c < columns; c++)
            for (int j = 0; j < ROWS; j++) tile_CN[c * LANES + k + j] = r[j][c];
    }
    for (; k < width; k++)
        for (i64 c = 0; c < columns; c++) tile_CN[c * LANES + k] = rows_UC[ids[k] * stride + c];
}

// Add columns [first, last) of the tile's lanes to their rows, which may repeat: one after the other.
template <class T>
static void add_tile(const T* __restrict tile_CN, const i64* ids, int width, i64 first, i64 last, T* rows_UC, i64 stride) {
    int k = 0;
    for (; k + ROWS <= width; k += ROWS) {
        T* r[ROWS];
        for (int j = 0; j < ROWS; j++) r[j] = rows_UC + ids[k + j] * stride;
        i64 c = first;
        if constexpr (std::is_same_v<T, float>)
            for (; c + 8 <= last; c += 8) {
                V<float> block[8];
                for (int j = 0; j < 8; j++) block[j] = load(tile_CN + (c + j) * LANES + k);
                transpose(block);
                for (int j = 0; j < 8; j++) store(r[j] + c, load(r[j] + c) + block[j]);
            }
        for (; c < last; c++)
            for (int j = 0; j < ROWS; j++) r[j][c] += tile_CN[c * LANES + k + j];
    }
    for (; k < width; k++)
        for (i64 c = first; c < last; c++) rows_UC[ids[k] * stride + c] += tile_CN[c * LANES + k];
}

// One column's (or unit's) share of the running sum.
template <int G, class T>
INLINE V<T> term(const T* query, const T* scale, const T* tile, i64 c, int v) {
    const T* t = tile + c * LANES + v * WIDTH<T>;
    if constexpr (G == L1) return absolute<T>(query[c] - load(t));
    if constexpr (G == SCALED_L1) return absolute<T>(query[c] - scale[c] * load(t));
    if constexpr (G == PRODUCT) return query[c] * load(t);
    V<T> d = query[c] - load(t);
    if constexpr (G == L2) return d * d;
    V<T> e = query[c + 1] - load(t + LANES);
    return root(d * d + e * e);
}

// Add columns [first, last) to the running sums of Q queries, `stride` columns apart.
template <int G, int Q, class T>
INLINE void add_columns(
    const T* query_PC, const T* scale_PC, i64 stride, const T* __restrict tile_CN, i64 first, i64 last, V<T> sums[Q][VECTORS<T>]) {
    for (i64 c = first; c < last; c += G == MODULUS ? 2 : 1)
#pragma GCC unroll 8
        for (int p = 0; p < Q; p++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS<T>; v++)
                sums[p][v] += term<G, T>(query_PC + p * stride, scale_PC + p * stride, tile_CN, c, v);
}

// Add the gradients of columns [first, last): of Q queries, their scales, and the tile.
//
// A factor [Q][VECTORS] is what these columns' own sum is worth to the loss, with the sign folded in: the gradient of
// q - t is the factor times its sign (l1), itself (l2) or its direction (modulus); that of q the factor times t (product).
template <int G, int Q, class T>
INLINE void differentiate_columns(
    const V<T> factors[Q][VECTORS<T>], const T* query_PC, const T* scale_PC, i64 stride, const T* __restrict tile_CN,
    i64 first, i64 last, T* __restrict query_gradient_PC, T* __restrict scale_gradient_PC, T* __restrict gradient_CN) {
    constexpr int step = G == MODULUS ? 2 : 1;
    for (i64 c = first; c < last; c += step) {
        V<T> sums[Q][2] = {};
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS<T>; v++) {
            const i64 at = c * LANES + v * WIDTH<T>;
            V<T> t0 = load(tile_CN + at), t1 = {}, g0 = load(gradient_CN + at), g1 = {};
            if constexpr (G == MODULUS) t1 = load(tile_CN + at + LANES), g1 = load(gradient_CN + at + LANES);
#pragma GCC unroll 8
            for (int p = 0; p < Q; p++) {
                const T* q = query_PC + p * stride + c;
                V<T> factor = factors[p][v];
                if constexpr (G == PRODUCT) {
                    g0 += factor * q[0];
                    sums[p][0] += factor * t0;
                } else if constexpr (G == MODULUS) {
                    V<T> d0 = q[0] - t0, d1 = q[1] - t1;
                    V<T> direction = factor * inverse_root(d0 * d0 + d1 * d1);
                    d0 *= direction, d1 *= direction;
                    g0 -= d0, g1 -= d1;
                    sums[p][0] += d0, sums[p][1] += d1;
                } else if constexpr (G == SCALED_L1) {
                    T scale = scale_PC[p * stride + c];
                    V<T> d = signed_by<T>(factor, q[0] - scale * t0);
                    g0 -= scale * d;
                    sums[p][0] += d, sums[p][1] -= d * t0;
                } else {
                    V<T> d = q[0] - t0;
                    d = G == L1 ? signed_by<T>(factor, d) : factor * d;
                    g0 -= d;
                    sums[p][0] += d;
                }
            }
            store(gradient_CN + at, g0);
            if constexpr (G == MODULUS) store(gradient_CN + at + LANES, g1);
        }
#pragma GCC unroll 8
        for (int p = 0; p < Q; p++) {
            query_gradient_PC[p * stride + c] += sum(sums[p][0]);
            if constexpr (G == MODULUS) query_gradient_PC[p * stride + c + 1] += sum(sums[p][1]);
            if constexpr (G == SCALED_L1) scale_gradient_PC[p * stride + c] += sum(sums[p][1]);
        }
    }
}

// Choose the code of a geometry.
#define FOR_GEOMETRY(geometry, CALL) \
    switch (geometry) {              \
        case L1: CALL(L1); break;            \
        case L2: CALL(L2); break;            \
        case MODULUS: CALL(MODULUS); break;  \
        case PRODUCT: CALL(PRODUCT); break;  \
        case SCALED_L1: CALL(SCALED_L1); break; \
    }
