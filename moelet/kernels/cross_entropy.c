/* Cross-entropy of a softmax over a large vocabulary, with its gradients, from hidden states and the output table.
 *
 * Hidden states come in chunks of rows, the vocabulary in tiles of columns, each a task of its own. A first pass over
 * the tiles makes e^(logit - tile's largest), which is all that is kept of the logits, and each tile's sum; a second
 * pass turns them into probabilities and multiplies those with the table and with the hidden states. So no more than
 * CHUNK x V numbers exist, the logits themselves are never rounded, and a tile's work stays in a core's cache.
 *
 * R is a multiple of TILE_COLUMNS.
 */
#include "products.h"

#define CHUNK 512
#define COLUMNS 256 /* of a tile */
#define ROWS 24     /* whose logits are held in float at a time */
#define GROUPS 32   /* of tiles; each sums its part of the hidden states' gradient, so that the order is fixed */
#define BY_ROWS (CHUNK / PER_UNIT * TILE_COLUMNS) /* a panel of a chunk's rows */
#define ABSENT -1e30f

typedef struct {
    int64_t rows, rank, pieces; /* T, R, V */
    int64_t ignored;            /* a label that is no target */
} vocabulary;

INLINE int64_t tiles(const vocabulary *p) { return (p->pieces + COLUMNS - 1) / COLUMNS; }
INLINE int64_t columns_of(const vocabulary *p, int64_t tile) { return at_most(COLUMNS, p->pieces - tile * COLUMNS); }

/* The table in `num` (V, R): for logits (tiles, R units, COLUMNS); for the gradient (tiles, COLUMNS units, R). */
static void pack_table(const vocabulary *p, const num *table, unit *for_logits, unit *for_gradient, int threads) {
    int64_t R = p->rank, each = units(COLUMNS);
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = 0; tile < tiles(p); tile++) {
        int64_t n = columns_of(p, tile);
        const num *rows = table + tile * COLUMNS * R;
        unit *columns = for_logits + tile * units(R) * COLUMNS;
        if (n < COLUMNS) memset(columns, 0, units(R) * COLUMNS * sizeof(unit));
        transpose_units(rows, R, n, R, columns, units(R) * TILE_COLUMNS);
        for (int64_t r = 0; for_gradient && r < COLUMNS; r += PER_UNIT)
            interleave(r < n ? rows + r * R : rows, R, n - r, R, for_gradient + tile * each * R, each * TILE_COLUMNS,
                       r / PER_UNIT);
    }
}

/* One tile of one chunk: its numbers e^(logit - top) (CHUNK, COLUMNS), each row's top and sum, and labels' logits. */
static void exponentials(const vocabulary *p, int64_t tile, int64_t n, const num *h, const int64_t *labels,
                         const unit *table, float *logits, num *to, float *tops, float *sums, float *at_label) {
    int64_t real = columns_of(p, tile), wide = whole_columns(real), depth = units(p->rank);
    for (int64_t first = 0; first < n; first += ROWS) {
        int64_t rows = at_most(ROWS, n - first);
        product((const unit *)(h + first * p->rank), depth, table, depth * TILE_COLUMNS, logits, COLUMNS, rows, wide,
                depth, 0);
        for (int64_t r = 0; r < rows; r++) {
            float *row = logits + r * COLUMNS;
            num *out = to + (first + r) * COLUMNS;
            vec best = splat(ABSENT), sum = {0};
            for (int64_t c = real; c < COLUMNS; c++) row[c] = ABSENT;
            for (int64_t c = 0; c < COLUMNS; c += LANES) best = larger(best, load_floats(row + c));
            float top = largest_lane(best);
            for (int64_t c = 0; c < COLUMNS; c += LANES) {
                vec e = exponential(load_floats(row + c) - top);
                sum += e;
                store(out + c, e);
            }
            tops[first + r] = top;
            sums[first + r] = sum_lanes(sum);
            int64_t label = labels[first + r] - tile * COLUMNS;
            if (label >= 0 && label < real) at_label[first + r] = row[label];
        }
    }
}

/* The logarithm of each row's sum over all tiles; adds the nats of its label. */
static double logarithms(const vocabulary *p, int64_t n, const int64_t *labels, const float *tops, const float *sums,
                         const float *at_label, float *log_sums) {
    double nats = 0;
    for (int64_t r = 0; r < n; r++) {
        float top = ABSENT;
        double sum = 0;
        for (int64_t t = 0; t < tiles(p); t++) top = tops[t * CHUNK + r] > top ? tops[t * CHUNK + r] : top;
        for (int64_t t = 0; t < tiles(p); t++) sum += sums[t * CHUNK + r] * expf(tops[t * CHUNK + r] - top);
        log_sums[r] = top + (float)log(sum);
        if (labels[r] != p->ignored) nats += log_sums[r] - at_label[r];
    }
    return nats;
}

typedef struct {
    num *plain;  /* (CHUNK, COLUMNS) */
    unit *pairs; /* (CHUNK units, COLUMNS) */
} slopes;

