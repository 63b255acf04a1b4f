/* The whole network for one new token a row: what is read is each active weight, once.
 *
 * Matrices are in `num`, everything else in float. One team of threads goes through all layers; each product shares
 * out its matrix's rows. Widths are multiples of LANES.
 */
#include "activations.h"
#include "routing.h"

#define TOGETHER 4 /* rows of a matrix, so that additions don't wait for one another */

typedef struct {
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm; /* (C), or null */
    const float *router, *bias;   /* no router: one expert that all use; the bias (E) may be null */
    const num *q, *k, *v, *o, *up, *gate, *down;
    float *keys, *values; /* (batch, heads, context, C): the cache */
} layer;

typedef struct {
    int64_t layers, width, heads, rank, pieces, experts, chosen, hidden, context; /* D, H, R, V, E, K, F */
    int activation, gated, normalize, embed_norm;
    float eps, scale;                /* of the norms; of the embedding at the input */
    const float *tokens, *positions; /* (V, R); (context, D) or null */
    const float *cos, *sin;          /* (context, C/2), or null: queries and keys aren't turned */
    const num *proj, *table;         /* (D, R) or null: R is D; (V, R) */
    const float *norm;
    const layer *layer;
} network;

/* y[r] = rows of w (O, I) times x, shared out over the team. */
static void times(const num *w, int64_t O, int64_t I, const float *x, float *y) {
#pragma omp for
    for (int64_t o = 0; o < O; o += TOGETHER) {
        int64_t n = O - o < TOGETHER ? O - o : TOGETHER;
        vec sums[TOGETHER] = {{0}, {0}, {0}, {0}};
        if (n == TOGETHER)
            for (int64_t i = 0; i < I; i += LANES) {
                vec part = load_floats(x + i);
                for (int t = 0; t < TOGETHER; t++) sums[t] += part * load(w + (o + t) * I + i);
            }
        else
            for (int64_t t = 0; t < n; t++)
                for (int64_t i = 0; i < I; i += LANES) sums[t] += load_floats(x + i) * load(w + (o + t) * I + i);
        for (int64_t t = 0; t < n; t++) y[o + t] = sum_lanes(sums[t]);
    }
}

/* y = x / rms(x), times the weight where there is one. */
INLINE void norm(const network *p, const float *x, int64_t n, const float *weight, float *y) {
    vec squares = {0};
    for (int64_t i = 0; i < n; i += LANES) squares += load_floats(x + i) * load_floats(x + i);
    float inverse = 1 / sqrtf(sum_lanes(squares) / (float)n + p->eps);
    for (int64_t i = 0; i < n; i += LANES)
        store_floats(y + i, load_floats(x + i) * inverse * (weight ? load_floats(weight + i) : splat(1)));
}

static void rms_norm(const network *p, const float *x, const float *weight, float *y) {
#pragma omp single
    norm(p, x, p->width, weight, y);
}

/* One head of a query or key: normed and turned, each where the network does that. */
INLINE void prepare_head(const network *p, float *x, const float *weight, int64_t position) {
    int64_t C = p->width / p->heads, half = C / 2;
    if (weight) norm(p, x, C, weight, x);
    for (int64_t c = 0; p->cos && c < half; c += LANES) {
        vec cos = load_floats(p->cos + position * half + c), sin = load_floats(p->sin + position * half + c);
        vec a = load_floats(x + c), b = load_floats(x + half + c);
        store_floats(x + c, a * cos - b * sin);
        store_floats(x + half + c, b * cos + a * sin);
    }
}

static void add(const network *p, float *x, const float *y) {
#pragma omp single
    for (int64_t d = 0; d < p->width; d += LANES) store_floats(x + d, load_floats(x + d) + load_floats(y + d));
}

/* Attention of one query to the `length` positions of the cache, the last of which is its own. */
static void attend(const network *p, const layer *l, int64_t b, int64_t length, float *q, float *k, const float *v,
                   float *scores, float *out) {
    int64_t C = p->width / p->heads;
    float scale = 1 / sqrtf((float)C);
#pragma omp for
    for (int64_t h = 0; h < p->heads; h++) {
        float *keys = l->keys + (b * p->heads + h) * p->context * C;
        float *values = l->values + (b * p->heads + h) * p->context * C, *own = scores + h * p->context;
        float top = -INFINITY, total = 0;
        prepare_head(p, q + h * C, l->q_norm, length - 1);
        prepare_head(p, k + h * C, l->k_norm, length - 1);
        memcpy(keys + (length - 1) * C, k + h * C, C * sizeof(float));
        memcpy(values + (length - 1) * C, v + h * C, C * sizeof(float));
        for (int64_t j = 0; j < length; j++) {
            vec dot = {0};
            for (int64_t c = 0; c < C; c += LANES) dot += load_floats(q + h * C + c) * load_floats(keys + j * C + c);
            own[j] = sum_lanes(dot) * scale;
            top = own[j] > top ? own[j] : top;
        }
        for (int64_t j = 0; j < length; j++) total += own[j] = expf(own[j] - top);
        for (int64_t c = 0; c < C; c += LANES) {
            vec sum = {0};
            for (int64_t j = 0; j < length; j++) sum += own[j] * load_floats(values + j * C + c);
            store_floats(out + h * C + c, sum / total);
        }
    }
}

