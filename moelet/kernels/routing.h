/* Which experts a token uses, given its scores. */
#pragma once
#include "numbers.h"

typedef struct {
    int64_t tokens, width, experts, chosen; /* T, D, E, K; D is a multiple of LANES */
    int normalize;                          /* the weights of a token sum to 1 */
} routing;

INLINE int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float largest(const float *values, int64_t n_whole) {
    vec top = splat(-INFINITY);
    for (int64_t i = 0; i < n_whole; i += LANES) top = larger(load_floats(values + i), top);
    return largest_lane(top);
}

/* The lowest expert that has this score; where no finite one is left, the lowest that isn't among the k `ids`. */
INLINE int64_t expert_of(const float *scores, float score, const int64_t *ids, int64_t k) {
    int64_t e = 0;
    if (score > -INFINITY) {
        while (scores[e] != score) e++;
        return e;
    }
    for (int64_t j = 0; j < k; j++)
        if (ids[j] == e) e++, j = -1;
    return e;
}

/* Probabilities, and the K experts of largest score, best first, ties to the lowest. `scores` and `probability` have
 * room for whole vectors; what lies behind E becomes 0 there. `bias` (E), which may be null, counts in that choice
 * alone. Returns the logarithm of the sum of e^score. */
static float choose_experts(const routing *p, float *scores, const float *bias, float *probability, int64_t *ids,
                            float *weights) {
    int64_t E = p->experts, whole = whole_vectors(E);
    float ranked[whole], kept = 0;
    for (int64_t e = E; e < whole; e++) scores[e] = -INFINITY;
    float top = largest(scores, whole);
    vec totals = {0};
    for (int64_t e = 0; e < whole; e += LANES) {
        vec share = exponential(load_floats(scores + e) - top);
        store_floats(probability + e, share);
        totals += share;
    }
    float total = sum_lanes(totals);
    for (int64_t e = 0; e < whole; e += LANES) store_floats(probability + e, load_floats(probability + e) / total);
    memcpy(ranked, scores, sizeof ranked);
    for (int64_t e = 0; bias && e < E; e++) ranked[e] += bias[e];
    for (int64_t e = E; e < whole; e++) scores[e] = 0;
    for (int64_t k = 0; k < p->chosen; k++) {
        ids[k] = expert_of(ranked, largest(ranked, whole), ids, k);
        ranked[ids[k]] = -INFINITY;
        kept += weights[k] = probability[ids[k]];
    }
    if (p->normalize)
        for (int64_t k = 0; k < p->chosen; k++) weights[k] /= kept;
    return top + logf(total);
}
