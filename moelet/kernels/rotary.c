/* Queries or keys before they meet: an RMS norm over each head, then a turn by the token's position; either may be left
 * out. Forward reads the projection's rows, backward makes the norm again.
 *
 *   n = x / rms(x) * weight,   y[c] = n[c] cos - n[c + C/2] sin,   y[c + C/2] = n[c + C/2] cos + n[c] sin
 */
#include "numbers.h"

typedef struct {
    int64_t rows, heads, width; /* tokens, H, C; C is a multiple of LANES, and of twice that where heads are turned */
    float eps;
    const float *weight;      /* (C), or null: no norm */
    const float *cos, *sin;   /* (positions, C/2), or null: no turn */
    const int64_t *positions; /* (rows) */
} problem;

INLINE float inverse_rms(const problem *p, const num *x) {
    vec squares = {0};
    for (int64_t c = 0; c < p->width; c += LANES) squares += load(x + c) * load(x + c);
    return 1 / sqrtf(sum_lanes(squares) / (float)p->width + p->eps);
}

void rotary(const problem *p, const num *x, num *y, int threads) {
    int64_t C = p->width, half = C / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < p->rows; r++) {
        const float *cos = p->cos + (p->cos ? p->positions[r] * half : 0), *sin = p->sin + (cos - p->cos);
        for (int64_t at = r * p->heads * C; at < (r + 1) * p->heads * C; at += C) {
            float scale = p->weight ? inverse_rms(p, x + at) : 1;
            for (int64_t c = 0; c < (p->cos ? half : C); c += LANES) {
                vec a = load(x + at + c) * scale * (p->weight ? load_floats(p->weight + c) : splat(1));
                if (!p->cos) {
                    store(y + at + c, a);
                    continue;
                }
                vec b = load(x + at + half + c) * scale * (p->weight ? load_floats(p->weight + half + c) : splat(1));
                store(y + at + c, a * load_floats(cos + c) - b * load_floats(sin + c));
                store(y + at + half + c, b * load_floats(cos + c) + a * load_floats(sin + c));
            }
        }
    }
}

/* The gradient of one head's x, from that of what the norm gave, `slope` (C); adds to the weight's gradient. */
INLINE void norm_backward(const problem *p, const num *x, const float *slope, num *grad, float *grad_weight) {
    float inverse = inverse_rms(p, x);
    vec dot = {0};
    for (int64_t c = 0; c < p->width; c += LANES) {
        vec along = load_floats(slope + c) * load(x + c);
        store_floats(grad_weight + c, load_floats(grad_weight + c) + along * inverse);
        dot += along * load_floats(p->weight + c);
    }
    float along = sum_lanes(dot) / (float)p->width * inverse * inverse * inverse;
    for (int64_t c = 0; c < p->width; c += LANES)
        store(grad + c, load_floats(slope + c) * load_floats(p->weight + c) * inverse - load(x + c) * along);
}

/* `grad_weight` (C) and `partial`, which has room for blocks(rows) x C floats, may be null where there is no norm. */
void rotary_backward(const problem *p, const num *x, const num *grad_y, num *grad_x, float *grad_weight,
                     float *partial, int threads) {
    int64_t C = p->width, half = C / 2;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < blocks(p->rows); block++) {
        float slope[C], *own = partial + (p->weight ? block * C : 0);
        if (p->weight) memset(own, 0, C * sizeof(float));
        for (int64_t r = block * BLOCK; r < end_of(block, p->rows); r++) {
            const float *cos = p->cos + (p->cos ? p->positions[r] * half : 0), *sin = p->sin + (cos - p->cos);
            for (int64_t at = r * p->heads * C; at < (r + 1) * p->heads * C; at += C) {
                for (int64_t c = 0; c < (p->cos ? half : C); c += LANES) {
                    vec a = load(grad_y + at + c);
                    if (!p->cos) {
                        store_floats(slope + c, a);
                        continue;
                    }
                    vec b = load(grad_y + at + half + c);
                    store_floats(slope + c, a * load_floats(cos + c) + b * load_floats(sin + c));
                    store_floats(slope + half + c, b * load_floats(cos + c) - a * load_floats(sin + c));
                }
                if (p->weight) norm_backward(p, x + at, slope, grad_x + at, own);
                else
                    for (int64_t c = 0; c < C; c += LANES) store(grad_x + at + c, load_floats(slope + c));
            }
        }
    }
    for (int64_t c = 0; p->weight && c < C; c++) {
        double total = 0;
        for (int64_t block = 0; block < blocks(p->rows); block++) total += partial[block * C + c];
        grad_weight[c] = (float)total;
    }
}
