/* A reader of JSON for files that may be hostile: bounded depth, no recursion on input beyond it, no number
 * arithmetic but integers. Values are slices of the text, which must outlive them; escapes are replaced in
 * place by what they stand for, so the text is the reader's own. */
#ifndef EXAMPLE_JSON_H
#define EXAMPLE_JSON_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_DEPTH = 16 };

/* '{' object, '[' array, '"' string, 'v' number or word. Nodes of an object come after their key. */
typedef struct json_node {
    char type;
    char *text; /* a string without quotes and escapes, in UTF-8; no character of it is 0 */
    size_t length;
    const char *key;
    size_t key_length;
    int32_t child, next; /* index of a node, or -1 */
} json_node;

typedef struct json {
    json_node *nodes;
    int32_t count, capacity;
    char *at, *end;
} json;

static int32_t json_add(json *j, char type) {
    if (j->count == j->capacity) {
        int32_t capacity = j->capacity ? 2 * j->capacity : 64;
        json_node *nodes = capacity < 1 << 24 ? realloc(j->nodes, (size_t)capacity * sizeof *nodes) : NULL;
        if (!nodes)
            return -1;
        j->nodes = nodes;
        j->capacity = capacity;
    }
    json_node node = {type, j->at, 0, NULL, 0, -1, -1};
    j->nodes[j->count] = node;
    return j->count++;
}

static void json_space(json *j) {
    while (j->at < j->end && (*j->at == ' ' || *j->at == '\n' || *j->at == '\t' || *j->at == '\r'))
        ++j->at;
}

static int json_take(json *j, char c) {
    json_space(j);
    if (j->at == j->end || *j->at != c)
        return 0;
    ++j->at;
    return 1;
}

/* The four digits of \uXXXX, or -1. */
static int32_t json_hex(json *j) {
    int32_t code = 0;
    for (int i = 0; i < 4; ++i) {
        const char c = j->at < j->end ? *j->at++ : '"';
        const int32_t digit = c >= '0' && c <= '9'   ? c - '0'
                              : c >= 'a' && c <= 'f' ? c - 'a' + 10
                              : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                     : -1;
        if (digit < 0)
            return -1;
        code = 16 * code + digit;
    }
    return code;
}

/* Writes what \uXXXX stands for (two of them, for a pair of surrogates) as UTF-8, which is shorter; at is
 * behind the u. Returns how many bytes, 0 for half a pair and for U+0000, which would end names in C. */
static size_t json_unicode(json *j, char *out) {
    int32_t code = json_hex(j);
    if (code >= 0xd800 && code < 0xdc00) {
        if (j->end - j->at < 6 || j->at[0] != '\\' || j->at[1] != 'u')
            return 0;
        j->at += 2;
        const int32_t low = json_hex(j);
        if (low < 0xdc00 || low > 0xdfff)
            return 0;
        code = 0x10000 + (code - 0xd800) * 0x400 + (low - 0xdc00);
    } else if (code <= 0 || (code >= 0xdc00 && code < 0xe000)) {
        return 0;
    }
    const int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const int first[] = {0, 0xc0, 0xe0, 0xf0};
    out[0] = (char)(first[more] | code >> 6 * more);
    for (int i = 1; i <= more; ++i)
        out[i] = (char)(0x80 | (code >> 6 * (more - i) & 0x3f));
    return (size_t)more + 1;
}

/* A string's characters; at is behind its opening quote. */
static int json_string(json *j, char **text, size_t *length) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    char *out = j->at;
    *text = out;
    while (j->at < j->end && *j->at != '"') {
        const char c = *j->at++;
        if ((unsigned char)c < ' ')
            return 0;
        if (c != '\\') {
            *out++ = c;
            continue;
        }
        const char escape = j->at < j->end ? *j->at++ : 0;
        const char *which = memchr(from, escape, sizeof from - 1);
        const size_t written = escape == 'u' ? json_unicode(j, out) : which != NULL;
        if (written == 0)
            return 0;
        if (which)
            *out = to[which - from];
        out += written;
    }
    if (j->at == j->end)
        return 0;
    ++j->at;
    *length = (size_t)(out - *text);
    return 1;
}

/* A character of a number, true, false or null. */
static int json_word(char c) {
    return c == '+' || c == '-' || c == '.' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c == 'E';
}

