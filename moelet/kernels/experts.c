/* The routed feed-forward network: each token's K experts and no others, forward and backward.
 *
 * Routed rows are sorted by expert. A tile of them is gathered, multiplied, activated and multiplied again while it is
 * in the cache; only the hidden values before the activation are kept for backward. Each expert's rows begin at a whole
 * unit (see numbers.h), since the gradients of the matrices sum over pairs of rows: at most one row of zeros an expert.
 *
 * D and F are multiples of TILE_COLUMNS.
 */
#include "activations.h"
#include "products.h"

#define ROWS 48 /* of a tile: with the matrices of its expert, it fits a second-level cache of 1 MB */

typedef struct {
    int64_t tokens, chosen, experts, width, hidden; /* T, K, E, D, F */
    int activation, gated;
    const int64_t *first; /* (E + 1): where each expert's rows begin, in units */
    const int64_t *tile;  /* (E + 1): where each expert's tiles begin */
    const int64_t *entry; /* (rows): which choice t * K + k stands there, -1 for none */
    const int64_t *slot;  /* (T * K): where a choice stands */
} routed;

/* ---- where each choice stands ---- */

/* Counting sort: fills the four arrays of `routed`; returns the number of rows, those of zeros included. */
int64_t sort_choices(const int64_t *ids, int64_t n_choices, int64_t n_experts, int64_t *first, int64_t *tile,
                     int64_t *entry, int64_t *slot) {
    int64_t next[n_experts];
    memset(next, 0, sizeof next);
    for (int64_t n = 0; n < n_choices; n++) next[ids[n]]++;
    first[0] = tile[0] = 0;
    for (int64_t e = 0; e < n_experts; e++) {
        first[e + 1] = first[e] + units(next[e]);
        tile[e + 1] = tile[e] + (next[e] + ROWS - 1) / ROWS;
        next[e] = first[e] * PER_UNIT;
    }
    int64_t rows = first[n_experts] * PER_UNIT;
    for (int64_t r = 0; r < rows; r++) entry[r] = -1;
    for (int64_t n = 0; n < n_choices; n++) entry[slot[n] = next[ids[n]]++] = n;
    return rows;
}

/* ---- matrices as the products want them ---- */

INLINE unit rounded(float a, float b) {
#ifdef BF16
    uvec both = round_to_bf16((vec){a, b});
    return both[0] | both[1] << 16;
#else
    unit u;
    memcpy(&u, &a, sizeof u);
    (void)b;
    return u;
#endif
}

/* The next LANES units of a row. */
INLINE uvec rounded_units(const float *from) {
    num part[LANES * PER_UNIT];
    for (int64_t i = 0; i < LANES * PER_UNIT; i += LANES) store(part + i, load_floats(from + i));
    uvec units;
    memcpy(&units, part, sizeof units);
    return units;
}

/* For rows times the transposed matrices (E, O, I): panels of O columns, I units deep. For rows times the matrices:
 * panels of I columns, O units deep. */
void pack_matrices(const float *matrices, int64_t n_experts, int64_t O, int64_t I, int transposed, unit *to,
                   int threads) {
    int64_t each = units(O * I), panel = (transposed ? units(I) : units(O)) * TILE_COLUMNS;
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t e = 0; e < n_experts; e++)
        for (int64_t o = 0; o < O; o += LANES) {
            const float *from = matrices + (e * O + o) * I;
            unit *own = to + e * each;
            if (transposed) {
                unit *columns = own + in_panels(panel, 0, o);
                int64_t i = 0;
#ifdef TRANSPOSES
                for (; i + LANES * PER_UNIT <= I; i += LANES * PER_UNIT) {
                    uvec v[LANES];
                    for (int64_t r = 0; r < LANES; r++) v[r] = rounded_units(from + r * I + i);
                    transpose(v);
                    for (int64_t k = 0; k < LANES; k++, columns += TILE_COLUMNS) store_units(columns, v[k]);
                }
#endif
                for (; i < I; i += PER_UNIT, columns += TILE_COLUMNS)
                    for (int64_t r = 0; r < LANES; r++)
                        columns[r] = rounded(from[r * I + i], from[r * I + i + PER_UNIT - 1]);
                continue;
            }
            for (int64_t r = 0; r < LANES; r += PER_UNIT)
                for (int64_t i = 0; i < I; i += LANES)
                    store_units(own + in_panels(panel, (o + r) / PER_UNIT, i),
                                interleaved(load_floats(from + r * I + i),
                                            load_floats(from + (r + PER_UNIT - 1) * I + i)));
        }
}

/* ---- the network ---- */

typedef struct {
    int64_t expert, row, rows; /* rows are whole units; the last may be of zeros */
} span;

INLINE span span_of(const routed *p, int64_t task) {
    int64_t e = 0;
    while (task >= p->tile[e + 1]) e++;
    int64_t row = p->first[e] * PER_UNIT + (task - p->tile[e]) * ROWS, end = p->first[e + 1] * PER_UNIT;
    return (span){e, row, end - row < ROWS ? end - row : ROWS};
}

