#pragma once

// Rows of Q8_0 by weights of 4 bits that a table makes bytes of (MXFP4, Q4_0, IQ4_NL), 8 columns interleaved by 8 bytes.
//
// The same sums as gemv_q4_b32_8x8_q8_0_lut_avx: integers are exact in any order, and each column's blocks are scaled and
// added as there. Fewer steps lead to them. The table's values are made positive by an offset, as the instruction wants one
// operand without a sign, and the offset times the row's sum is taken off a block's result; there the sign goes from one
// operand to the other at each step. Columns stay where they lie: the two halves of a column's sum are added at the end of a
// block, in place of an exchange before each product. And a block of weights is unpacked once for up to 4 rows.
//
// Included by repack.cpp alone, which has the blocks and the tables.

#if defined(__AVX2__) && defined(__F16C__)

#include <cstring>

// whether four products of bytes are added by one instruction
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define DS4_MTP_LUT_512
#if defined(__AVX512VNNI__)
#define DS4_MTP_LUT_VNNI
#endif
#elif defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define DS4_MTP_LUT_VNNI
#endif

// what makes all of a table's values positive
template <typename block_tx8> struct ds4_mtp_lut;
template <> struct ds4_mtp_lut<block_q4_0x8>   { static constexpr int offset = 8; };
template <> struct ds4_mtp_lut<block_mxfp4x8>  { static constexpr int offset = 12; };
template <> struct ds4_mtp_lut<block_iq4_nlx8> { static constexpr int offset = 127; };

// a row's scales and sums are on the stack
static constexpr int DS4_MTP_LUT_BLOCKS = 512;

// without VNNI two products are added in 16 bits: IQ4_NL's are too large
template <typename block_tx8> static bool ds4_mtp_lut_takes(int n) {
#if defined(DS4_MTP_LUT_VNNI)
    return n/QK8_0 <= DS4_MTP_LUT_BLOCKS;
#else
    return n/QK8_0 <= DS4_MTP_LUT_BLOCKS && ds4_mtp_lut<block_tx8>::offset < 64;
#endif
}

template <typename block_tx8> static inline __m256 ds4_mtp_lut_scales(const block_tx8 & b) {
    if constexpr (std::is_same_v<block_tx8, block_mxfp4x8>) {
        // ggml_e8m0_to_fp32_half
        const __m256i e     = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *) b.e));
        const __m256i least = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), e);
        const __m256i other = _mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23);
        return _mm256_castsi256_ps(_mm256_blendv_epi8(other, least, _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e)));
    } else {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) b.d));
    }
}

static inline long long ds4_mtp_lut_8(const int8_t * y) {
    long long bytes;
    memcpy(&bytes, y, sizeof(bytes));
    return bytes;
}

#if defined(DS4_MTP_LUT_512)

static inline __m512i ds4_mtp_lut_dot(__m512i acc, __m512i x, __m512i y) {
#if defined(DS4_MTP_LUT_VNNI)
    return _mm512_dpbusd_epi32(acc, x, y);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(x, y), _mm512_set1_epi16(1)));
#endif
}

#endif

// NR rows of n numbers each, at rows, by nc columns; results to each row's out
template <typename block_tx8, int NR>
static void ds4_mtp_lut_rows(int n, float * const * out, const void * vx, const block_q8_0 * const * rows, int nc, const __m128i table) {
    constexpr int offset = ds4_mtp_lut<block_tx8>::offset;

    const int nb = n/QK8_0;
    const __m128i positive = _mm_add_epi8(table, _mm_set1_epi8(offset));
#if defined(DS4_MTP_LUT_512)
    const __m512i lut = _mm512_broadcast_i32x4(positive);
    const __m512i low = _mm512_set1_epi8(0x0F);
#else
    const __m256i lut = _mm256_broadcastsi128_si256(positive);
    const __m256i low = _mm256_set1_epi8(0x0F);
#endif

    float   scale[NR][DS4_MTP_LUT_BLOCKS];
    int32_t taken[NR][DS4_MTP_LUT_BLOCKS];
    for (int r = 0; r < NR; ++r) {
        for (int b = 0; b < nb; ++b) {
            int sum = 0;
            for (int i = 0; i < QK8_0; ++i) {
                sum += rows[r][b].qs[i];
            }
            scale[r][b] = GGML_CPU_FP16_TO_FP32(rows[r][b].d);
            taken[r][b] = offset*sum;
        }
    }

    for (int x = 0; x < nc/8; ++x) {
        const block_tx8 * w = (const block_tx8 *) vx + (size_t) x*nb;
        __m256 acc[NR];
        for (int r = 0; r < NR; ++r) {
            acc[r] = _mm256_setzero_ps();
        }
        for (int b = 0; b < nb; ++b) {
            ds4_mtp_ask_ahead(w + b, sizeof(block_tx8));
            const __m256 column = ds4_mtp_lut_scales(w[b]);
#if defined(DS4_MTP_LUT_512)
            // 8 bytes of each column: 0 to 7 and, above them, 16 to 23; then 8 to 15 and 24 to 31
            const __m512i q0 = _mm512_loadu_si512(w[b].qs);
            const __m512i q1 = _mm512_loadu_si512(w[b].qs + 64);
            const __m512i w0 = _mm512_shuffle_epi8(lut, _mm512_and_si512(q0, low));
            const __m512i w1 = _mm512_shuffle_epi8(lut, _mm512_and_si512(q1, low));
            const __m512i w2 = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(q0, 4), low));
            const __m512i w3 = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(q1, 4), low));
