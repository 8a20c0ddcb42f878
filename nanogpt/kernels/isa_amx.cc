#define NANOGPT_AMX
#include "forward.h"

namespace nanogpt {
extern const Isa kIsa_amx;
const Isa kIsa_amx = {"amx", forward, head, lane_maxima, kRowGroupBytes};
}  // namespace nanogpt
