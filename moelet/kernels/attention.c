/* Causal self-attention of whole rows, S queries and S keys, forward and backward.
 *
 * One (row, head) at a time, 64 queries at a time, against the keys up to the last of them: the masked half is never
 * computed but within a block, and no more than 64 x S scores exist. Backward computes the probabilities again from
 * the logarithm of each row's sum, as FlashAttention does (Dao et al. 2022).
 *
 * Query i sees key j when j <= i and, where there are segments, both have the same.
 */
#include "products.h"

#define QUERIES 64 /* at a time */
#define BY_QUERIES (QUERIES / PER_UNIT * TILE_COLUMNS) /* a panel of a block's rows */
#define HIDDEN -1e30f /* the score of what is not seen */

/* Where number (b, s, h, c) lies: at b * batch + h * head + s * row + c. */
typedef struct {
    int64_t batch, head, row;
} layout;

typedef struct {
    int64_t batch, heads, length, width;
    float scale;
    const int64_t *segments; /* (batch, length), or null */
    dropout drop;
    layout in[3], out; /* q, k, v; output and all gradients */
} problem;

INLINE vec visible(const problem *p, int64_t b, int64_t i, int64_t j, vec scores) {
    vec columns = lane_index() + (float)j;
    ivec seen = columns <= (float)i;
    if (p->segments) {
        const int64_t *row = p->segments + b * p->length;
        ivec same;
        for (int l = 0; l < LANES; l++) same[l] = j + l < p->length && row[j + l] == row[i] ? -1 : 0;
        seen &= same;
    }
    return choose(seen, scores * p->scale, splat(HIDDEN));
}

INLINE uint64_t key_of(const problem *p, int64_t b, int64_t h, int64_t i) {
    return row_key(p->drop.seed, (uint64_t)((b * p->heads + h) * p->length + i));
}

/* Copies rows into a buffer whose rows are `stride` long, the rest of which is zero. */
INLINE void copy_rows(const num *from, int64_t from_row, int64_t rows, int64_t width, num *to, int64_t stride) {
    for (int64_t r = 0; r < rows; r++) memcpy(to + r * stride, from + r * from_row, width * sizeof(num));
}

INLINE void interleave_rows(const num *from, int64_t stride, int64_t rows, int64_t width, unit *to, int64_t panel) {
    for (int64_t r = 0; r < rows; r += PER_UNIT)
        interleave(from + r * stride, stride, rows - r, width, to, panel, r / PER_UNIT);
}

/* Scores become e^(score - max), dropped out; returns 1 / their sum before that and notes its logarithm. */
static float soften(const problem *p, int64_t b, int64_t h, int64_t i, float *scores, num *weights, int64_t end,
                    float *log_sum) {
    int64_t own_end = i / LANES * LANES + LANES;
    vec best = splat(HIDDEN), sum = {0};
    for (int64_t j = 0; j < own_end; j += LANES) {
        vec s = visible(p, b, i, j, load_floats(scores + j));
        store_floats(scores + j, s);
        best = larger(best, s);
    }
    float top = largest_lane(best);
    uint64_t key = key_of(p, b, h, i);
    for (int64_t j = 0; j < own_end; j += LANES) {
        vec e = exponential(load_floats(scores + j) - top);
        sum += e;
        store(weights + j, p->drop.limit ? e * keep_scale(p->drop, key, j) : e);
    }
    if (end > own_end) memset(weights + own_end, 0, (end - own_end) * sizeof(num));
    float total = sum_lanes(sum);
    *log_sum = top + logf(total);
    return 1 / total;
}

