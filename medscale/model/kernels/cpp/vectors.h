// Numbers side by side: what the kernels need of vector instructions, in float and in double.
//
// The compiler's own vector types do arithmetic, comparison and selection on any processor; the few things they lack
// come as AVX instructions where there are any, else lane by lane.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __SSE__
#include <immintrin.h>
#endif

#ifdef __SSE__
// While it lives, this thread takes what is below 1e-38 (in double 1e-308) for 0: processors are slow with such
// numbers, and weights of easy negatives are full of them: without, a step of 64 sub-models takes 8% longer.
class TinyIsZero {
    unsigned before = _mm_getcsr();

  public:
    TinyIsZero() { _mm_setcsr(before | 0x8040); }  // flush results to zero, and read operands as zero
    ~TinyIsZero() { _mm_setcsr(before); }
};
#else
struct TinyIsZero {
    TinyIsZero() {}
};
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

INLINE float largest(V<float> v) {
#ifdef __AVX__
    __m128 m = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
    float most = v[0];
    for (int i = 1; i < WIDTH<float>; i++) most = v[i] > most ? v[i] : most;
    return most;
#endif
}
INLINE double largest(V<double> v) {
    double most = v[0];
    for (int i = 1; i < WIDTH<double>; i++) most = v[i] > most ? v[i] : most;
    return most;
}

// Two vectors, worked on in turn. A chain of operations that wait for each other is longer than the processor's queue of
// waiting operations, so that the next vector's would not begin meanwhile: chains overlap where the code takes turns.
template <class T> struct Pair {
    V<T> a, b;
};
// numbers in it
template <class T> constexpr i64 PAIR = 2 * WIDTH<T>;
#define IN_TURN(OPERATOR)                                                                                         \
    template <class T> INLINE Pair<T> operator OPERATOR(Pair<T> x, Pair<T> y) { return {x.a OPERATOR y.a, x.b OPERATOR y.b}; } \
    template <class T> INLINE Pair<T> operator OPERATOR(T x, Pair<T> y) { return {x OPERATOR y.a, x OPERATOR y.b}; }          \
    template <class T> INLINE Pair<T> operator OPERATOR(Pair<T> x, T y) { return {x.a OPERATOR y, x.b OPERATOR y}; }
IN_TURN(+)
IN_TURN(-)
IN_TURN(*)
IN_TURN(/)
#undef IN_TURN
template <class T> INLINE Pair<T> operator-(Pair<T> x) { return {-x.a, -x.b}; }
template <class T> INLINE Pair<T>& operator+=(Pair<T>& x, Pair<T> y) { return x = x + y; }
template <class T> INLINE Pair<T> load_pair(const T* p) { return {load(p), load(p + WIDTH<T>)}; }
template <class T> INLINE void store(T* p, Pair<T> x) { store(p, x.a), store(p + WIDTH<T>, x.b); }
template <class T> INLINE T sum(Pair<T> x) { return sum(x.a + x.b); }
template <class T> INLINE T largest(Pair<T> x) { return largest(larger<T>(x.a, x.b)); }
template <class T> INLINE Pair<T> absolute(Pair<T> x) { return {absolute<T>(x.a), absolute<T>(x.b)}; }
template <class T> INLINE Pair<T> larger(T x, Pair<T> y) { return {larger<T>(all(x), y.a), larger<T>(all(x), y.b)}; }
template <class T> INLINE Pair<T> larger(Pair<T> x, Pair<T> y) { return {larger<T>(x.a, y.a), larger<T>(x.b, y.b)}; }
template <class T> INLINE Pair<T> smaller(T x, Pair<T> y) { return {smaller<T>(all(x), y.a), smaller<T>(all(x), y.b)}; }
// x > limit ? y : otherwise
template <class T> INLINE Pair<T> where_above(Pair<T> x, T limit, Pair<T> y, T otherwise) {
    return {x.a > limit ? y.a : all(otherwise), x.b > limit ? y.b : all(otherwise)};
}

// v < 0 ? x : y, by the sign alone
template <class T> INLINE V<T> where_negative(V<T> v, V<T> x, V<T> y) {
#ifdef __AVX__
    if constexpr (std::is_same_v<T, float>) return (V<T>)_mm256_blendv_ps((__m256)y, (__m256)x, (__m256)v);
#endif
    return v < 0 ? x : y;
}
template <class T> INLINE Pair<T> where_negative(Pair<T> v, Pair<T> x, Pair<T> y) {
    return {where_negative<T>(v.a, x.a, y.a), where_negative<T>(v.b, x.b, y.b)};
}

