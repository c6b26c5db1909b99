/* The passes of PowerSGD over its matrices, for float32 on a CPU. `native.py` compiles, loads and calls this file.
 *
 * Large gradients and their error buffers do not fit into a cache, so that time is the number of times they travel from
 * memory and back. A pass is one such journey, whatever the rank. Small ones are many, so that time is what a call
 * costs. One call makes passes over all matrices that it is given:
 *
 *     project_left    M = G + s E;  P = M Q         reads G and E, writes M into G
 *     project_right   M = G + s E;  Q = Mᵀ P        the same; without E it only reads
 *     decompress      E = M − P_w Q_wᵀ;  G = P Qᵀ   reads M, writes E and G; the factors of E are this rank's own
 *
 *     n, m   rows and columns of the matrices G, E and M, which lie row by row
 *     r      rank; factors lie rank first: the left ones (r, n), the right ones (r, m)
 *     s      scale of the loss, in units of the one that E was computed at
 *
 * Results depend neither on the number of threads nor on where the matrices lie: every sum runs over its terms in one
 * fixed order.
 */

#include <stdint.h>
#include <string.h>
#if defined __AVX__
#include <immintrin.h>
#endif

#if defined __AVX512F__
#define LANES 16
#elif defined __AVX__
#define LANES 8
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* From this rank on, rows are worked on in blocks, so that what is loaded serves several sums. With fewer ranks there
 * is little to load, and rows go one by one, since memory is fastest where it is read in a single line. */
#define BLOCKS_FROM 4
/* Of a block: rows, those that project_right adds up, vectors of columns, and ranks. So many sums fit into registers,
 * and are enough to keep a processor busy while others are not ready. */
#define ROWS 4
#define ROWS_SUMMED 16
#define VECTORS 2
#define RANKS_LEFT 3
#define RANKS_RIGHT 4
/* Ranks that decompress adds up before it goes on to the next columns. */
#define RANKS_DECOMPRESSED 64
/* How far ahead to prefetch: to the next block of rows, or 2 KiB along the row. */
#define AHEAD(T) ((T) > 1 ? (T) * m : 512)
/* Below this many elements a thread is not worth waking. */
#define ELEMENTS_PER_THREAD 32768
/* Columns of one thread's part in project_right are a multiple of this: whole cache lines. */
#define COLUMNS 64

#define INLINE static inline __attribute__((always_inline))
#define EACH(i, end) _Pragma("GCC unroll 8") for (int i = 0; i < (end); i++)

INLINE vec load(const float *from) { return *(const unaligned *)from; }
INLINE void store(float *to, vec value) { *(unaligned *)to = value; }

/* Write without reading the old content into the cache first. */
INLINE void stream(float *to, vec value) {
#if defined __AVX512F__
    if ((uintptr_t)to % sizeof value == 0) { _mm512_stream_ps(to, (__m512)value); return; }
#elif defined __AVX__
    if ((uintptr_t)to % sizeof value == 0) { _mm256_stream_ps(to, (__m256)value); return; }
#endif
    store(to, value);
}

/* x + a · b, rounded once where the processor can. Said outright, since compilers decide from one loop to another. */
INLINE vec add_product(vec x, vec a, vec b) {
#if defined __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)x);
#elif defined __FMA__
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)x);
#else
    return x + a * b;
#endif
}

INLINE float add_scalars(float x, float a, float b) {
#if defined __FMA__
    return __builtin_fmaf(a, b, x);
#else
    return x + a * b;
#endif
}

INLINE vec broadcast(float value) { return value - (vec){0}; }

INLINE float total(vec value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}

/* The loops, for R ranks, T rows and V vectors of columns: constants, so that each combination is compiled by itself
 * and its sums stay in registers. */