void attention(const problem *p, const num *q, const num *k, const num *v, num *out, float *log_sums, int threads) {
    int64_t S = p->length, C = p->width, keys = whole_columns(S), width = whole_columns(C), depth = units(C);
    int64_t by_width = depth * TILE_COLUMNS, by_keys = units(keys) * TILE_COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        unit *k_columns = zeroed(depth * keys, sizeof(unit)), *v_rows = zeroed(units(keys) * width, sizeof(unit));
        num *q_block = zeroed(QUERIES * width, sizeof(num)), *weights = zeroed(QUERIES * keys, sizeof(num));
        float *scores = zeroed(QUERIES * keys, sizeof(float)), *sums = zeroed(QUERIES * width, sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->batch * p->heads; task++) {
            int64_t b = task / p->heads, h = task % p->heads;
            const num *q_rows = q + b * p->in[0].batch + h * p->in[0].head;
            transpose_units(k + b * p->in[1].batch + h * p->in[1].head, p->in[1].row, S, C, k_columns, by_width);
            interleave_rows(v + b * p->in[2].batch + h * p->in[2].head, p->in[2].row, S, C, v_rows, by_keys);
            for (int64_t first = 0; first < S; first += QUERIES) {
                int64_t rows = at_most(QUERIES, S - first), end = whole_columns(first + rows);
                copy_rows(q_rows + first * p->in[0].row, p->in[0].row, rows, C, q_block, width);
                product((unit *)q_block, units(width), k_columns, by_width, scores, keys, rows, end, depth, 0);
                float inverse[QUERIES];
                for (int64_t r = 0; r < rows; r++)
                    inverse[r] = soften(p, b, h, first + r, scores + r * keys, weights + r * keys, end,
                                        log_sums + task * S + first + r);
                product((unit *)weights, units(keys), v_rows, by_keys, sums, width, rows, width, units(end), 0);
                num *to = out + b * p->out.batch + h * p->out.head + first * p->out.row;
                for (int64_t r = 0; r < rows; r++) {
                    num line[width];
                    for (int64_t c = 0; c < width; c += LANES)
                        store(line + c, load_floats(sums + r * width + c) * inverse[r]);
                    memcpy(to + r * p->out.row, line, C * sizeof(num));
                }
            }
        }
        free(k_columns), free(v_rows), free(q_block), free(weights), free(scores), free(sums);
    }
}

/* What backward needs of one (row, head) at a time; see `gradients_of_block`. */
typedef struct {
    unit *k_columns, *v_columns, *k_rows;     /* operands for the scores, their slopes, and q's gradient */
    unit *q_rows, *slope_rows, *weight_rows, *grad_rows; /* a block's rows, interleaved */
    num *block, *slopes;
    float *scores, *grad_weights, *grad_q, *grad_k, *grad_v;
} workspace;

/* Turns scores and the gradients of the dropped-out weights of PER_UNIT queries into weights and slopes. */
INLINE void slopes_of_unit(const problem *p, const workspace *w, int64_t b, int64_t h, int64_t i, int64_t r,
                           int64_t rows, int64_t keys, int64_t end, const float *log_sums, const float *common) {
    uint64_t key[2] = {key_of(p, b, h, i), key_of(p, b, h, i + 1)};
    for (int64_t j = 0; j < end; j += LANES) {
        vec weight[2] = {{0}, {0}}, slope[2] = {{0}, {0}};
        for (int t = 0; t < PER_UNIT && r + t < rows; t++) {
            if (j > i + t) continue;
            vec s = visible(p, b, i + t, j, load_floats(w->scores + (r + t) * keys + j));
            vec keep = p->drop.limit ? keep_scale(p->drop, key[t], j) : splat(1);
            vec probability = exponential(s - log_sums[i + t]);
            vec grad = load_floats(w->grad_weights + (r + t) * keys + j) * keep;
            weight[t] = probability * keep;
            slope[t] = probability * (grad - common[r + t]) * p->scale;
        }
        for (int t = 0; t < PER_UNIT && r + t < rows; t++) store(w->slopes + (r + t) * keys + j, slope[t]);
        int64_t at = in_panels(BY_QUERIES, r / PER_UNIT, j);
        store_units(w->weight_rows + at, interleaved(weight[0], weight[1]));
        store_units(w->slope_rows + at, interleaved(slope[0], slope[1]));
    }
}

INLINE void write_rows(const float *from, int64_t from_row, int64_t rows, int64_t C, num *to, int64_t to_row) {
    int64_t width = whole_columns(C);
    for (int64_t r = 0; r < rows; r++) {
        num line[width];
        for (int64_t c = 0; c < width; c += LANES) store(line + c, load_floats(from + r * from_row + c));
        memcpy(to + r * to_row, line, C * sizeof(num));
    }
}