/* The rows of their tokens, one after the other. */
INLINE void gather(const routed *p, span s, const num *from, num *to) {
    for (int64_t r = 0; r < s.rows; r++) {
        int64_t entry = p->entry[s.row + r];
        if (entry < 0) memset(to + r * p->width, 0, p->width * sizeof(num));
        else memcpy(to + r * p->width, from + entry / p->chosen * p->width, p->width * sizeof(num));
    }
}

INLINE void round_rows(const float *from, int64_t n, num *to) {
    for (int64_t i = 0; i < n; i += LANES) store(to + i, load_floats(from + i));
}

/* Writes y (T, D) and keeps up and gate (rows, F). `out` has room for (rows, D). */
void experts(const routed *p, const num *x, const float *weights, const unit *w_in, const unit *w_gate,
             const unit *w_out, num *up, num *gate, num *out, num *y, int threads) {
    int64_t D = p->width, F = p->hidden, K = p->chosen, each = units(D * F);
    int64_t by_width = units(D) * TILE_COLUMNS, by_hidden = units(F) * TILE_COLUMNS;
#pragma omp parallel num_threads(threads)
    {
        num *rows = zeroed(ROWS * D, sizeof(num)), *active = zeroed(ROWS * F, sizeof(num));
        float *sums = zeroed(ROWS * (D > F ? D : F), sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->tile[p->experts]; task++) {
            span s = span_of(p, task);
            int64_t at = s.row * F, n = s.rows * F;
            gather(p, s, x, rows);
            product((unit *)rows, units(D), w_in + s.expert * each, by_width, sums, F, s.rows, F, units(D), 0);
            round_rows(sums, n, up + at);
            if (p->gated) {
                product((unit *)rows, units(D), w_gate + s.expert * each, by_width, sums, F, s.rows, F, units(D), 0);
                round_rows(sums, n, gate + at);
            }
            for (int64_t i = 0; i < n; i += LANES) {
                vec value, slope;
                activate(p->activation, load((p->gated ? gate : up) + at + i), &value, &slope);
                store(active + i, p->gated ? value * load(up + at + i) : value);
            }
            product((unit *)active, units(F), w_out + s.expert * each, by_hidden, sums, D, s.rows, D, units(F), 0);
            round_rows(sums, s.rows * D, out + s.row * D);
        }
        free(rows), free(active), free(sums);
#pragma omp for
        for (int64_t t = 0; t < p->tokens; t++)
            for (int64_t d = 0; d < D; d += LANES) {
                vec total = {0};
                for (int64_t k = 0; k < K; k++)
                    total += weights[t * K + k] * load(out + p->slot[t * K + k] * D + d);
                store(y + t * D + d, total);
            }
    }
}

/* What the gradients of the matrices are made of: for each unit of rows, units of D or F columns. */
typedef struct {
    unit *x, *grad_y, *grad_up, *grad_gate, *active;
} operands;

/* From the gradient of the activated hidden values, `sums`, to those of up and gate, and of a row's weight. */
INLINE float slopes_of_row(const routed *p, const float *sums, const num *up, const num *gate, float weight,
                           float *grad_up, float *grad_gate, float *weighted) {
    vec along = {0};
    for (int64_t f = 0; f < p->hidden; f += LANES) {
        vec value, slope, grad = load_floats(sums + f), linear = load(up + f);
        activate(p->activation, p->gated ? load(gate + f) : linear, &value, &slope);
        if (p->gated) {
            store_floats(grad_gate + f, weight * grad * slope * linear);
            store_floats(grad_up + f, weight * grad * value);
            value *= linear;
        } else {
            store_floats(grad_up + f, weight * grad * slope);
        }
        along += grad * value;
        store_floats(weighted + f, weight * value);
    }
    return sum_lanes(along);
}

/* Rows of floats, rounded, both as they are and from row k of panels on. */
INLINE void round_and_interleave(const float *from, int64_t rows, int64_t n, num *plain, unit *to,
                                 int64_t panel, int64_t k) {
    for (int64_t r = 0; r < rows; r += PER_UNIT)
        for (int64_t i = 0; i < n; i += LANES) {
            vec a = load_floats(from + r * n + i), b = load_floats(from + (r + PER_UNIT - 1) * n + i);
            if (plain) store(plain + r * n + i, a);
            if (plain && PER_UNIT > 1) store(plain + (r + 1) * n + i, b);
            store_units(to + in_panels(panel, k + r / PER_UNIT, i), interleaved(a, b));
        }
}