INLINE void left_rows(const int R, const int T, long n, long m, float s, float *g, const float *e, const float *q,
                      float *p) {
    vec sums[ROWS][RANKS_LEFT];
    float rest[ROWS][RANKS_LEFT];
    long j = 0;
    EACH(t, T) EACH(k, R) sums[t][k] = (vec){0}, rest[t][k] = 0;
    for (; j + LANES <= m; j += LANES) {
        vec y[RANKS_LEFT];
        EACH(k, R) y[k] = load(q + k * m + j);
        EACH(t, T) {
            vec x = load(g + t * m + j);
            if (e) {
                __builtin_prefetch(g + t * m + j + AHEAD(T));
                store(g + t * m + j, x = add_product(x, broadcast(s), load(e + t * m + j)));
                __builtin_prefetch(e + t * m + j + AHEAD(T));
            }
            EACH(k, R) sums[t][k] = add_product(sums[t][k], x, y[k]);
        }
    }
    for (; j < m; j++) EACH(t, T) {
        if (e) g[t * m + j] = add_scalars(g[t * m + j], s, e[t * m + j]);
        EACH(k, R) rest[t][k] = add_scalars(rest[t][k], g[t * m + j], q[k * m + j]);
    }
    EACH(t, T) EACH(k, R) p[k * n + t] = total(sums[t][k]) + rest[t][k];
}

INLINE void right_columns(const int R, const int T, const int V, long n, long m, float s, float *g, const float *e,
                          const float *p, float *q) {
    vec sums[RANKS_RIGHT][VECTORS];
    EACH(k, R) EACH(v, V) sums[k][v] = load(q + k * m + v * LANES);
    EACH(t, T) {
        vec x[VECTORS];
        EACH(v, V) {
            x[v] = load(g + t * m + v * LANES);
            if (e) store(g + t * m + v * LANES, x[v] = add_product(x[v], broadcast(s), load(e + t * m + v * LANES)));
        }
        EACH(k, R) EACH(v, V) sums[k][v] = add_product(sums[k][v], broadcast(p[k * n + t]), x[v]);
    }
    EACH(k, R) EACH(v, V) store(q + k * m + v * LANES, sums[k][v]);
}

/* For R ranks, which are all; where R is 0 for r of them, in chunks. */
INLINE void right_ranks(const int R, const int T, const int V, long r, long n, long m, float s, float *g,
                        const float *e, const float *p, float *q) {
    EACH(t, T) {
        __builtin_prefetch(g + t * m + AHEAD(T));
        if (e) __builtin_prefetch(e + t * m + AHEAD(T));
    }
    right_columns(R ? R : RANKS_RIGHT, T, V, n, m, s, g, e, p, q);
    if (R) return;
    long k = RANKS_RIGHT;
    for (; k + RANKS_RIGHT <= r; k += RANKS_RIGHT)
        right_columns(RANKS_RIGHT, T, V, n, m, s, g, NULL, p + k * n, q + k * m);
    for (; k < r; k++) right_columns(1, T, V, n, m, s, g, NULL, p + k * n, q + k * m);
}

INLINE void right_rows(const int R, const int T, long width, long r, long n, long m, float s, float *g, const float *e,
                       const float *p, float *q) {
    long j = 0;
    for (; T > 1 && j + VECTORS * LANES <= width; j += VECTORS * LANES)
        right_ranks(R, T, VECTORS, r, n, m, s, g + j, e ? e + j : NULL, p, q + j);
    for (; j + LANES <= width; j += LANES)
        right_ranks(R, T, 1, r, n, m, s, g + j, e ? e + j : NULL, p, q + j);
    for (; j < width; j++) EACH(t, T) {
        if (e) g[t * m + j] = add_scalars(g[t * m + j], s, e[t * m + j]);
        for (long k = 0; k < r; k++) q[k * m + j] = add_scalars(q[k * m + j], g[t * m + j], p[k * n + t]);
    }
}

/* X += P Qᵀ for factors of r ranks, the left one packed as (r, T). */
INLINE void add_products(const int T, const int V, long r, long m, const float *p, const float *q,
                         vec x[ROWS][VECTORS]) {
    for (long k = 0; k < r; k++) {
        vec right[VECTORS];
        EACH(v, V) right[v] = load(q + k * m + v * LANES);
        EACH(t, T) EACH(v, V) x[t][v] = add_product(x[t][v], broadcast(p[k * T + t]), right[v]);
    }
}

