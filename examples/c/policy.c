/* Runs a policy that Python compressed: policy MODEL.safetensors [--kernel NAME] [--threads N] [--repeat N] <
 * observations
 *
 * MODEL is what tautorch.save wrote of an nn.Sequential of linear layers (nn.Linear, Int8Linear, SparseLinear
 * 4x1 or unstructured, LowRankLinear) and activations. Standard input holds one observation a line, its
 * numbers separated by spaces; standard output gets the actions, one line each. The structure is in the file,
 * so this program knows none. */
#include "safetensors.h"
#include "tautorch.h"

#include <math.h>
#include <stdarg.h>
#include <time.h>

enum { MOST_LAYERS = 256, MOST_MODULES = 1024, MOST_INPUTS = 1 << 20, MOST_KEPT = 12 };

typedef enum kind { LINEAR, RELU, GELU, GELU_TANH, SILU, TANH } kind;

typedef struct layer {
    kind kind;
    tt_plan plan;          /* LINEAR */
    int64_t outputs;       /* LINEAR */
    void *keep[MOST_KEPT]; /* what the plan points to, and what it was packed from */
    int kept;
} layer;

typedef struct policy {
    safetensors file;
    const char *kernel;
    layer layers[MOST_LAYERS];
    int count, modules;
    int64_t inputs, outputs; /* 0: no linear layer yet */
} policy;

/* Ends the program: nothing here is worth going on after an error. */
static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "policy: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static void *keep(layer *l, void *data) {
    if (!data)
        fail("out of memory");
    if (l->kept == MOST_KEPT)
        fail("a layer of more than %d tensors", MOST_KEPT);
    return l->keep[l->kept++] = data;
}

/* The tensor `module`.`name` of this dtype with `count` elements, kept by l; NULL where there is none and it
 * is not needed. */
static void *vector(const policy *p, layer *l, const char *module, const char *name, const char *dtype,
                    int64_t count, int needed) {
    char full[300];
    if (snprintf(full, sizeof full, "%s.%s", module, name) >= (int)sizeof full)
        fail("layer %s: the name is too long", module);
    tensor t;
    const int found = safetensors_read(&p->file, full, &t);
    if (found < 0 || (found == 0 && needed))
        fail("%s: %s", full, found < 0 ? "damaged" : "not in the file");
    if (found == 0)
        return NULL;
    if (strcmp(t.dtype, dtype) != 0 || (uint64_t)count != t.count)
        fail("%s: expected %lld values of %s, got %zu of %s", full, (long long)count, dtype, t.count,
             t.dtype);
    return keep(l, t.data ? t.data : malloc(1));
}

static void *packed_memory(layer *l, size_t bytes) {
    void *memory = NULL;
    /* posix_memalign is not in C99, and aligned_alloc neither. */
    char *raw = keep(l, malloc(bytes + 64));
    memory = raw + (64 - (uintptr_t)raw % 64) % 64;
    return memory;
}

static void check(tt_status status, const char *module) {
    if (status != TT_OK)
        fail("layer %s: %s", module, tt_last_error());
}

static void *pack_dense(const policy *p, layer *l, const char *module, int32_t kind, int64_t n, int64_t k,
                        const void *weight, size_t *bytes) {
    check(tt_dense_pack_size(p->kernel, kind, n, k, bytes), module);
    void *packed = packed_memory(l, *bytes);
    check(tt_dense_pack(p->kernel, kind, n, k, weight, packed, *bytes), module);
    return packed;
}

/* Indices of either width as numbers, at most `most`. */
static int64_t index_at(const tensor *t, size_t i, int64_t most, const char *module) {
    int64_t v = strcmp(t->dtype, "I16") == 0 ? ((const int16_t *)t->data)[i] : ((const int32_t *)t->data)[i];
    if (v < 0 || v > most)
        fail("layer %s: an index is out of range", module);
    return v;
}

static void indices(const policy *p, const char *module, const char *name, tensor *t) {
    char full[300];
    snprintf(full, sizeof full, "%s.%s", module, name);
    if (safetensors_read(&p->file, full, t) != 1 ||
        (strcmp(t->dtype, "I16") != 0 && strcmp(t->dtype, "I32") != 0))
        fail("%s: not in the file, or damaged", full);
}

