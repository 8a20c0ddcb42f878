#include "forward.h"

namespace nanogpt {
extern const Isa kIsa_avx512vnni;
const Isa kIsa_avx512vnni = {"avx512vnni", forward, head, lane_maxima, kRowGroupBytes};
}  // namespace nanogpt
