#include "forward.h"

namespace nanogpt {
extern const Isa kIsa_avx2;
const Isa kIsa_avx2 = {"avx2", forward, head, lane_maxima, kRowGroupBytes};
}  // namespace nanogpt
