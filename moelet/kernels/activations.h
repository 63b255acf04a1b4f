/* The activations of experts, with their slopes. */
#pragma once
#include "numbers.h"

enum { SILU, GELU, RELU2 };

INLINE vec sigmoid(vec x) {
    ivec positive = x >= 0.0f;
    vec e = exponential(choose(positive, -x, x));
    return choose(positive, splat(1), e) / (1 + e);
}

/* The standard normal distribution up to x, within 1e-7: Abramowitz & Stegun 1964, 7.1.26. */
INLINE vec normal_cdf(vec x) {
    vec z = choose(x >= 0.0f, x, -x) * 0.70710678f, t = 1 / (1 + 0.3275911f * z);
    vec p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec beyond = 0.5f * p * t * exponential(-z * z);
    return choose(x >= 0.0f, 1 - beyond, beyond);
}

INLINE void activate(int activation, vec x, vec *value, vec *slope) {
    if (activation == SILU) {
        vec s = sigmoid(x);
        *value = x * s;
        *slope = s * (1 + x * (1 - s));
    } else if (activation == GELU) {
        vec below = normal_cdf(x);
        *value = x * below;
        *slope = below + x * 0.39894228f * exponential(-0.5f * x * x);
    } else {
        vec positive = larger(x, (vec){0});
        *value = positive * positive;
        *slope = 2 * positive;
    }
}
