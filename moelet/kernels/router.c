/* The router: scores, softmax, each token's best experts and their statistics, and the gradients of all that.
 *
 * Everything here is float whatever the activations are. Sums over tokens are made block by block in a fixed order,
 * so that they don't depend on the number of threads.
 */
#include "routing.h"

/* `real` (T) says which tokens count, null: all. `sums` is (2, E): probabilities and choices of those that do. */
void route(const routing *p, const num *x, const float *matrix, const uint8_t *real, int64_t *ids, float *weights,
           float *probability, float *sums, float *partial, int threads) {
    int64_t T = p->tokens, D = p->width, E = p->experts, K = p->chosen;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks(T); block++) {
        float *own = partial + block * 2 * E, scores[E];
        memset(own, 0, 2 * E * sizeof(float));
        for (int64_t t = block * BLOCK; t < end_of(block, T); t++) {
            for (int64_t e = 0; e < E; e++) {
                vec dot = {0};
                for (int64_t d = 0; d < D; d += LANES) dot += load(x + t * D + d) * load_floats(matrix + e * D + d);
                scores[e] = sum_lanes(dot);
            }
            choose_experts(p, scores, probability + t * E, ids + t * K, weights + t * K);
            if (real && !real[t]) continue;
            for (int64_t e = 0; e < E; e++) own[e] += probability[t * E + e];
            for (int64_t k = 0; k < K; k++) own[E + ids[t * K + k]] += 1;
        }
    }
    for (int64_t e = 0; e < 2 * E; e++) {
        double total = 0;
        for (int64_t block = 0; block < blocks(T); block++) total += partial[block * 2 * E + e];
        sums[e] = (float)total;
    }
}

/* From the gradients of the weights (T, K) and of the summed probabilities (E), either of which may be null.
 * `partial` has room for blocks(T) x E x D floats. */
void route_backward(const routing *p, const num *x, const float *matrix, const uint8_t *real, const int64_t *ids,
                    const float *weights, const float *probability, const float *grad_weights, const float *grad_sum,
                    num *grad_x, float *grad_matrix, float *partial, int threads) {
    int64_t T = p->tokens, D = p->width, E = p->experts, K = p->chosen;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t block = 0; block < blocks(T); block++) {
            float *own = partial + block * E * D;
            memset(own, 0, E * D * sizeof(float));
            for (int64_t t = block * BLOCK; t < end_of(block, T); t++) {
                const float *q = probability + t * E;
                float slope[E], mean = 0, kept = 0, along = 0;
                for (int64_t e = 0; e < E; e++) slope[e] = grad_sum && (!real || real[t]) ? grad_sum[e] : 0;
                for (int64_t k = 0; grad_weights && k < K; k++) {
                    kept += q[ids[t * K + k]];
                    along += grad_weights[t * K + k] * weights[t * K + k];
                }
                for (int64_t k = 0; grad_weights && k < K; k++) {
                    float g = grad_weights[t * K + k];
                    slope[ids[t * K + k]] += p->normalize ? (g - along) / kept : g;
                }
                for (int64_t e = 0; e < E; e++) mean += slope[e] * q[e];
                for (int64_t e = 0; e < E; e++) slope[e] = (slope[e] - mean) * q[e];
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
