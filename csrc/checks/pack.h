// What must hold of weights before a kernel sees them. Python's bindings and the C interface check through
// these, so that they accept and refuse the same. Everything throws std::invalid_argument.
#pragma once

#include "kernels/common/pack.h"

#include <stdexcept>
#include <string>

namespace tautorch {

[[noreturn]] inline void refuse(const std::string &what) { throw std::invalid_argument(what); }
// "op: name must ..., got ..."
[[noreturn]] inline void refuse(const char *op, const char *name, const std::string &must,
                                const std::string &got) {
    refuse(std::string(op) + ": " + name + " must " + must + ", got " + got);
}

// A kernel that this build has and this CPU runs.
const Isa &checked_isa(const char *op, const std::string &kernel);

// The header of packed weights: right magic, version, whole, runnable on this CPU, and all offsets within the
// bytes.
const PackHeader &checked_header(const char *op, const uint8_t *packed, int64_t bytes);
// The same for weights that are to be run: the lists of sparse ones are read through once. Whatever bytes
// pass, running them reads nothing out of bounds.
const PackHeader &checked_pack(const char *op, const uint8_t *packed, int64_t bytes);

// Headers of packs that are to be made.
PackHeader checked_dense(const Isa &isa, int64_t kind, int64_t groups, int64_t n, int64_t k, int64_t taps);
PackHeader checked_sparse(const Isa &isa, int64_t kind, int64_t gs, int64_t groups, int64_t n, int64_t k,
                          int64_t taps, const SparseEntries &e, int64_t form);
// What the values of a dense pack must be; reads the whole weight.
void check_dense_values(const PackHeader &h, const void *w, WeightStrides s);

// Packed weights of a linear operator with k inputs.
const PackHeader &checked_linear(const char *op, const uint8_t *packed, int64_t bytes, int64_t k,
                                 bool sparse);

} // namespace tautorch
