// Threads: parts of a kernel's work, on the OpenMP threads that torch's own operations use.
//
// Threads of our own would share the cores with torch's, which wait for their next operation awake.
#pragma once
#include <algorithm>

#include "vectors.h"

// Call f(first, last) for parts of range(count), which begin at multiples of `multiple`. No part writes what another one
// reads or writes, so that the result does not depend on the number of threads.
template <class F> static void in_parts(i64 count, i64 multiple, i64 threads, F f) {
    const i64 pieces = (count + multiple - 1) / multiple, parts = std::max<i64>(1, std::min(threads, pieces));
#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (i64 part = 0; part < parts; part++)
        f(std::min(count, pieces * part / parts * multiple), part + 1 == parts ? count : std::min(count, pieces * (part + 1) / parts * multiple));
}

// Give Python KERNEL(const STRUCT<T>*, first, last), for float and double, as KERNEL_float and KERNEL_double.
#define EXPORT(KERNEL, STRUCT)                                                                              \
    extern "C" void KERNEL##_float(const STRUCT<float>* a, i64 count, i64 multiple, i64 threads) {          \
        in_parts(count, multiple, threads, [=](i64 first, i64 last) { KERNEL(a, first, last); });           \
    }                                                                                                       \
    extern "C" void KERNEL##_double(const STRUCT<double>* a, i64 count, i64 multiple, i64 threads) {        \
        in_parts(count, multiple, threads, [=](i64 first, i64 last) { KERNEL(a, first, last); });           \
    }