/* The chosen experts' weighted sum for one token. `hidden` is (K, 2, F). */
static void feed_forward(const network *p, const layer *l, const float *x, int64_t *ids, float *weights,
                         float *hidden, float *out, float *y) {
    int64_t D = p->width, F = p->hidden;
#pragma omp single
    {
        routing r = {1, D, p->experts, p->chosen, p->normalize};
        float scores[whole_vectors(p->experts)], probability[whole_vectors(p->experts)];
        for (int64_t e = 0; l->router && e < p->experts; e++) {
            vec dot = {0};
            for (int64_t d = 0; d < D; d += LANES) dot += load_floats(x + d) * load_floats(l->router + e * D + d);
            scores[e] = sum_lanes(dot);
        }
        if (l->router) choose_experts(&r, scores, l->bias, probability, ids, weights);
        else ids[0] = 0, weights[0] = 1;
        memset(y, 0, D * sizeof(float));
    }
    for (int64_t k = 0; k < p->chosen; k++) {
        float *up = hidden, *gate = hidden + F;
        times(l->up + ids[k] * F * D, F, D, x, up);
        if (p->gated) times(l->gate + ids[k] * F * D, F, D, x, gate);
#pragma omp single
        for (int64_t f = 0; f < F; f += LANES) {
            vec value, slope;
            activate(p->activation, load_floats((p->gated ? gate : up) + f), &value, &slope);
            store_floats(up + f, weights[k] * (p->gated ? value * load_floats(up + f) : value));
        }
        times(l->down + ids[k] * D * F, D, F, up, out);
        add(p, y, out);
    }
}

/* x (D) = the table's row, projected up, normed and scaled, and its position's row added. */
static void embed(const network *p, int64_t id, int64_t position, float *x) {
    if (p->proj) times(p->proj, p->width, p->rank, p->tokens + id * p->rank, x);
#pragma omp single
    {
        if (!p->proj) memcpy(x, p->tokens + id * p->rank, p->width * sizeof(float));
        if (p->embed_norm) norm(p, x, p->width, 0, x);
        for (int64_t d = 0; d < p->width; d += LANES) {
            vec own = p->positions ? load_floats(p->positions + position * p->width + d) : (vec){0};
            store_floats(x + d, load_floats(x + d) * p->scale + own);
        }
    }
}

/* The final state in the table's space: the projection, transposed. */
static void project(const network *p, const float *x, float *features) {
#pragma omp for
    for (int64_t r = 0; r < p->rank; r += LANES) {
        vec sum = {0};
        if (!p->proj) sum = load_floats(x + r);
        else
            for (int64_t d = 0; d < p->width; d++) sum += x[d] * load(p->proj + d * p->rank + r);
        store_floats(features + r, sum);
    }
}

/* Logits (batch, V) of the tokens `ids` (batch) at `position`, and the experts that each layer chose for them, with
 * their weights, (layers, batch, K); their keys and values enter the cache. */
void decode(const network *p, const int64_t *ids, int64_t batch, int64_t position, float *logits, int64_t *chosen,
            float *weights, int threads) {
    int64_t D = p->width, F = p->hidden, R = p->rank;
    int64_t sizes[] = {D, D, D, D, D, D, D, 2 * F, p->heads * p->context, R}, total = 0;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) total += sizes[i];
    float *room = aligned_alloc(64, (total * sizeof(float) + 63) / 64 * 64);
    if (!room) abort();
    float *x = room, *normed = x + D, *q = normed + D, *k = q + D, *v = k + D, *y = v + D, *out = y + D;
    float *hidden = out + D, *scores = hidden + 2 * F, *features = scores + p->heads * p->context;
#pragma omp parallel num_threads(threads)
    for (int64_t b = 0; b < batch; b++) {
        embed(p, ids[b], position, x);
        for (const layer *l = p->layer; l < p->layer + p->layers; l++) {
            rms_norm(p, x, l->input_norm, normed);
            times(l->q, D, D, normed, q);
            times(l->k, D, D, normed, k);
            times(l->v, D, D, normed, v);
            attend(p, l, b, position + 1, q, k, v, scores, y);
            times(l->o, D, D, y, out);
            add(p, x, out);
            rms_norm(p, x, l->post_norm, normed);
            int64_t route = ((l - p->layer) * batch + b) * p->chosen;
            feed_forward(p, l, normed, chosen + route, weights + route, hidden, out, y);
            add(p, x, y);
        }
        rms_norm(p, x, p->norm, normed);
        project(p, normed, features);
        times(p->table, p->pieces, R, features, logits + b * p->pieces);
    }
    free(room);
}