// p x 2^n, where n was added to 1.5 x 2^23
INLINE V<float> scaled_by_power(V<float> p, V<float> rounded) { return (V<float>)((Bits<float>)p + ((Bits<float>)rounded << 23)); }
INLINE Pair<float> scaled_by_power(Pair<float> p, Pair<float> rounded) {
    return {scaled_by_power(p.a, rounded.a), scaled_by_power(p.b, rounded.b)};
}

// e^x for x up to 88: float within 2e-7 relative and at least 1e-38; double as the C library has it
template <class X> INLINE X exponential_in_float(X x) {
    // added to 1.5 x 2^23 a number is rounded to a whole one, which is then in the lowest bits
    X rounded = x * 1.44269504f + 12582912.0f, whole = rounded - 12582912.0f;
    X r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f, r2 = r * r;
    // 1 + r + a polynomial fitted to the smallest relative error (1.1e-7) where |r| <= log(2) / 2
    X high = 8.312520325e-3f * r + 4.189015709e-2f, low = 1.666711465e-1f * r + 4.999923149e-1f;
    return scaled_by_power((high * r2 + low) * r2 + (r + 1.0f), rounded);
}
// what is not a number stays so: larger() takes its second
INLINE V<float> exponential(V<float> x) { return exponential_in_float(larger<float>(all(-87.3f), x)); }
INLINE Pair<float> exponential(Pair<float> x) { return exponential_in_float(larger(-87.3f, x)); }
INLINE V<double> exponential(V<double> x) {
    for (int i = 0; i < WIDTH<double>; i++) x[i] = std::exp(x[i]);
    return x;
}
INLINE Pair<double> exponential(Pair<double> x) { return {exponential(x.a), exponential(x.b)}; }

template <class T> constexpr T LOG2_E = T(1.4426950408889634);

// 2^x for x up to 127: float within 2e-7 relative and at least 2^-126; double as the C library has it
INLINE Pair<float> power_of_two(Pair<float> x) {
    x = larger(-126.0f, x);
    Pair<float> rounded = x + 12582912.0f, r = x - (rounded - 12582912.0f), r2 = r * r;
    // the polynomial of e^x, whose r is this one's times log(2)
    Pair<float> high = 1.330025677e-3f * r + 9.669718542e-3f, low = 5.550560056e-2f * r + 2.402228146e-1f;
    return scaled_by_power((high * r2 + low) * r2 + (0.6931471806f * r + 1.0f), rounded);
}
INLINE Pair<double> power_of_two(Pair<double> x) {
    for (int i = 0; i < WIDTH<double>; i++) x.a[i] = std::exp2(x.a[i]), x.b[i] = std::exp2(x.b[i]);
    return x;
}

// 1 / v. In float, where neither is near the ends of its range: an estimate and a step of Newton's, 2e-7.
INLINE V<float> estimated_reciprocal(V<float> v) {
#ifdef __AVX__
    return (V<float>)_mm256_rcp_ps((__m256)v);
#else
    return 1.0f / v;
#endif
}
INLINE Pair<float> reciprocal(Pair<float> v) {
    Pair<float> y = {estimated_reciprocal(v.a), estimated_reciprocal(v.b)};
    return y * (2.0f - v * y);
}
INLINE Pair<double> reciprocal(Pair<double> v) { return 1.0 / v; }

// log(1 + x) for x in [0, 1]: float within 2e-6 relative, x times a polynomial of the smallest relative error
INLINE Pair<float> log_1_plus(Pair<float> x) {
    constexpr float c[] = {0.999998731f, -0.499869634f, 0.331094256f, -0.235037762f, 0.14922253f, -0.06640082f, 0.0141407594f};
    // by x^2 and no higher power: those of small x would be denormal, which is slow
    Pair<float> x2 = x * x, p = c[6] * x2 + (c[5] * x + c[4]);
    p = p * x2 + (c[3] * x + c[2]);
    return (p * x2 + (c[1] * x + c[0])) * x;
}
INLINE Pair<double> log_1_plus(Pair<double> x) {
    for (int i = 0; i < WIDTH<double>; i++) x.a[i] = std::log1p(x.a[i]), x.b[i] = std::log1p(x.b[i]);
    return x;
}
