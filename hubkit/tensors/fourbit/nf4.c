/* Decoding of weights packed in 4 bits, bit for bit what hubkit/tensors/fourbit/nf4.py computes with torch: built without
 * contraction, so that a product is rounded before a sum. Little-endian machines only. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && !defined(HUBKIT_PLAIN)
#include <immintrin.h>
#endif

typedef struct {
    const uint8_t *codes;      /* two in a byte, the first in the high half */
    const void *absmax;        /* uint8 indices of nested_map where nested_absmax is given, else float */
    const float *nested_absmax, *nested_map, *levels;
    void *out;                 /* uint16_t (bfloat16) or float */
    int64_t count, block, nested_block;
    float offset;
    int32_t half;              /* whether out is bfloat16 */
} Weight;

static float scale_of(const Weight *w, int64_t block)
{
    if (!w->nested_absmax)
        return ((const float *)w->absmax)[block];
    float scaled = w->nested_map[((const uint8_t *)w->absmax)[block]] * w->nested_absmax[block / w->nested_block];
    return scaled + w->offset;
}

/* to nearest, ties to even, as torch rounds */
static uint16_t rounded(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* One block, or what is left of it. Its 16 values are scaled and rounded once, and looked up from there. */
static void to_half(const float *levels, float scale, const uint8_t *codes, int64_t size, uint16_t *out)
{
    uint16_t table[16];
    for (int i = 0; i < 16; i++)
        table[i] = rounded(levels[i] * scale);
    for (int64_t i = 0; i < size / 2; i++) {
        uint32_t pair = table[codes[i] >> 4] | (uint32_t)table[codes[i] & 15] << 16;
        memcpy(out + 2 * i, &pair, 4);
    }
    if (size % 2)
        out[size - 1] = table[codes[size / 2] >> 4];
}

static void to_single(const float *levels, float scale, const uint8_t *codes, int64_t size, float *out)
{
    float table[16];
    for (int i = 0; i < 16; i++)
        table[i] = levels[i] * scale;
    for (int64_t i = 0; i < size / 2; i++) {
        out[2 * i] = table[codes[i] >> 4];
        out[2 * i + 1] = table[codes[i] & 15];
    }
    if (size % 2)
        out[size - 1] = table[codes[size / 2] >> 4];
}

#if defined(__x86_64__) && !defined(HUBKIT_PLAIN)
/* 16 bytes at a time: both codes of a byte side by side are indices into a table that fills a register */
__attribute__((target("avx512f,avx512bw")))
static void to_half_512(const float *levels, float scale, const uint8_t *codes, int64_t size, uint16_t *out)
{
    __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    __m512i bits = _mm512_castps_si512(scaled), low = _mm512_set1_epi32(15);
    __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), even), 16);
    __mmask16 nothing = _mm512_cmp_ps_mask(scaled, scaled, _CMP_UNORD_Q);
    bits = _mm512_mask_mov_epi32(bits, nothing, _mm512_set1_epi32(0x7FC0));
    __m512i table = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(bits));
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) {
        __m512i found = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + i / 2)));
        __m512i second = _mm512_slli_epi32(_mm512_and_si512(found, low), 16);
        __m512i at = _mm512_or_si512(_mm512_srli_epi32(found, 4), second);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(at, table));
    }
    if (i < size)
        to_half(levels, scale, codes + i / 2, size - i, out + i);
}

__attribute__((target("avx512f,avx512bw")))
static void to_single_512(const float *levels, float scale, const uint8_t *codes, int64_t size, float *out)
{
    __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    __m512i low = _mm512_set1_epi64(15);
    int64_t i = 0;
    for (; i + 16 <= size; i += 16) {
        __m512i found = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i *)(codes + i / 2)));
        __m512i second = _mm512_slli_epi64(_mm512_and_si512(found, low), 32);
        __m512i at = _mm512_or_si512(_mm512_srli_epi64(found, 4), second);
        _mm512_storeu_ps(out + i, _mm512_permutexvar_ps(at, table));
    }
    if (i < size)
        to_single(levels, scale, codes + i / 2, size - i, out + i);
}

static int wide(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
#else
#define to_half_512 to_half
#define to_single_512 to_single

static int wide(void)
{
    return 0;
}
#endif

static void decode_block(const Weight *w, int64_t block, int vectors)
{
    int64_t start = block * w->block, left = w->count - start;
    int64_t size = left < w->block ? left : w->block;
    const uint8_t *codes = w->codes + start / 2;
    float scale = scale_of(w, block);
    if (w->half)
        (vectors ? to_half_512 : to_half)(w->levels, scale, codes, size, (uint16_t *)w->out + start);
    else
        (vectors ? to_single_512 : to_single)(w->levels, scale, codes, size, (float *)w->out + start);
}

void hubkit_decode(const Weight *weight, int32_t threads)
{
    int64_t blocks = (weight->count + weight->block - 1) / weight->block;
    int vectors = wide();
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        decode_block(weight, block, vectors);
}