static void tile_backward(const routed *p, span s, const num *x, const num *grad_y, const float *weights,
                          const unit *w_in, const unit *w_gate, const unit *w_out, const num *up, const num *gate,
                          operands to, num *grad_rows, float *grad_weights, num *rows, float *sums, float *hidden) {
    int64_t D = p->width, F = p->hidden, k = s.row / PER_UNIT - p->first[s.expert], each = units(D * F);
    int64_t panel = (p->first[s.expert + 1] - p->first[s.expert]) * TILE_COLUMNS, e = s.expert;
    int64_t of_width = p->first[e] * D, of_hidden = p->first[e] * F;
    float *grad_up = hidden, *grad_gate = hidden + ROWS * F, *weighted = hidden + 2 * ROWS * F;
    gather(p, s, x, rows);
    for (int64_t r = 0; r < s.rows; r += PER_UNIT)
        interleave(rows + r * D, D, PER_UNIT, D, to.x + of_width, panel, k + r / PER_UNIT);
    gather(p, s, grad_y, rows);
    for (int64_t r = 0; r < s.rows; r += PER_UNIT)
        interleave(rows + r * D, D, PER_UNIT, D, to.grad_y + of_width, panel, k + r / PER_UNIT);
    product((unit *)rows, units(D), w_out + e * each, units(D) * TILE_COLUMNS, sums, F, s.rows, F, units(D), 0);
    for (int64_t r = 0; r < s.rows; r++) {
        int64_t entry = p->entry[s.row + r], at = (s.row + r) * F;
        float along = slopes_of_row(p, sums + r * F, up + at, p->gated ? gate + at : 0, entry < 0 ? 0 : weights[entry],
                                    grad_up + r * F, grad_gate + r * F, weighted + r * F);
        if (entry >= 0) grad_weights[entry] = along;
    }
    round_and_interleave(weighted, s.rows, F, 0, to.active + of_hidden, panel, k);
    round_and_interleave(grad_up, s.rows, F, rows, to.grad_up + of_hidden, panel, k);
    product((unit *)rows, units(F), w_in + e * each, units(F) * TILE_COLUMNS, sums, D, s.rows, D, units(F), 0);
    if (p->gated) {
        round_and_interleave(grad_gate, s.rows, F, rows, to.grad_gate + of_hidden, panel, k);
        product((unit *)rows, units(F), w_gate + e * each, units(F) * TILE_COLUMNS, sums, D, s.rows, D, units(F), 1);
    }
    round_rows(sums, s.rows * D, grad_rows + s.row * D);
}

/* The gradient of one matrix (O, I) of one expert, a panel of its rows from `row` on: a sum over the expert's rows. */
INLINE void matrix_gradient(const routed *p, int64_t e, const unit *a, int64_t O, const unit *b, int64_t I,
                            int64_t row, float *grad) {
    int64_t first = p->first[e], depth = p->first[e + 1] - first, panel = depth * TILE_COLUMNS;
    product_of_columns(a + first * O + row * depth, panel, b + first * I, panel, grad + (e * O + row) * I, I,
                       TILE_COLUMNS, I, depth, 0);
}

/* Writes the gradients of x (T, D), the weights (T, K) and the matrices. `grad_rows` has room for (rows, D), `scratch`
 * for what `operands` name: units(rows) x (2 D + 2 F) units, another F where there is a gate. */
void experts_backward(const routed *p, const num *x, const num *grad_y, const float *weights, const unit *w_in,
                      const unit *w_gate, const unit *w_out, const num *up, const num *gate, num *grad_rows,
                      unit *scratch, num *grad_x, float *grad_weights, float *grad_w_in, float *grad_w_gate,
                      float *grad_w_out, int threads) {
    int64_t D = p->width, F = p->hidden, K = p->chosen, E = p->experts, n = p->first[E];
    operands to = {scratch, scratch + n * D, scratch + 2 * n * D, scratch + n * (2 * D + 2 * F),
                   scratch + n * (2 * D + F)};
    int64_t in_tasks = F / TILE_COLUMNS, out_tasks = D / TILE_COLUMNS, each = in_tasks * (1 + p->gated) + out_tasks;
#pragma omp parallel num_threads(threads)
    {
        num *rows = zeroed(ROWS * (D > F ? D : F), sizeof(num));
        float *sums = zeroed(ROWS * (D > F ? D : F), sizeof(float)), *hidden = zeroed(3 * ROWS * F, sizeof(float));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < p->tile[E]; task++)
            tile_backward(p, span_of(p, task), x, grad_y, weights, w_in, w_gate, w_out, up, gate, to, grad_rows,
                          grad_weights, rows, sums, hidden);
        free(rows), free(sums), free(hidden);
#pragma omp for schedule(dynamic) nowait
        for (int64_t task = 0; task < E * each; task++) {
            int64_t e = task / each, i = task % each, row = i % in_tasks * TILE_COLUMNS;
            if (i < in_tasks) matrix_gradient(p, e, to.grad_up, F, to.x, D, row, grad_w_in);
            else if (i < each - out_tasks) matrix_gradient(p, e, to.grad_gate, F, to.x, D, row, grad_w_gate);
            else matrix_gradient(p, e, to.grad_y, D, to.active, F, (i - (each - out_tasks)) * TILE_COLUMNS, grad_w_out);
        }
#pragma omp for
        for (int64_t t = 0; t < p->tokens; t++)
            for (int64_t d = 0; d < D; d += LANES) {
                vec total = {0};
                for (int64_t k = 0; k < K; k++) total += load(grad_rows + p->slot[t * K + k] * D + d);
                store(grad_x + t * D + d, total);
            }
    }
}