/* `first` and `last` say which chunk of the ranks this is. */
INLINE void decompress_columns(const int T, const int V, int first, int last, long r, long m, float *g, float *e,
                               const float *p, const float *q, const float *p_own, const float *q_own) {
    vec x[ROWS][VECTORS];
    if (e) {
        const float *matrix = first ? g : e;
        EACH(t, T) EACH(v, V) x[t][v] = load(matrix + t * m + v * LANES);
        EACH(t, T) __builtin_prefetch(g + t * m + AHEAD(T));
        add_products(T, V, r, m, p_own, q_own, x);
        EACH(t, T) EACH(v, V)
            if (first && last) stream(e + t * m + v * LANES, x[t][v]);
            else store(e + t * m + v * LANES, x[t][v]);
    }
    EACH(t, T) EACH(v, V) x[t][v] = first ? (vec){0} : load(g + t * m + v * LANES);
    add_products(T, V, r, m, p, q, x);
    EACH(t, T) EACH(v, V) store(g + t * m + v * LANES, x[t][v]);
}

INLINE void decompress_rows(const int T, int first, int last, long r, long n, long m, float *g, float *e,
                            const float *p, const float *q, const float *p_own, const float *q_own) {
    float left[RANKS_DECOMPRESSED * ROWS], left_own[RANKS_DECOMPRESSED * ROWS];
    for (long k = 0; k < r; k++) EACH(t, T) {
        left[k * T + t] = p[k * n + t];
        if (e) left_own[k * T + t] = -p_own[k * n + t];
    }
    long j = 0;
    for (; T > 1 && j + VECTORS * LANES <= m; j += VECTORS * LANES)
        decompress_columns(T, VECTORS, first, last, r, m, g + j, e ? e + j : NULL, left, q + j, left_own, q_own + j);
    for (; j + LANES <= m; j += LANES)
        decompress_columns(T, 1, first, last, r, m, g + j, e ? e + j : NULL, left, q + j, left_own, q_own + j);
    for (; j < m; j++) EACH(t, T) {
        float x = e ? (first ? g : e)[t * m + j] : 0, y = first ? 0 : g[t * m + j];
        for (long k = 0; k < r; k++) y = add_scalars(y, left[k * T + t], q[k * m + j]);
        if (e) for (long k = 0; k < r; k++) x = add_scalars(x, left_own[k * T + t], q_own[k * m + j]);
        if (e) e[t * m + j] = x;
        g[t * m + j] = y;
    }
}

#define BY_RANK(rank, loop, ...) \
    switch (rank) { \
        case 1: loop(1, __VA_ARGS__); break; \
        case 2: loop(2, __VA_ARGS__); break; \
        default: loop(3, __VA_ARGS__); \
    }

#define PARALLEL(threads) _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

/* Where E is NULL, nothing is added, or kept. */

static void project_left(int threads, long r, long n, long m, float s, float *g, const float *e, const float *q,
                         float *p) {
    PARALLEL(threads)
    for (long i = 0; i < n; i += ROWS) {
        if (r >= BLOCKS_FROM && n - i >= ROWS) {
            left_rows(RANKS_LEFT, ROWS, n, m, s, g + i * m, e ? e + i * m : NULL, q, p + i);
            long k = RANKS_LEFT;
            for (; k + RANKS_LEFT <= r; k += RANKS_LEFT)
                left_rows(RANKS_LEFT, ROWS, n, m, s, g + i * m, NULL, q + k * m, p + k * n + i);
            for (; k < r; k++) left_rows(1, ROWS, n, m, s, g + i * m, NULL, q + k * m, p + k * n + i);
        } else
            for (long row = i; row < n && row < i + ROWS; row++)
                for (long k = 0; k < r; k += RANKS_LEFT)
                    BY_RANK(r - k, left_rows, 1, n, m, s, g + row * m, e && !k ? e + row * m : NULL, q + k * m,
                            p + k * n + row)
    }
}

