/* Which experts a token uses, given its scores. */
#pragma once
#include "numbers.h"

typedef struct {
    int64_t tokens, width, experts, chosen; /* T, D, E, K; D is a multiple of LANES */
    int normalize;                          /* the weights of a token sum to 1 */
} routing;

/* Probabilities, and the K experts of largest score, best first, ties to the lowest. `bias` (E), which may be null,
 * counts in that choice alone. Returns the logarithm of the sum of e^score. */
static float choose_experts(const routing *p, const float *scores, const float *bias, float *probability, int64_t *ids,
                            float *weights) {
    float top = scores[0], total = 0, kept = 0;
    for (int64_t e = 1; e < p->experts; e++) top = scores[e] > top ? scores[e] : top;
    for (int64_t e = 0; e < p->experts; e++) total += probability[e] = expf(scores[e] - top);
    for (int64_t e = 0; e < p->experts; e++) probability[e] /= total;
    for (int64_t k = 0; k < p->chosen; k++) {
        int64_t best = -1;
        float highest = 0;
        for (int64_t e = 0; e < p->experts; e++) {
            int taken = 0;
            float score = scores[e] + (bias ? bias[e] : 0);
            for (int64_t j = 0; j < k; j++) taken |= ids[j] == e;
            if (!taken && (best < 0 || score > highest)) best = e, highest = score;
        }
        ids[k] = best;
        kept += weights[k] = probability[best];
    }
    if (p->normalize)
        for (int64_t k = 0; k < p->chosen; k++) weights[k] /= kept;
    return top + logf(total);
}
