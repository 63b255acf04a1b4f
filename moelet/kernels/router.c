/* The router: scores, softmax, each token's best experts and their statistics, and the gradients of all that.
 *
 * Everything here is float whatever the activations are. Sums over tokens are made block by block in a fixed order,
 * so that they don't depend on the number of threads.
 */
#include "routing.h"

/* What `sums` holds: for each expert its probabilities and how often it was chosen, then these. */
enum { ENTROPY, SQUARES, LARGEST, OTHERS };

/* `real` (T) says which tokens count, null: all. `log_totals` (T): the logarithm of the sum of e^score. `sums`
 * (2 E + OTHERS) are over tokens that count, the entropy in nats, the squares those of log_totals, the largest score
 * by size. `partial` has room for blocks(T) of these. */
void route(const routing *p, const num *x, const float *matrix, const float *bias, const uint8_t *real, int64_t *ids,
           float *weights, float *probability, float *log_totals, float *sums, float *partial, int threads) {
    int64_t T = p->tokens, D = p->width, E = p->experts, K = p->chosen, size = 2 * E + OTHERS;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks(T); block++) {
        float *own = partial + block * size, *others = own + 2 * E, scores[E];
        memset(own, 0, size * sizeof(float));
        for (int64_t t = block * BLOCK; t < end_of(block, T); t++) {
            float *q = probability + t * E, mean = 0;
            for (int64_t e = 0; e < E; e++) {
                vec dot = {0};
                for (int64_t d = 0; d < D; d += LANES) dot += load(x + t * D + d) * load_floats(matrix + e * D + d);
                scores[e] = sum_lanes(dot);
            }
            log_totals[t] = choose_experts(p, scores, bias, q, ids + t * K, weights + t * K);
            if (real && !real[t]) continue;
            for (int64_t e = 0; e < E; e++) {
                own[e] += q[e];
                mean += q[e] * scores[e];
                others[LARGEST] = fmaxf(others[LARGEST], fabsf(scores[e]));
            }
            for (int64_t k = 0; k < K; k++) own[E + ids[t * K + k]] += 1;
            others[ENTROPY] += log_totals[t] - mean;
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
            float *own = partial + block * E * D;
            memset(own, 0, E * D * sizeof(float));
            for (int64_t t = block * BLOCK; t < end_of(block, T); t++) {
                const float *q = probability + t * E;
                int counts = !real || real[t];
                float slope[E], mean = 0, kept = 0, along = 0, lift = counts ? 2 * grad_squares * log_totals[t] : 0;
                for (int64_t e = 0; e < E; e++) slope[e] = grad_sum && counts ? grad_sum[e] : 0;
                for (int64_t k = 0; grad_weights && k < K; k++) {
                    kept += q[ids[t * K + k]];
                    along += grad_weights[t * K + k] * weights[t * K + k];
                }
                for (int64_t k = 0; grad_weights && k < K; k++) {
                    float g = grad_weights[t * K + k];
                    slope[ids[t * K + k]] += p->normalize ? (g - along) / kept : g;
                }
                for (int64_t e = 0; e < E; e++) mean += slope[e] * q[e];
                for (int64_t e = 0; e < E; e++) slope[e] = (slope[e] - mean + lift) * q[e];
                for (int64_t d = 0; d < D; d += LANES) {
                    vec g = {0}, row = load(x + t * D + d);
                    for (int64_t e = 0; e < E; e++) {
                        g += slope[e] * load_floats(matrix + e * D + d);
                        store_floats(own + e * D + d, load_floats(own + e * D + d) + slope[e] * row);
                    }
                    store(grad_x + t * D + d, g);
                }
            }
        }
#pragma omp for
        for (int64_t i = 0; i < E * D; i += LANES) {
            vec total = {0};
            for (int64_t block = 0; block < blocks(T); block++) total += load_floats(partial + block * E * D + i);
            store_floats(grad_matrix + i, total);
        }
    }
}