/* Turns a tile's exponentials into probabilities less one at the label, rows that are no target into zeros. */
static void slopes_of_tile(const vocabulary *p, int64_t tile, int64_t n, const int64_t *labels, const num *from,
                           const float *tops, const float *log_sums, slopes to) {
    for (int64_t r = 0; r < n; r += PER_UNIT) {
        float factor[2] = {0, 0};
        int64_t label[2] = {-1, -1};
        for (int t = 0; t < PER_UNIT && r + t < n; t++)
            if (labels[r + t] != p->ignored) {
                factor[t] = expf(tops[r + t] - log_sums[r + t]);
                label[t] = labels[r + t] - tile * COLUMNS;
            }
        for (int64_t c = 0; c < COLUMNS; c += LANES) {
            vec slope[2] = {{0}, {0}}, lanes = lane_index() + (float)c;
            for (int t = 0; t < PER_UNIT && r + t < n; t++) {
                slope[t] = load(from + (r + t) * COLUMNS + c) * factor[t];
                if (label[t] >= c && label[t] < c + LANES)
                    slope[t] = choose(lanes == (float)label[t], slope[t] - 1, slope[t]);
                store(to.plain + (r + t) * COLUMNS + c, slope[t]);
            }
            store_units(to.pairs + in_panels(BY_ROWS, r / PER_UNIT, c), interleaved(slope[0], slope[1]));
        }
    }
}

/* Returns the nats of all targets. Writes the gradients of h (T, R) and of the table (V, R) unless they are null. */
double cross_entropy(const vocabulary *p, const num *h, const num *table, const int64_t *labels, float *grad_h,
                     float *grad_table, int threads) {
    int64_t R = p->rank, V = p->pieces, n_tiles = tiles(p), depth = units(R), part = CHUNK * R;
    int64_t longest = at_most(CHUNK, p->rows), tile_units = units(COLUMNS) * R;
    unit *for_logits = zeroed(n_tiles * depth * COLUMNS, sizeof(unit));
    unit *for_gradient = grad_h ? zeroed(n_tiles * tile_units, sizeof(unit)) : 0;
    unit *h_pairs = zeroed(units(CHUNK) * R, sizeof(unit));
    num *all = zeroed(n_tiles * longest * COLUMNS, sizeof(num));
    float *tops = zeroed(n_tiles * CHUNK, sizeof(float)), *sums = zeroed(n_tiles * CHUNK, sizeof(float));
    float *at_label = zeroed(CHUNK, sizeof(float)), *log_sums = zeroed(CHUNK, sizeof(float));
    float *parts = grad_h ? zeroed(GROUPS * part, sizeof(float)) : 0;
    double nats = 0;
    pack_table(p, table, for_logits, for_gradient, threads);
#pragma omp parallel num_threads(threads)
    {
        float *logits = zeroed(ROWS * COLUMNS, sizeof(float));
        slopes s = {zeroed(CHUNK * COLUMNS, sizeof(num)), zeroed(units(CHUNK) * COLUMNS, sizeof(unit))};
        for (int64_t first = 0; first < p->rows; first += CHUNK) {
            int64_t n = at_most(CHUNK, p->rows - first);
            const num *rows = h + first * R;
#pragma omp for schedule(dynamic)
            for (int64_t t = 0; t < n_tiles; t++)
                exponentials(p, t, n, rows, labels + first, for_logits + t * depth * COLUMNS, logits,
                             all + t * longest * COLUMNS, tops + t * CHUNK, sums + t * CHUNK, at_label);
#pragma omp single
            {
                nats += logarithms(p, n, labels + first, tops, sums, at_label, log_sums);
                for (int64_t r = 0; r < n; r += PER_UNIT)
                    interleave(rows + r * R, R, n - r, R, h_pairs, BY_ROWS, r / PER_UNIT);
            }
            if (!grad_h) continue;
#pragma omp for schedule(dynamic)
            for (int64_t group = 0; group < GROUPS; group++) {
                float *own = parts + group * part;
                memset(own, 0, part * sizeof(float));
                for (int64_t t = n_tiles * group / GROUPS; t < n_tiles * (group + 1) / GROUPS; t++) {
                    slopes_of_tile(p, t, n, labels + first, all + t * longest * COLUMNS, tops + t * CHUNK, log_sums, s);
                    product_of_columns(s.pairs, BY_ROWS, h_pairs, BY_ROWS, grad_table + t * COLUMNS * R, R,
                                       columns_of(p, t), R, units(n), first > 0);
                    product((unit *)s.plain, units(COLUMNS), for_gradient + t * tile_units,
                            units(COLUMNS) * TILE_COLUMNS, own, R, n, R, units(columns_of(p, t)), 1);
                }
            }
#pragma omp for
            for (int64_t i = 0; i < n * R; i += LANES) {
                vec total = {0};
                for (int64_t group = 0; group < GROUPS; group++) total += load_floats(parts + group * part + i);
                store_floats(grad_h + first * R + i, total);
            }
        }
        free(logits), free(s.plain), free(s.pairs);
    }
    if (grad_table && !p->rows) memset(grad_table, 0, V * R * sizeof(float));
    free(for_logits), free(for_gradient), free(h_pairs), free(all), free(tops), free(sums), free(at_label);
    free(log_sums), free(parts);
    return nats;
}
