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

/* Ranks above this are computed in chunks of it, while the rows that they share are in the cache. */
#define CHUNK 4
/* Rows that are worked on together from rank CHUNK on, so that a load of a factor serves them all. With fewer ranks there
 * is little to load, and rows go one by one, since memory is fastest where it is read in a single line. */
#define ROWS 4
#define ROWS_SUMMED 8
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

INLINE float total(vec value) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += value[i];
    return sum;
}

/* The three loops, for R ranks and T rows: constants, so that each combination is compiled by itself and its sums stay
 * in registers. */

INLINE void left_rows(const int R, const int T, long n, long m, float s, float *g, const float *e, const float *q,
                      float *p) {
    vec sums[ROWS][CHUNK];
    float rest[ROWS][CHUNK];
    long j = 0;
    EACH(t, T) EACH(k, R) sums[t][k] = (vec){0}, rest[t][k] = 0;
    for (; j + LANES <= m; j += LANES) {
        vec x[ROWS];
        EACH(t, T) {
            x[t] = load(g + t * m + j);
            __builtin_prefetch(g + t * m + j + AHEAD(T));
            if (e) {
                store(g + t * m + j, x[t] += s * load(e + t * m + j));
                __builtin_prefetch(e + t * m + j + AHEAD(T));
            }
        }
        EACH(k, R) {
            vec y = load(q + k * m + j);
            EACH(t, T) sums[t][k] += x[t] * y;
        }
    }
    for (; j < m; j++) EACH(t, T) {
        if (e) g[t * m + j] += s * e[t * m + j];
        EACH(k, R) rest[t][k] += g[t * m + j] * q[k * m + j];
    }
    EACH(t, T) EACH(k, R) p[k * n + t] = total(sums[t][k]) + rest[t][k];
}

INLINE void right_rows(const int R, const int T, long width, long n, long m, float s, float *g, const float *e,
                       const float *p, float *q) {
    long j = 0;
    for (; j + LANES <= width; j += LANES) {
        vec sums[CHUNK];
        EACH(k, R) sums[k] = load(q + k * m + j);
        EACH(t, T) {
            vec x = load(g + t * m + j);
            __builtin_prefetch(g + t * m + j + AHEAD(T));
            if (e) {
                store(g + t * m + j, x += s * load(e + t * m + j));
                __builtin_prefetch(e + t * m + j + AHEAD(T));
            }
            EACH(k, R) sums[k] += x * p[k * n + t];
        }
        EACH(k, R) store(q + k * m + j, sums[k]);
    }
    for (; j < width; j++) EACH(t, T) {
        if (e) g[t * m + j] += s * e[t * m + j];
        EACH(k, R) q[k * m + j] += g[t * m + j] * p[k * n + t];
    }
}

/* `first` and `last` say which chunk of the ranks this is. */
INLINE void decompress_rows(const int R, const int T, int first, int last, long n, long m, float *g, float *e,
                            const float *p, const float *q, const float *p_own, const float *q_own) {
    const float *matrix = first ? g : e;
    long j = 0;
    for (; j + LANES <= m; j += LANES) {
        vec x[ROWS], y[ROWS];
        EACH(t, T) {
            x[t] = e ? load(matrix + t * m + j) : (vec){0};
            y[t] = first ? (vec){0} : load(g + t * m + j);
            __builtin_prefetch(g + t * m + j + AHEAD(T));
        }
        if (e) EACH(k, R) {
            vec right = load(q_own + k * m + j);
            EACH(t, T) x[t] -= p_own[k * n + t] * right;
        }
        EACH(k, R) {
            vec right = load(q + k * m + j);
            EACH(t, T) y[t] += p[k * n + t] * right;
        }
        EACH(t, T) {
            store(g + t * m + j, y[t]);
            if (e && first && last) stream(e + t * m + j, x[t]);
            else if (e) store(e + t * m + j, x[t]);
        }
    }
    for (; j < m; j++) EACH(t, T) {
        float x = e ? matrix[t * m + j] : 0, y = first ? 0 : g[t * m + j];
        EACH(k, R) y += p[k * n + t] * q[k * m + j];
        if (e) EACH(k, R) x -= p_own[k * n + t] * q_own[k * m + j];
        if (e) e[t * m + j] = x;
        g[t * m + j] = y;
    }
}

