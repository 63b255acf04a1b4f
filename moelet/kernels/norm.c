/* Residual connection and RMS norm in one pass, forward and backward.
 *
 *   sum = residual + dropout(branch),   normed = sum / rms(sum) * weight
 *
 * Rows are handled in blocks of fixed size, and what a block adds to the weight's gradient is summed in the order of
 * blocks: the result doesn't depend on the number of threads.
 */
#include "numbers.h"

/* The branch is in num, or else in float as `wide_branch`. A residual that is null counts as zeros. D is a multiple of
 * LANES. */
void add_norm(const float *residual, const num *branch, const float *wide_branch, const float *weight, float *sum,
              num *normed, float *inverse_rms, int64_t rows, int64_t D, float eps, const dropout *drop, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < rows; r++) {
        uint64_t key = row_key(drop->seed, (uint64_t)r);
        vec squares = {0};
        for (int64_t d = r * D, c = 0; c < D; c += LANES, d += LANES) {
            vec x = branch ? load(branch + d) : load_floats(wide_branch + d);
            if (drop->limit) x *= keep_scale(*drop, key, c);
            if (residual) x += load_floats(residual + d);
            store_floats(sum + d, x);
            squares += x * x;
        }
        float inverse = inverse_rms[r] = 1 / sqrtf(sum_lanes(squares) / (float)D + eps);
        for (int64_t d = r * D, c = 0; c < D; c += LANES, d += LANES)
            store(normed + d, load_floats(sum + d) * inverse * load_floats(weight + c));
    }
}

/* `grad_sum` may be null: nothing used the sum itself; so may be `grad_residual`, when nothing needs it. `partial` has
 * room for blocks(rows) x D floats. */
void add_norm_backward(const float *grad_sum, const num *grad_normed, const float *sum, const float *inverse_rms,
                       const float *weight, float *grad_residual, num *grad_branch, float *wide_grad_branch,
                       float *grad_weight, float *partial, int64_t rows, int64_t D, const dropout *drop,
                       int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t block = 0; block < blocks(rows); block++) {
            float *own = partial + block * D;
            memset(own, 0, D * sizeof(float));
            for (int64_t r = block * BLOCK; r < end_of(block, rows); r++) {
                uint64_t key = row_key(drop->seed, (uint64_t)r);
                float inverse = inverse_rms[r];
                vec dot = {0};
                for (int64_t d = r * D, c = 0; c < D; c += LANES, d += LANES) {
                    vec slope = load(grad_normed + d), x = load_floats(sum + d);
                    store_floats(own + c, load_floats(own + c) + slope * x * inverse);
                    dot += slope * x * load_floats(weight + c);
                }
                float along = sum_lanes(dot) / (float)D * inverse * inverse * inverse;
                for (int64_t d = r * D, c = 0; c < D; c += LANES, d += LANES) {
                    vec g = load(grad_normed + d) * load_floats(weight + c) * inverse - load_floats(sum + d) * along;
                    if (grad_sum) g += load_floats(grad_sum + d);
                    if (grad_residual) store_floats(grad_residual + d, g);
                    if (drop->limit) g *= keep_scale(*drop, key, c);
                    if (grad_branch) store(grad_branch + d, g);
                    else store_floats(wide_grad_branch + d, g);
                }
            }
        }
#pragma omp for
        for (int64_t c = 0; c < D; c += LANES) {
            vec total = {0};
            for (int64_t block = 0; block < blocks(rows); block++) total += load_floats(partial + block * D + c);
            store_floats(grad_weight + c, total);
        }
    }
}