static void gradients_of_block(const problem *p, workspace *w, int64_t b, int64_t h, int64_t first, const num *q,
                               const num *out, const num *grad_out, const float *log_sums, num *grad_q) {
    int64_t C = p->width, keys = whole_columns(p->length), width = whole_columns(C), depth = units(C);
    int64_t rows = at_most(QUERIES, p->length - first), end = whole_columns(first + rows), seen = first + rows;
    int64_t by_width = depth * TILE_COLUMNS, by_keys = units(keys) * TILE_COLUMNS;
    const num *q_rows = q + b * p->in[0].batch + h * p->in[0].head + first * p->in[0].row;
    int64_t at = b * p->out.batch + h * p->out.head + first * p->out.row;

    copy_rows(q_rows, p->in[0].row, rows, C, w->block, width);
    interleave_rows(w->block, width, rows, C, w->q_rows, BY_QUERIES);
    product((unit *)w->block, units(width), w->k_columns, by_width, w->scores, keys, rows, end, depth, 0);
    copy_rows(grad_out + at, p->out.row, rows, C, w->block, width);
    interleave_rows(w->block, width, rows, C, w->grad_rows, BY_QUERIES);
    product((unit *)w->block, units(width), w->v_columns, by_width, w->grad_weights, keys, rows, end, depth, 0);

    float common[QUERIES]; /* sum over keys of weight times its gradient = output times its gradient */
    for (int64_t r = 0; r < rows; r++) {
        num line[width];
        memset(line, 0, sizeof line);
        memcpy(line, out + at + r * p->out.row, C * sizeof(num));
        vec sum = {0};
        for (int64_t c = 0; c < width; c += LANES) sum += load(line + c) * load(w->block + r * width + c);
        common[r] = sum_lanes(sum);
    }
    for (int64_t r = 0; r < rows; r += PER_UNIT)
        slopes_of_unit(p, w, b, h, first + r, r, rows, keys, end, log_sums + (b * p->heads + h) * p->length, common);

    product((unit *)w->slopes, units(keys), w->k_rows, by_keys, w->grad_q, width, rows, width, units(end), 0);
    write_rows(w->grad_q, width, rows, C, grad_q + at, p->out.row);
    product_of_columns(w->weight_rows, BY_QUERIES, w->grad_rows, BY_QUERIES, w->grad_v, width, seen, width,
                       units(rows), 1);
    product_of_columns(w->slope_rows, BY_QUERIES, w->q_rows, BY_QUERIES, w->grad_k, width, seen, width, units(rows), 1);
}

void attention_backward(const problem *p, const num *q, const num *k, const num *v, const num *out,
                        const num *grad_out, const float *log_sums, num *grad_q, num *grad_k, num *grad_v,
                        int threads) {
    int64_t S = p->length, C = p->width, keys = whole_columns(S), width = whole_columns(C), depth = units(C);
    int64_t by_width = depth * TILE_COLUMNS, by_keys = units(keys) * TILE_COLUMNS;
    int64_t block = QUERIES * width, square = QUERIES * keys;
#pragma omp parallel num_threads(threads)
    {
        workspace w = {
            .k_columns = zeroed(depth * keys, sizeof(unit)), .v_columns = zeroed(depth * keys, sizeof(unit)),
            .k_rows = zeroed(units(keys) * width, sizeof(unit)), .q_rows = zeroed(block, sizeof(unit)),
            .grad_rows = zeroed(block, sizeof(unit)), .slope_rows = zeroed(square, sizeof(unit)),
            .weight_rows = zeroed(square, sizeof(unit)), .block = zeroed(block, sizeof(num)),
            .slopes = zeroed(square, sizeof(num)), .scores = zeroed(square, sizeof(float)),
            .grad_weights = zeroed(square, sizeof(float)), .grad_q = zeroed(block, sizeof(float)),
            .grad_k = zeroed(keys * width, sizeof(float)), .grad_v = zeroed(keys * width, sizeof(float)),
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->batch * p->heads; task++) {
            int64_t b = task / p->heads, h = task % p->heads, to = b * p->out.batch + h * p->out.head;
            const num *k_from = k + b * p->in[1].batch + h * p->in[1].head;
            transpose_units(k_from, p->in[1].row, S, C, w.k_columns, by_width);
            interleave_rows(k_from, p->in[1].row, S, C, w.k_rows, by_keys);
            transpose_units(v + b * p->in[2].batch + h * p->in[2].head, p->in[2].row, S, C, w.v_columns, by_width);
            memset(w.grad_k, 0, keys * width * sizeof(float));
            memset(w.grad_v, 0, keys * width * sizeof(float));
            for (int64_t first = 0; first < S; first += QUERIES)
                gradients_of_block(p, &w, b, h, first, q, out, grad_out, log_sums, grad_q);
            write_rows(w.grad_k, width, S, C, grad_k + to, p->out.row);
            write_rows(w.grad_v, width, S, C, grad_v + to, p->out.row);
        }
        free(w.k_columns), free(w.v_columns), free(w.k_rows), free(w.q_rows), free(w.grad_rows), free(w.slope_rows);
        free(w.weight_rows), free(w.block), free(w.slopes), free(w.scores), free(w.grad_weights), free(w.grad_q);
        free(w.grad_k), free(w.grad_v);
    }
}
