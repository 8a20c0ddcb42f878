#include "forward.h"

namespace nanogpt {
extern const Isa kIsa_neon;
const Isa kIsa_neon = {"neon", forward, head, lane_maxima, kRowGroupBytes};
}  // namespace nanogpt