#else
            __m256i weights[8]; // columns 0 to 3 and 4 to 7 of each 8 bytes
            for (int h = 0; h < 2; ++h) {
                for (int c = 0; c < 2; ++c) {
                    const __m256i q = _mm256_loadu_si256((const __m256i *) w[b].qs + 2*h + c);
                    weights[2*h + c]     = _mm256_shuffle_epi8(lut, _mm256_and_si256(q, low));
                    weights[2*h + c + 4] = _mm256_shuffle_epi8(lut, _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
                }
            }
#endif
            for (int r = 0; r < NR; ++r) {
                const int8_t * y = rows[r][b].qs;
#if defined(DS4_MTP_LUT_512)
                __m512i one = ds4_mtp_lut_dot(_mm512_setzero_si512(), w0, _mm512_set1_epi64(ds4_mtp_lut_8(y)));
                __m512i two = ds4_mtp_lut_dot(_mm512_setzero_si512(), w1, _mm512_set1_epi64(ds4_mtp_lut_8(y + 8)));
                one = ds4_mtp_lut_dot(one, w2, _mm512_set1_epi64(ds4_mtp_lut_8(y + 16)));
                two = ds4_mtp_lut_dot(two, w3, _mm512_set1_epi64(ds4_mtp_lut_8(y + 24)));
                const __m512i halves = _mm512_add_epi32(one, two);
                __m256i sums = _mm512_cvtepi64_epi32(_mm512_add_epi32(halves, _mm512_srli_epi64(halves, 32)));
#else
                __m256i first = _mm256_setzero_si256(), last = _mm256_setzero_si256();
                for (int i = 0; i < 4; ++i) {
                    const __m256i eight = _mm256_set1_epi64x(ds4_mtp_lut_8(y + 8*i));
                    first = mul_sum_us8_pairs_acc_int32x8(first, weights[2*i],     eight);
                    last  = mul_sum_us8_pairs_acc_int32x8(last,  weights[2*i + 1], eight);
                }
                __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, last), 0xD8);
#endif
                sums = _mm256_sub_epi32(sums, _mm256_set1_epi32(taken[r][b]));
                acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(column, _mm256_set1_ps(scale[r][b])), acc[r]);
            }
        }
        for (int r = 0; r < NR; ++r) {
            _mm256_storeu_ps(out[r] + 8*x, acc[r]);
        }
    }
}

template <typename block_tx8>
static bool ds4_mtp_lut_some_rows(int n, float * const * out, const void * vx, const void * const * vy, int nr, int nc, const __m128i table) {
    if (!ds4_mtp_lut_takes<block_tx8>(n)) {
        return false;
    }
    const block_q8_0 * const * rows = (const block_q8_0 * const *) vy;
    switch (nr) {
        case 1:  ds4_mtp_lut_rows<block_tx8, 1>(n, out, vx, rows, nc, table); return true;
        case 2:  ds4_mtp_lut_rows<block_tx8, 2>(n, out, vx, rows, nc, table); return true;
        case 3:  ds4_mtp_lut_rows<block_tx8, 3>(n, out, vx, rows, nc, table); return true;
        case 4:  ds4_mtp_lut_rows<block_tx8, 4>(n, out, vx, rows, nc, table); return true;
        default: return false;
    }
}

bool ds4_mtp_gemv_rows(enum ggml_type type, int n, float * const * out, const void * vx, const void * const * vy, int nr, int nc) {
    const __m128i q4_0 = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    switch (type) {
        case GGML_TYPE_Q4_0:
            return ds4_mtp_lut_some_rows<block_q4_0x8>(n, out, vx, vy, nr, nc, q4_0);
        case GGML_TYPE_IQ4_NL:
            return ds4_mtp_lut_some_rows<block_iq4_nlx8>(n, out, vx, vy, nr, nc, _mm_loadu_si128((const __m128i *) kvalues_iq4nl));
        case GGML_TYPE_MXFP4:
            return ds4_mtp_lut_some_rows<block_mxfp4x8>(n, out, vx, vy, nr, nc, _mm_loadu_si128((const __m128i *) kvalues_mxfp4));
        default:
            return false;
    }
}

#else

bool ds4_mtp_gemv_rows(enum ggml_type type, int n, float * const * out, const void * vx, const void * const * vy, int nr, int nc) {
    UNUSED(type); UNUSED(n); UNUSED(out); UNUSED(vx); UNUSED(vy); UNUSED(nr); UNUSED(nc);
    return false;
}

#endif
