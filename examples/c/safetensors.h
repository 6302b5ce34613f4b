/* A reader of safetensors files as tautorch.save writes them: tensors, and the JSON document of the model's
 * structure. Every offset is checked against the file, and every shape against its bytes: a damaged or
 * hostile file is an error. */
#ifndef EXAMPLE_SAFETENSORS_H
#define EXAMPLE_SAFETENSORS_H

#include "json.h"

#include <stdio.h>

typedef struct safetensors {
    char *bytes;
    size_t size;
    size_t data; /* where tensors begin */
    json header, document;
} safetensors;

typedef struct tensor {
    char dtype[8]; /* "F32", "I8", "I16", "I32", ... */
    int32_t rank;
    int64_t shape[4];
    size_t count; /* elements */
    void *data;   /* a copy, aligned as malloc aligns; NULL where there is no element */
} tensor;

static void safetensors_close(safetensors *f) {
    json_free(&f->header);
    json_free(&f->document);
    free(f->bytes);
    memset(f, 0, sizeof *f);
}

/* Returns NULL, or what is wrong; then too, safetensors_close f. */
static const char *safetensors_open(const char *path, safetensors *f) {
    memset(f, 0, sizeof *f);
    FILE *file = fopen(path, "rb");
    if (!file)
        return "cannot be opened";
    long size = -1;
    if (fseek(file, 0, SEEK_END) == 0)
        size = ftell(file);
    rewind(file);
    if (size >= 8 && (f->bytes = malloc((size_t)size)) != NULL)
        f->size = fread(f->bytes, 1, (size_t)size, file);
    fclose(file);
    if (size < 8 || f->size != (size_t)size)
        return "cannot be read, or is too short";
    uint64_t length = 0;
    for (int i = 7; i >= 0; --i)
        length = length << 8 | (unsigned char)f->bytes[i];
    if (length > f->size - 8)
        return "has a header longer than the file";
    f->data = 8 + (size_t)length;
    if (!json_parse(&f->header, f->bytes + 8, (size_t)length) || f->header.nodes[0].type != '{')
        return "has a header that is no JSON object";
    const int32_t text = json_get(&f->header, json_get(&f->header, 0, "__metadata__"), "tautorch");
    if (text < 0 || f->header.nodes[text].type != '"')
        return "was not written by tautorch.save";
    if (!json_parse(&f->document, f->header.nodes[text].text, f->header.nodes[text].length))
        return "has a damaged structure document";
    return NULL;
}

/* 1: found, by its own name or, where two layers share it, by the one it was saved under. 0: there is none of
 * that name. -1: it is damaged, or memory is short. Free t->data. */
static int safetensors_read(const safetensors *f, const char *name, tensor *t) {
    static const struct {
        const char *name;
        size_t size;
    } dtypes[] = {{"F32", 4}, {"I32", 4}, {"I16", 2},  {"I8", 1},
                  {"U8", 1},  {"F16", 2}, {"BF16", 2}, {"I64", 8}};
    memset(t, 0, sizeof *t);
    const json *j = &f->header, *d = &f->document;
    const int32_t shared = json_get(d, json_get(d, 0, "aliases"), name);
    const int32_t entry = shared < 0 ? json_get(j, 0, name)
                                     : json_find(j, 0, d->nodes[shared].text, d->nodes[shared].length),
                  dtype = json_get(j, entry, "dtype"), shape = json_get(j, entry, "shape"),
                  offsets = json_get(j, entry, "data_offsets");
    if (entry < 0)
        return 0;
    if (dtype < 0 || shape < 0 || offsets < 0 || j->nodes[shape].type != '[' || j->nodes[offsets].type != '[')
        return -1;
    size_t size = 0;
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; ++i)
        if (json_is(j, dtype, dtypes[i].name)) {
            size = dtypes[i].size;
            strcpy(t->dtype, dtypes[i].name);
        }
    if (size == 0)
        return -1;
    t->count = 1;
    for (int32_t i = j->nodes[shape].child; i >= 0; i = j->nodes[i].next) {
        const int64_t n = json_integer(j, i);
        if (n < 0 || t->rank == 4 || (n > 0 && t->count > f->size / (uint64_t)n))
            return -1;
        t->shape[t->rank++] = n;
        t->count *= (size_t)n;
    }
    const int32_t first = j->nodes[offsets].child, second = first < 0 ? -1 : j->nodes[first].next;
    const int64_t begin = json_integer(j, first), end = json_integer(j, second);
    if (begin < 0 || end < begin || j->nodes[second].next >= 0 || (uint64_t)end > f->size - f->data ||
        (uint64_t)(end - begin) != (uint64_t)t->count * size)
        return -1;
    if (t->count == 0)
        return 1;
    t->data = malloc(t->count * size);
    if (!t->data)
        return -1;
    memcpy(t->data, f->bytes + f->data + begin, t->count * size);
    return 1;
}

#endif