static void project_right(int threads, long r, long n, long m, float s, float *g, const float *e, const float *p,
                          float *q) {
    long part = (m / threads / COLUMNS + 1) * COLUMNS;
    memset(q, 0, r * m * sizeof *q);
    PARALLEL(threads)
    for (long j = 0; j < m; j += part) {
        long i = 0, width = m - j < part ? m - j : part;
        for (; r >= BLOCKS_FROM && i + ROWS_SUMMED <= n; i += ROWS_SUMMED)
            right_rows(0, ROWS_SUMMED, width, r, n, m, s, g + i * m + j, e ? e + i * m + j : NULL, p + i, q + j);
        for (; i < n; i++)
            if (r >= BLOCKS_FROM)
                right_rows(0, 1, width, r, n, m, s, g + i * m + j, e ? e + i * m + j : NULL, p + i, q + j);
            else
                BY_RANK(r, right_rows, 1, width, r, n, m, s, g + i * m + j, e ? e + i * m + j : NULL, p + i, q + j)
    }
}

static void decompress(int threads, long r, long n, long m, float *g, float *e, const float *p, const float *q,
                       const float *p_own, const float *q_own) {
    PARALLEL(threads)
    for (long i = 0; i < n; i += ROWS) {
        int block = r >= BLOCKS_FROM && n - i >= ROWS;
        for (long row = i; row < n && row < i + ROWS; row += block ? ROWS : 1)
            for (long k = 0; k < r; k += RANKS_DECOMPRESSED) {
                long some = r - k < RANKS_DECOMPRESSED ? r - k : RANKS_DECOMPRESSED;
                int last = k + some == r;
#define ROWS_OF(rank, T) \
    decompress_rows(T, !k, last, rank, n, m, g + row * m, e ? e + row * m : NULL, p + k * n + row, q + k * m, \
                    p_own + k * n + row, q_own + k * m)
                if (block) ROWS_OF(some, ROWS);
                else if (r == 1) ROWS_OF(1, 1);
                else if (r == 2) ROWS_OF(2, 1);
                else ROWS_OF(some, 1);
            }
    }
#if defined __AVX__
    _mm_sfence(); /* What was streamed is seen by every thread that reads it later. */
#endif
}

/* What is to be done with one matrix: a row of the table that `native.py` makes. */
enum { PROJECT_LEFT, PROJECT_RIGHT, DECOMPRESS };
struct pass {
    int64_t kind, r, n, m;
    float *g, *e, *p, *q;
    const float *p_own, *q_own;
};

/* How many threads a matrix is worth waking. */
static int64_t worth(const struct pass *a, int threads) {
    int64_t most = a->n * a->m / ELEMENTS_PER_THREAD;
    return most < 1 ? 1 : most < threads ? most : threads;
}

static void make(int threads, float s, const struct pass *a) {
    switch (a->kind) {
        case PROJECT_LEFT: project_left(threads, a->r, a->n, a->m, s, a->g, a->e, a->q, a->p); break;
        case PROJECT_RIGHT: project_right(threads, a->r, a->n, a->m, s, a->g, a->e, a->p, a->q); break;
        default: decompress(threads, a->r, a->n, a->m, a->g, a->e, a->p, a->q, a->p_own, a->q_own);
    }
}

/* Large matrices are parted among the threads one after the other, and small ones among them all at once. */
void make_passes(int threads, float s, int64_t count, const struct pass *all) {
    int64_t small = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t of_this = worth(all + i, threads);
        if (of_this > 1) make(of_this, s, all + i);
        else small += all[i].n * all[i].m;
    }
    int together = small < 2 * ELEMENTS_PER_THREAD ? 1 : threads;
    _Pragma("omp parallel for schedule(dynamic) num_threads(together) if (together > 1)")
    for (int64_t i = 0; i < count; i++)
        if (worth(all + i, threads) == 1) make(1, s, all + i);
}
