// A small pool of threads for hosts that bring none. One job at a time: a second caller is told to run alone.
#pragma once

#include "core/parallel.h"

namespace tautorch {

// The pool of `n` threads, the caller among them, becomes the one that plans run in; 1 ends it. Throws
// std::system_error where the system has no more threads.
void start_pool(int n);

} // namespace tautorch
