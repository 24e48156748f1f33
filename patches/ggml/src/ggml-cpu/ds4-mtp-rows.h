#pragma once

// A product with at most this many rows computes each of them with the kernels of a single row, so a row's result does
// not depend on how many went with it. The most that are verified together are 16 drafts and the token before them;
// larger batches are prompts and keep the fast kernels.
#define DS4_MTP_SINGLE_ROWS 17

// As many rows of activations a dot product takes at once, where it can: a block of weights is loaded and unpacked once
// for all of them, and each row's numbers are added in the order of a single row.
#define DS4_MTP_COLUMNS 4

// The number of rows has to be a constant in the loops.
#if defined(_MSC_VER)
#define DS4_MTP_ALWAYS_INLINE static __forceinline
#else
#define DS4_MTP_ALWAYS_INLINE static inline __attribute__((always_inline))
#endif

#include "ggml.h"

#include <stddef.h>

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>

// Weights are asked for so many bytes before they are wanted: what the hardware fetches by itself ends with a page. First
// into L2, which waits for many lines at once, then into L1, which waits for few: so they are near by then.
#define DS4_MTP_FAR  4096
#define DS4_MTP_NEAR 512

// A kernel is about to read the `size` bytes of weights at p.
DS4_MTP_ALWAYS_INLINE void ds4_mtp_ask_ahead(const void * p, size_t size) {
    for (size_t i = 0; i < size; i += 64) {
        _mm_prefetch((const char *) p + DS4_MTP_FAR + i, _MM_HINT_T1);
        _mm_prefetch((const char *) p + DS4_MTP_NEAR + i, _MM_HINT_T0);
    }
}
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Dot products of the row vx of Q8_0 weights with nc <= DS4_MTP_COLUMNS rows at vy, vy + by, ...; results s[0], s[bs], ...
// On x86 with AVX2 (arch/x86/quants.c).
void ds4_mtp_vec_dots_q8_0(int n, float * s, size_t bs, const void * vx, const void * vy, size_t by, int nc);

// Dot products of nx rows of F16 at vx, vx + bx, ... with ny <= DS4_MTP_COLUMNS at vy, vy + by, ..., n numbers each: that of
// rows r and c is s[r + c*bs], in the bits of ggml_vec_dot_f16. On x86 with AVX2 (vec.cpp).
void ds4_mtp_vec_dots_f16(int n, float * s, size_t bs, const void * vx, size_t bx, int nx, const void * vy, size_t by, int ny);

// Products of nr <= DS4_MTP_COLUMNS rows of Q8_0, of n numbers each, with nc columns of weights that lie interleaved by 8.
// False where no kernel takes the type or so many numbers: nothing was computed. On x86 (arch/x86/ds4-mtp-lut.h).
bool ds4_mtp_gemv_rows(enum ggml_type type, int n, float * const * out, const void * vx, const void * const * vy, int nr, int nc);

#ifdef __cplusplus
}
#endif
