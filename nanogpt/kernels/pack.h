// From float32 weights to their packed form. Used once a checkpoint; the result is kept in a file (native_cache.py).
#pragma once

#include "layout.h"

namespace nanogpt {

// `weight` is [n, k] in C order; `bias` has n values or is null. `to` is the start of the packed buffer.
void pack_matrix(const Entry& entry, const float* weight, const float* bias, uint8_t* to, int threads);
void pack_vector(const Entry& entry, const float* values, uint8_t* to);

}  // namespace nanogpt