static void *pack_sparse(const policy *p, layer *l, const char *module, int32_t config, int32_t kind,
                         int64_t n, int64_t k, size_t *bytes) {
    const json *j = &p->file.document;
    const int32_t pattern = json_get(j, config, "pattern");
    tt_sparse w;
    memset(&w, 0, sizeof w);
    w.outputs = n;
    w.inputs = k;
    w.group = json_is(j, pattern, "4x1") ? 4 : json_is(j, pattern, "unstructured") ? 1 : 0;
    if (w.group == 0)
        fail("layer %s: this example runs the patterns 4x1 and unstructured", module);
    tensor crow, col;
    indices(p, module, "crow_indices", &crow);
    indices(p, module, "col_indices", &col);
    const size_t groups = (size_t)((n + w.group - 1) / w.group);
    if (crow.count != groups + 1)
        fail("layer %s: expected %zu crow_indices, got %zu", module, groups + 1, crow.count);
    w.entries = (int64_t)col.count;
    w.values = vector(p, l, module, "values", kind == TT_WEIGHTS_INT8 ? "I8" : "F32", w.entries * w.group, 1);
    uint32_t *start = malloc((groups + 1) * sizeof *start);
    uint16_t *index = malloc((col.count + 1) * sizeof *index);
    if (!start || !index)
        fail("out of memory");
    for (size_t i = 0; i <= groups; ++i)
        start[i] = (uint32_t)index_at(&crow, i, w.entries, module);
    for (size_t i = 0; i < col.count; ++i)
        index[i] = (uint16_t)index_at(&col, i, UINT16_MAX, module);
    w.start = start;
    w.index = index;
    check(tt_sparse_pack_size(p->kernel, kind, &w, bytes), module);
    void *packed = packed_memory(l, *bytes);
    check(tt_sparse_pack(p->kernel, kind, &w, packed, *bytes), module);
    free(start);
    free(index);
    free(crow.data);
    free(col.data);
    return packed;
}

