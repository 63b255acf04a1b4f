/* The router: scores, softmax, each token's best experts and their statistics, and the gradients of all that.
 *
 * Everything here is float whatever the activations are. Sums over tokens are made block by block in a fixed order,
 * so that they don't depend on the number of threads.
 */
#include "routing.h"

/* What `sums` holds: for each expert its probabilities and how often it was chosen, then these. */
enum { ENTROPY, SQUARES, LARGEST, OTHERS };

#define AT_ONCE 8 /* tokens: each vector of the matrix that is read serves all of them */

/* Scores of n tokens, `whole` apart. `columns` (D, whole) is the router's matrix, transposed. */
INLINE void score(int n, const float *rows, int64_t D, const float *columns, int64_t whole, float *scores) {
    for (int64_t e = 0; e < whole; e += LANES) {
        vec total[AT_ONCE] = {0};
        for (int64_t d = 0; d < D; d++) {
            vec column = load_floats(columns + d * whole + e);
            for (int r = 0; r < n; r++) total[r] += rows[r * D + d] * column;
        }
        for (int r = 0; r < n; r++) store_floats(scores + r * whole + e, total[r]);
    }
}

/* `real` (T) says which tokens count, null: all. `log_totals` (T): the logarithm of the sum of e^score. `sums`
 * (2 E + OTHERS) are over tokens that count, the entropy in nats, the squares those of log_totals, the largest score
 * by size. `partial` has room for blocks(T) of these, `columns` for (D, E in whole vectors). */
void route(const routing *p, const num *x, const float *matrix, const float *bias, const uint8_t *real, int64_t *ids,
           float *weights, float *probability, float *log_totals, float *sums, float *partial, float *columns,
           int threads) {
    int64_t T = p->tokens, D = p->width, E = p->experts, K = p->chosen, size = 2 * E + OTHERS;
    int64_t whole = whole_vectors(E);
    memset(columns, 0, D * whole * sizeof(float));
    for (int64_t e = 0; e < E; e++)
        for (int64_t d = 0; d < D; d++) columns[d * whole + e] = matrix[e * D + d];
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks(T); block++) {
        float *own = partial + block * size, *others = own + 2 * E, rows[AT_ONCE * D], all[AT_ONCE * whole], q[whole];
        memset(own, 0, size * sizeof(float));
        for (int64_t t = block * BLOCK; t < end_of(block, T); t++) {
            int64_t r = t % AT_ONCE, left = end_of(block, T) - t;
            if (r == 0) {
                int64_t n = left < AT_ONCE ? left : AT_ONCE;
                for (int64_t i = 0; i < n * D; i += LANES) store_floats(rows + i, load(x + t * D + i));
                if (n == AT_ONCE) score(AT_ONCE, rows, D, columns, whole, all);
                else
                    for (int64_t i = 0; i < n; i++) score(1, rows + i * D, D, columns, whole, all + i * whole);
            }
            float *scores = all + r * whole;
            vec means = {0}, sizes = {0};
            log_totals[t] = choose_experts(p, scores, bias, q, ids + t * K, weights + t * K);
            memcpy(probability + t * E, q, E * sizeof(float));
            if (real && !real[t]) continue;
            for (int64_t e = 0; e < E; e++) own[e] += q[e];
            for (int64_t e = 0; e < whole; e += LANES) {
                vec values = load_floats(scores + e);
                means += values * load_floats(q + e);
                sizes = larger((vec)((ivec)values & 0x7fffffff), sizes);
            }
            for (int64_t k = 0; k < K; k++) own[E + ids[t * K + k]] += 1;
            others[ENTROPY] += log_totals[t] - sum_lanes(means);
            others[LARGEST] = fmaxf(others[LARGEST], largest_lane(sizes));
            others[SQUARES] += log_totals[t] * log_totals[t];
        }
    }
    for (int64_t i = 0; i < size; i++) {
        double total = 0;
        for (int64_t block = 0; block < blocks(T); block++) {
            float part = partial[block * size + i];
            total = i == 2 * E + LARGEST ? fmax(total, part) : total + part;
        }
        sums[i] = (float)total;
    }
}

