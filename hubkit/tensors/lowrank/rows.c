/* A few rows through low-rank factors of their own, in bfloat16 with sums in single precision: what a step of decoding
 * needs. Every factor is read once, where it lies. Little-endian machines only. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(HUBKIT_PLAIN)
#define VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VECTORS
#endif
#define LANES 32
#define STRIP 64

static inline float wide(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* to nearest, ties to even, as torch rounds */
static inline uint16_t rounded(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

VECTORS
static float dot(const uint16_t *a, const uint16_t *b, int64_t count)
{
    float lanes[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] += wide(a[i + k]) * wide(b[i + k]);
    for (; i < count; i++)
        sum += wide(a[i]) * wide(b[i]);
    for (int k = 0; k < LANES; k++)
        sum += lanes[k];
    return sum;
}

/* y[0..width) += scale * sum over r of low[r] * up[r], up (rank, STRIP) */
VECTORS
static void add_strip(const float *low, const uint16_t *up, float scale, int64_t rank, int64_t width, uint16_t *y)
{
    float sums[STRIP] = {0};
    for (int64_t r = 0; r < rank; r++)
        for (int k = 0; k < STRIP; k++)
            sums[k] += low[r] * wide(up[r * STRIP + k]);
    for (int64_t k = 0; k < width; k++)
        y[k] = rounded(wide(y[k]) + scale * sums[k]);
}

/* low (rows, rank) = x (rows, in) times down[mix[row]] (rank, in) transposed; mix -1: the row has none */
void hubkit_down(const uint16_t *x, const uint16_t *down, const int64_t *mix, float *low, int64_t rows, int64_t in,
                 int64_t rank, int32_t threads)
{
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < rows * rank; at++) {
        int64_t row = at / rank, r = at % rank;
        low[at] = mix[row] < 0 ? 0 : dot(down + (mix[row] * rank + r) * in, x + row * in, in);
    }
}

/* y (rows, out) += scale[mix[row]] times low (rows, stride), `rank` of it, times up[mix[row]] (strips, rank, STRIP):
 * what one strip of y needs lies together, which memory likes; behind the last output there are zeros */
void hubkit_up(const float *low, const uint16_t *up, const float *scale, const int64_t *mix, uint16_t *y, int64_t rows,
               int64_t stride, int64_t rank, int64_t out, int32_t threads)
{
    int64_t strips = (out + STRIP - 1) / STRIP;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t at = 0; at < rows * strips; at++) {
        int64_t row = at / strips, strip = at % strips, left = out - strip * STRIP;
        if (mix[row] >= 0)
            add_strip(low + row * stride, up + (mix[row] * strips + strip) * rank * STRIP, scale[mix[row]], rank,
                      left < STRIP ? left : STRIP, y + row * out + strip * STRIP);
    }
}