static int32_t activation_of(const json *j, int32_t config, const char *module) {
    static const char *const names[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
    const int32_t node = json_get(j, config, "activation");
    for (int32_t i = 0; i < 5; ++i)
        if (json_is(j, node, names[i]))
            return i;
    if (node >= 0)
        fail("layer %s: unknown activation", module);
    return TT_NONE; /* nn.Linear */
}

static void add_linear(policy *p, layer *l, const char *class, const char *module, int32_t config) {
    const json *j = &p->file.document;
    const int64_t k = json_integer(j, json_get(j, config, "in_features")),
                  n = json_integer(j, json_get(j, config, "out_features")),
                  rank = json_integer(j, json_get(j, config, "rank"));
    if (k < 1 || n < 1 || k > MOST_INPUTS || n > MOST_INPUTS || (p->outputs && k != p->outputs))
        fail("layer %s: its sizes fit neither the layer before it nor this program", module);
    if (json_is(j, json_get(j, config, "requantize"), "true"))
        fail("layer %s: this example passes floats from layer to layer", module);
    const int int8 = strcmp(class, "tautorch.nn.Int8Linear") == 0 ||
                     json_is(j, json_get(j, config, "weight_dtype"), "int8");
    const int32_t quant = json_get(j, config, "quant");
    const int32_t kind = !int8                              ? TT_WEIGHTS_FLOAT
                         : json_is(j, quant, "weight_only") ? TT_WEIGHTS_INT8_FLOAT_X
                                                            : TT_WEIGHTS_INT8;
    const char *type = int8 ? "I8" : "F32";
    tt_layer t;
    memset(&t, 0, sizeof t);
    t.inputs = k;
    t.outputs = n;
    t.activation = activation_of(j, config, module);
    t.bias = vector(p, l, module, "bias", "F32", n, 0);
    if (int8 && json_is(j, quant, "static")) {
        t.x_scale = *(float *)vector(p, l, module, "x_scale", "F32", 1, 1);
        if (t.x_scale == 0)
            fail("layer %s: its x_scale is 0", module); /* to tt_linear_plan: none given */
        const int32_t *zero = vector(p, l, module, "x_zero_point", "I32", 1, 0);
        t.x_zero_point = zero ? *zero : 0;
    }
    if (strcmp(class, "tautorch.nn.LowRankLinear") == 0) {
        if (rank < 1 || rank > MOST_INPUTS || !json_is(j, json_get(j, config, "residual"), "null"))
            fail("layer %s: this example runs low-rank layers without a residual", module);
        size_t up_bytes = 0;
        t.packed = pack_dense(p, l, module, kind, rank, k, vector(p, l, module, "down", type, rank * k, 1),
                              &t.packed_bytes);
        const void *up =
            pack_dense(p, l, module, kind, n, rank, vector(p, l, module, "up", type, n * rank, 1), &up_bytes);
        t.weight_scale = int8 ? vector(p, l, module, "up_scale", "F32", n, 1) : NULL;
        const float *down_scale = int8 ? vector(p, l, module, "down_scale", "F32", rank, 1) : NULL;
        check(tt_lowrank_plan(&t, up, up_bytes, down_scale, &l->plan), module);
    } else {
        t.weight_scale = int8 ? vector(p, l, module, "weight_scale", "F32", n, 1) : NULL;
        if (strcmp(class, "tautorch.nn.SparseLinear") == 0)
            t.packed = pack_sparse(p, l, module, config, kind, n, k, &t.packed_bytes);
        else
            t.packed = pack_dense(p, l, module, kind, n, k, vector(p, l, module, "weight", type, n * k, 1),
                                  &t.packed_bytes);
        check(tt_linear_plan(&t, &l->plan), module);
    }
    l->outputs = p->outputs = n;
    if (p->inputs == 0)
        p->inputs = k;
}

/* A node's length for printf, enough to fill any name here. */
static int printed(const json *j, int32_t i) {
    return (int)(j->nodes[i].length < 256 ? j->nodes[i].length : 256);
}

static void add_module(policy *p, const char *module, int depth) {
    static const struct {
        const char *class;
        kind kind;
    } activations[] = {
        {"torch.nn.ReLU", RELU}, {"torch.nn.GELU", GELU}, {"torch.nn.SiLU", SILU}, {"torch.nn.Tanh", TANH}};
    static const char *const linear[] = {"torch.nn.Linear", "tautorch.nn.Int8Linear",
                                         "tautorch.nn.SparseLinear", "tautorch.nn.LowRankLinear"};
    static const char *const nothing[] = {"torch.nn.Identity", "torch.nn.Dropout"};
    const json *j = &p->file.document;
    const int32_t node = json_get(j, json_get(j, 0, "modules"), module), class = json_get(j, node, "class"),
                  config = json_get(j, node, "config"), same = json_get(j, node, "same_as");
    if ((class < 0 && same < 0) || depth > JSON_DEPTH)
        fail("module '%s' is not in the file, or too deep", module);
    if (++p->modules > MOST_MODULES) /* names that repeat could make a tree without end */
        fail("more than %d modules", MOST_MODULES);
    if (same >= 0) { /* a module that is there twice: described where it came first */
        char first[256];
        if (snprintf(first, sizeof first, "%.*s", printed(j, same), j->nodes[same].text) >= (int)sizeof first)
            fail("module '%s': a name is too long", module);
        add_module(p, first, depth + 1);
        return;
    }
    if (json_is(j, class, "torch.nn.Sequential")) {
        const int32_t children = json_get(j, node, "children");
        for (int32_t i = children < 0 ? -1 : j->nodes[children].child; i >= 0; i = j->nodes[i].next) {
            char name[256];
            const int length = snprintf(name, sizeof name, "%s%s%.*s", module, *module ? "." : "",
                                        printed(j, i), j->nodes[i].text);
            if (length >= (int)sizeof name)
                fail("module '%s': a name is too long", module);
            add_module(p, name, depth + 1);
        }
        return;
    }
    for (size_t i = 0; i < sizeof nothing / sizeof *nothing; ++i)
        if (json_is(j, class, nothing[i]))
            return;
    if (p->count == MOST_LAYERS)
        fail("more than %d layers", MOST_LAYERS);
    layer *l = &p->layers[p->count++];
    for (size_t i = 0; i < sizeof linear / sizeof *linear; ++i)
        if (json_is(j, class, linear[i])) {
            l->kind = LINEAR;
            add_linear(p, l, linear[i], module, config);
            return;
        }
    for (size_t i = 0; i < sizeof activations / sizeof *activations; ++i)
        if (json_is(j, class, activations[i].class)) {
            l->kind = activations[i].kind;
            if (l->kind == GELU && json_is(j, json_get(j, config, "approximate"), "tanh"))
                l->kind = GELU_TANH;
            return;
        }
    fail("module '%s': this example does not run %.*s", module, printed(j, class), j->nodes[class].text);
}

static float activate(kind kind, float x) {
    switch (kind) {
    case RELU:
        return x < 0 ? 0 : x; /* NaN stays */
    case GELU:
        return 0.5f * x * (1 + erff(x * 0.70710678f));
    case GELU_TANH:
        return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case SILU:
        return x / (1 + expf(-x));
    case TANH:
        return tanhf(x);
    default:
        return x;
    }
}

/* actions [rows][p->outputs] of observations [rows][p->inputs]; free them. */
static float *run(const policy *p, const float *observations, int64_t rows) {
    float *x = NULL;
    int64_t width = p->inputs;
    for (int i = 0; i < p->count; ++i) {
        const layer *l = &p->layers[i];
        if (l->kind == LINEAR) {
            float *y = malloc((size_t)(rows * l->outputs) * sizeof *y + 1);
            if (!y)
                fail("out of memory");
            check(tt_run(&l->plan, x ? x : observations, rows, y), "at run time");
            free(x);
            x = y;
            width = l->outputs;
        } else {
            for (int64_t e = 0; e < rows * width; ++e)
                x[e] = activate(l->kind, x[e]);
        }
    }
    return x;
}

static float *read_observations(int64_t inputs, int64_t *rows) {
    size_t count = 0, capacity = 0;
    float *values = NULL, value;
    while (scanf("%f", &value) == 1) {
        if (count == capacity) {
            capacity = capacity ? 2 * capacity : 1024;
            values = realloc(values, capacity * sizeof *values);
            if (!values)
                fail("out of memory");
        }
        values[count++] = value;
    }
    if (!feof(stdin) || count % (size_t)inputs != 0)
        fail("standard input must hold numbers, %lld for each observation", (long long)inputs);
    *rows = (int64_t)(count / (size_t)inputs);
    return values;
}

int main(int argc, char **argv) {
    static policy p; /* plans are large */
    const char *path = argc > 1 ? argv[1] : NULL;
    int repeats = 0;
    for (int i = 2; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--kernel") == 0)
            p.kernel = argv[i + 1];
        else if (strcmp(argv[i], "--threads") == 0)
            check(tt_set_threads(atoi(argv[i + 1])), "--threads");
        else if (strcmp(argv[i], "--repeat") == 0)
            repeats = atoi(argv[i + 1]);
        else
            path = NULL;
    }
    if (!path || argc % 2 != 0)
        fail("usage: policy MODEL.safetensors [--kernel NAME] [--threads N] [--repeat N] < observations");
    const char *problem = safetensors_open(path, &p.file);
    if (problem)
        fail("%s %s", path, problem);
    if (!json_is(&p.file.document, json_get(&p.file.document, 0, "format"), "1"))
        fail("%s: of another format than 1", path);
    add_module(&p, "", 0);
    if (p.count == 0 || p.layers[0].kind != LINEAR)
        fail("%s: a policy begins with a linear layer", path);
    fprintf(stderr, "policy: %lld -> %lld, %d layers, kernel %s, tautorch %s\n", (long long)p.inputs,
            (long long)p.outputs, p.count, tt_plan_kernel(&p.layers[0].plan), tt_version());
    int64_t rows = 0;
    float *observations = read_observations(p.inputs, &rows), *actions = run(&p, observations, rows);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < p.outputs; ++i)
            printf("%.9g%c", (double)actions[r * p.outputs + i], i + 1 < p.outputs ? ' ' : '\n');
    const clock_t start = clock();
    for (int i = 0; i < repeats; ++i)
        free(run(&p, observations, rows));
    if (repeats > 0)
        fprintf(stderr, "policy: %.3f us of processor time for %lld observations, mean of %d runs\n",
                1e6 * (double)(clock() - start) / CLOCKS_PER_SEC / repeats, (long long)rows, repeats);
    free(observations);
    free(actions);
    for (int i = 0; i < p.count; ++i)
        for (int k = 0; k < p.layers[i].kept; ++k)
            free(p.layers[i].keep[k]);
    safetensors_close(&p.file);
    return 0;
}
