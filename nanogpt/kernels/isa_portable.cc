#include "forward.h"

namespace nanogpt {
extern const Isa kIsa_portable;
const Isa kIsa_portable = {"portable", forward, head, lane_maxima, kRowGroupBytes};
}  // namespace nanogpt