/* How many of the ranks that are left a loop takes: a block of rows up to CHUNK of them, a single row up to two. */
INLINE long of_block(long left) { return left >= CHUNK ? CHUNK : left >= 2 ? 2 : 1; }
INLINE long of_row(long left) { return left >= 2 ? 2 : 1; }

#define BLOCK(rank, loop, ...) \
    switch (rank) { \
        case 1: loop(1, __VA_ARGS__); break; \
        case 2: loop(2, __VA_ARGS__); break; \
        default: loop(CHUNK, __VA_ARGS__); \
    }
#define ROW(rank, loop, ...) \
    if (rank == 1) loop(1, 1, __VA_ARGS__); else loop(2, 1, __VA_ARGS__);

#define PARALLEL(threads) _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")

/* Where E is NULL, nothing is added, or kept. */

static void project_left(int threads, long r, long n, long m, float s, float *g, const float *e, const float *q,
                         float *p) {
    PARALLEL(threads)
    for (long i = 0; i < n; i += ROWS) {
        if (r >= CHUNK && n - i >= ROWS)
            for (long k = 0, some; k < r; k += some) {
                some = of_block(r - k);
                BLOCK(some, left_rows, ROWS, n, m, s, g + i * m, e && !k ? e + i * m : NULL, q + k * m, p + k * n + i)
            }
        else
            for (long row = i; row < n && row < i + ROWS; row++)
                for (long k = 0, some; k < r; k += some) {
                    some = of_row(r - k);
                    ROW(some, left_rows, n, m, s, g + row * m, e && !k ? e + row * m : NULL, q + k * m, p + k * n + row)
                }
    }
}

static void project_right(int threads, long r, long n, long m, float s, float *g, const float *e, const float *p,
                          float *q) {
    long part = (m / threads / COLUMNS + 1) * COLUMNS;
    memset(q, 0, r * m * sizeof *q);
    PARALLEL(threads)
    for (long j = 0; j < m; j += part) {
        long i = 0, width = m - j < part ? m - j : part;
        for (; r >= CHUNK && i + ROWS_SUMMED <= n; i += ROWS_SUMMED)
            for (long k = 0, some; k < r; k += some) {
                some = of_block(r - k);
                BLOCK(some, right_rows, ROWS_SUMMED, width, n, m, s, g + i * m + j, e && !k ? e + i * m + j : NULL,
                          p + k * n + i, q + k * m + j)
            }
        for (; i < n; i++)
            for (long k = 0, some; k < r; k += some) {
                some = of_row(r - k);
                ROW(some, right_rows, width, n, m, s, g + i * m + j, e && !k ? e + i * m + j : NULL, p + k * n + i,
                    q + k * m + j)
            }
    }
}

static void decompress(int threads, long r, long n, long m, float *g, float *e, const float *p, const float *q,
                       const float *p_own, const float *q_own) {
    PARALLEL(threads)
    for (long i = 0; i < n; i += ROWS) {
        if (r >= CHUNK && n - i >= ROWS)
            for (long k = 0, some; k < r; k += some) {
                some = of_block(r - k);
                BLOCK(some, decompress_rows, ROWS, k == 0, k + some == r, n, m, g + i * m, e ? e + i * m : NULL,
                          p + k * n + i, q + k * m, p_own + k * n + i, q_own + k * m)
            }
        else
            for (long row = i; row < n && row < i + ROWS; row++)
                for (long k = 0, some; k < r; k += some) {
                    some = of_row(r - k);
                    ROW(some, decompress_rows, k == 0, k + some == r, n, m, g + row * m, e ? e + row * m : NULL,
                        p + k * n + row, q + k * m, p_own + k * n + row, q_own + k * m)
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
