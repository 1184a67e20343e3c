// Numbers side by side: what the kernels need of vector instructions, in float and in double.
//
// The compiler's own vector types do arithmetic, comparison and selection on any processor; the few things they lack
// come as AVX instructions where there are any, else lane by lane.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

using i64 = int64_t;

// Candidates in a tile: a few vectors' worth.
constexpr int LANES = 32;

template <class T> struct Vector;
template <> struct Vector<float> {
    typedef float type __attribute__((vector_size(32)));
    typedef int32_t bits __attribute__((vector_size(32)));
    static constexpr int32_t sign = INT32_MIN;
};
template <> struct Vector<double> {
    typedef double type __attribute__((vector_size(32)));
    typedef int64_t bits __attribute__((vector_size(32)));
    static constexpr int64_t sign = INT64_MIN;
};
template <class T> using V = typename Vector<T>::type;
template <class T> using Bits = typename Vector<T>::bits;
// numbers in a vector, vectors in a tile's row
template <class T> constexpr int WIDTH = 32 / sizeof(T);
template <class T> constexpr int VECTORS = LANES / WIDTH<T>;

template <class T> INLINE V<T> load(const T* p) {
    V<T> v;
    memcpy(&v, p, sizeof v);
    return v;
}
template <class T> INLINE void store(T* p, V<T> v) { memcpy(p, &v, sizeof v); }
template <class T> INLINE V<T> all(T value) { return V<T>{} + value; }
template <class T> INLINE V<T> absolute(V<T> v) { return (V<T>)((Bits<T>)v & ~(Bits<T>{} + Vector<T>::sign)); }
// a > b ? a : b, and a < b ? a : b, also where one is not a number
template <class T> INLINE V<T> larger(V<T> a, V<T> b) {
#ifdef __AVX__
    if constexpr (std::is_same_v<T, float>) return (V<T>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
    return a > b ? a : b;
}
template <class T> INLINE V<T> smaller(V<T> a, V<T> b) {
#ifdef __AVX__
    if constexpr (std::is_same_v<T, float>) return (V<T>)_mm256_min_ps((__m256)a, (__m256)b);
#endif
    return a < b ? a : b;
}

// factor x sign(difference), 0 at 0
template <class T> INLINE V<T> signed_by(V<T> factor, V<T> difference) {
    Bits<T> turned = (Bits<T>)factor ^ ((Bits<T>)difference & (Bits<T>{} + Vector<T>::sign));
    return (V<T>)(turned & (difference != 0));
}

INLINE V<float> root(V<float> v) {
#ifdef __AVX__
    return (V<float>)_mm256_sqrt_ps((__m256)v);
#else
    for (int i = 0; i < WIDTH<float>; i++) v[i] = std::sqrt(v[i]);
    return v;
#endif
}
INLINE V<double> root(V<double> v) {
#ifdef __AVX__
    return (V<double>)_mm256_sqrt_pd((__m256d)v);
#else
    for (int i = 0; i < WIDTH<double>; i++) v[i] = std::sqrt(v[i]);
    return v;
#endif
}

// 1 / sqrt(v), 0 where v is 0 (or too small to have an inverse). In float: an estimate and a step of Newton's, 2e-7.
INLINE V<float> inverse_root(V<float> v) {
#ifdef __AVX__
    V<float> y = (V<float>)_mm256_rsqrt_ps((__m256)v);
    y = y * (1.5f - (0.5f * v) * (y * y));
#else
    V<float> y = 1.0f / root(v);
#endif
    return v <= 1.2e-38f ? V<float>{} : y;
}
INLINE V<double> inverse_root(V<double> v) { return v <= 0.0 ? V<double>{} : 1.0 / root(v); }

INLINE float sum(V<float> v) {
#ifdef __AVX__
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#else
    float s = 0;
    for (int i = 0; i < WIDTH<float>; i++) s += v[i];
    return s;
#endif
}
INLINE double sum(V<double> v) { return (v[0] + v[1]) + (v[2] + v[3]); }

template <class T> INLINE T largest(V<T> v) {
    T most = v[0];
    for (int i = 1; i < WIDTH<T>; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x: float within 2e-7 relative and at least 1e-38 (Cephes' polynomial); double as the C library has it
INLINE V<float> exponential(V<float> x) {
    x = smaller<float>(all(88.0f), larger<float>(all(-87.3f), x));  // in this order what is not a number stays so
    Bits<float> n = __builtin_convertvector(x * 1.44269504f + 127.5f, Bits<float>);  // above 0, so cutting rounds down
    V<float> whole = __builtin_convertvector(n - 127, V<float>);
    V<float> r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
    // in pairs rather than one after the other: half as many steps wait for each other
    V<float> s = r * r;
    V<float> p = (1.9875691500e-4f * r + 1.3981999507e-3f) * (s * s) + ((8.3334519073e-3f * r + 4.1665795894e-2f) * s +
                 (1.6666665459e-1f * r + 0.5f));
    return (p * s + (r + 1.0f)) * (V<float>)(n << 23);
}
INLINE V<double> exponential(V<double> x) {
    for (int i = 0; i < WIDTH<double>; i++) x[i] = std::exp(x[i]);
    return x;
}

// 1 / v for v in [1, 2]. In float: an estimate and a step of Newton's, 2e-7.
INLINE V<float> reciprocal(V<float> v) {
#ifdef __AVX__
    V<float> y = (V<float>)_mm256_rcp_ps((__m256)v);
    return y * (2.0f - v * y);
#else
    return 1.0f / v;
#endif
}
INLINE V<double> reciprocal(V<double> v) { return 1.0 / v; }

// log(1 + x) for x in [0, 1]: float within 4e-7 relative, x times a polynomial fitted at Chebyshev's points
INLINE V<float> log_1_plus(V<float> x) {
    constexpr float c[] = {0.999999965f, -0.499994357f, 0.333179343f, -0.248339455f, 0.190713096f, -0.135906002f, 0.0773807383f, -0.0289919564f, 0.00510582579f};
    V<float> x2 = x * x, x4 = x2 * x2;
    V<float> p = (((c[7] * x + c[6]) * x2 + (c[5] * x + c[4])) * x4 + ((c[3] * x + c[2]) * x2 + (c[1] * x + c[0]))) + c[8] * (x4 * x4);
    return p * x;
}
INLINE V<double> log_1_plus(V<double> x) {
    for (int i = 0; i < WIDTH<double>; i++) x[i] = std::log1p(x[i]);
    return x;
}