/* From the gradients of what comes out to those of the scores of token t: `slope` (E). */
INLINE void slopes(const routing *p, const int64_t *ids, const float *weights, const float *probability,
                   const float *grad_weights, const float *grad_sum, float lift, float *slope) {
    float mean = 0, kept = 0, along = 0;
    for (int64_t e = 0; e < p->experts; e++) slope[e] = grad_sum ? grad_sum[e] : 0;
    for (int64_t k = 0; grad_weights && k < p->chosen; k++) {
        kept += probability[ids[k]];
        along += grad_weights[k] * weights[k];
    }
    for (int64_t k = 0; grad_weights && k < p->chosen; k++)
        slope[ids[k]] += p->normalize ? (grad_weights[k] - along) / kept : grad_weights[k];
    for (int64_t e = 0; e < p->experts; e++) mean += slope[e] * probability[e];
    for (int64_t e = 0; e < p->experts; e++) slope[e] = (slope[e] - mean + lift) * probability[e];
}

/* From n tokens' gradients of scores (n, E) to those of x, and onto that of the matrix. */
INLINE void spread(int n, const float *slope, int64_t E, const num *x, int64_t D, const float *matrix, num *grad_x,
                   float *grad_matrix) {
    for (int64_t d = 0; d < D; d += LANES) {
        vec g[AT_ONCE] = {0}, row[AT_ONCE];
        for (int r = 0; r < n; r++) row[r] = load(x + r * D + d);
        for (int64_t e = 0; e < E; e++) {
            vec weight = load_floats(matrix + e * D + d), own = load_floats(grad_matrix + e * D + d);
            for (int r = 0; r < n; r++) {
                g[r] += slope[r * E + e] * weight;
                own += slope[r * E + e] * row[r];
            }
            store_floats(grad_matrix + e * D + d, own);
        }
        for (int r = 0; r < n; r++) store(grad_x + r * D + d, g[r]);
    }
}

/* From the gradients of the weights (T, K) and of the summed probabilities (E), either of which may be null, and that
 * of the summed squares. `partial` has room for blocks(T) x E x D floats. */
void route_backward(const routing *p, const num *x, const float *matrix, const uint8_t *real, const int64_t *ids,
                    const float *weights, const float *probability, const float *log_totals,
                    const float *grad_weights, const float *grad_sum, float grad_squares, num *grad_x,
                    float *grad_matrix, float *partial, int threads) {
    int64_t T = p->tokens, D = p->width, E = p->experts, K = p->chosen;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t block = 0; block < blocks(T); block++) {
            float *own = partial + block * E * D, slope[BLOCK * E];
            int64_t first = block * BLOCK, n = end_of(block, T) - first, r = 0;
            memset(own, 0, E * D * sizeof(float));
            for (int64_t t = first; t < first + n; t++) {
                int counts = !real || real[t];
                slopes(p, ids + t * K, weights + t * K, probability + t * E, grad_weights ? grad_weights + t * K : 0,
                       counts ? grad_sum : 0, counts ? 2 * grad_squares * log_totals[t] : 0, slope + (t - first) * E);
            }
            for (; r + AT_ONCE <= n; r += AT_ONCE)
                spread(AT_ONCE, slope + r * E, E, x + (first + r) * D, D, matrix, grad_x + (first + r) * D, own);
            for (; r < n; r++)
                spread(1, slope + r * E, E, x + (first + r) * D, D, matrix, grad_x + (first + r) * D, own);
        }
#pragma omp for
        for (int64_t i = 0; i < E * D; i += LANES) {
            vec total = {0};
            for (int64_t block = 0; block < blocks(T); block++) total += load_floats(partial + block * E * D + i);
            store_floats(grad_matrix + i, total);
        }
    }
}