static int json_by_key(const void *a, const void *b) {
    const json_node *x = *(const json_node *const *)a, *y = *(const json_node *const *)b;
    if (x->key_length != y->key_length)
        return x->key_length < y->key_length ? -1 : 1;
    return memcmp(x->key, y->key, x->key_length);
}

/* Whether no two members of an object have one name: readers would differ in which of them counts. */
static int json_distinct(const json *j, int32_t object) {
    size_t count = 0, n = 0;
    for (int32_t i = j->nodes[object].child; i >= 0; i = j->nodes[i].next)
        ++count;
    const json_node **members = malloc((count + 1) * sizeof *members);
    if (!members)
        return 0;
    for (int32_t i = j->nodes[object].child; i >= 0; i = j->nodes[i].next)
        members[n++] = &j->nodes[i];
    qsort(members, count, sizeof *members, json_by_key);
    int distinct = 1;
    for (size_t i = 1; i < count; ++i)
        distinct = distinct && json_by_key(&members[i - 1], &members[i]) != 0;
    free(members);
    return distinct;
}

static int32_t json_value(json *j, int depth) {
    json_space(j);
    if (depth > JSON_DEPTH || j->at == j->end)
        return -1;
    const char c = *j->at;
    if (c != '{' && c != '[' && c != '"') {
        const int32_t node = json_add(j, 'v');
        if (node < 0)
            return -1;
        while (j->at < j->end && json_word(*j->at))
            ++j->at;
        j->nodes[node].length = (size_t)(j->at - j->nodes[node].text);
        return j->nodes[node].length ? node : -1;
    }
    const int32_t node = json_add(j, c);
    if (node < 0)
        return -1;
    ++j->at;
    if (c == '"')
        return json_string(j, &j->nodes[node].text, &j->nodes[node].length) ? node : -1;
    const char close = c == '{' ? '}' : ']';
    int32_t last = -1;
    if (json_take(j, close))
        return node;
    do {
        char *key = NULL;
        size_t key_length = 0;
        if (c == '{' && !(json_take(j, '"') && json_string(j, &key, &key_length) && json_take(j, ':')))
            return -1;
        const int32_t child = json_value(j, depth + 1);
        if (child < 0)
            return -1;
        j->nodes[child].key = key;
        j->nodes[child].key_length = key_length;
        *(last < 0 ? &j->nodes[node].child : &j->nodes[last].next) = child;
        last = child;
    } while (json_take(j, ','));
    return json_take(j, close) && (c == '[' || json_distinct(j, node)) ? node : -1;
}

/* The root is node 0. Returns 0 for what is not one JSON value of at most JSON_DEPTH levels, and for an
 * object that has a name twice. json_free it either way. */
static int json_parse(json *j, char *text, size_t length) {
    json fresh = {NULL, 0, 0, text, text + length};
    *j = fresh;
    if (json_value(j, 0) != 0)
        return 0;
    json_space(j);
    return j->at == j->end;
}

static void json_free(json *j) {
    free(j->nodes);
    j->nodes = NULL;
}

/* The member of an object, or -1; of node -1 too. */
static int32_t json_find(const json *j, int32_t object, const char *key, size_t length) {
    if (object < 0 || j->nodes[object].type != '{')
        return -1;
    for (int32_t i = j->nodes[object].child; i >= 0; i = j->nodes[i].next)
        if (j->nodes[i].key_length == length && memcmp(j->nodes[i].key, key, length) == 0)
            return i;
    return -1;
}

static int32_t json_get(const json *j, int32_t object, const char *key) {
    return json_find(j, object, key, strlen(key));
}

/* Whether node i is this string or word. */
static int json_is(const json *j, int32_t i, const char *text) {
    return i >= 0 && j->nodes[i].length == strlen(text) &&
           memcmp(j->nodes[i].text, text, j->nodes[i].length) == 0 &&
           (j->nodes[i].type == '"' || j->nodes[i].type == 'v');
}

/* An integer in [0, 2^53]; -1 for anything else. */
static int64_t json_integer(const json *j, int32_t i) {
    if (i < 0 || j->nodes[i].type != 'v' || j->nodes[i].length > 16)
        return -1;
    int64_t n = 0;
    for (size_t c = 0; c < j->nodes[i].length; ++c) {
        if (j->nodes[i].text[c] < '0' || j->nodes[i].text[c] > '9')
            return -1;
        n = 10 * n + (j->nodes[i].text[c] - '0');
    }
    return n <= (int64_t)1 << 53 ? n : -1;
}

#endif
