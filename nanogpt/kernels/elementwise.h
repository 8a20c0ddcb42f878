// exp, GELU: own polynomials, so that every machine gives the same bits. Errors are about one unit in the last place.
#pragma once

#include "simd.h"

namespace nanogpt {
namespace {

// e^x for x in [-87.3, 88]; beyond, the value at the border. `kSmall`: no x is above 0.
template <bool kSmall = false>
NG_INLINE F32 exp(F32 x) {
  x = max(splat(-87.3f), x);
  if (!kSmall) x = select(greater(x, splat(88.0f)), splat(88.0f), x);
  const I32 n = round_to_int(x * splat(1.44269504088896341f));
  const F32 nf = to_float(n);
  F32 r = fma(nf, splat(-0.693359375f), x);  // ln 2 in two parts, the first exact in few bits
  r = fma(nf, splat(2.12194440e-4f), r);
  F32 p = splat(1.9875691500e-4f);  // Cephes, expf
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return p * from_bits(shift_left(n + splat(int32_t(127)), 23));
}

// GPT-2's: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x / (1 + e^(-2 u)).
NG_INLINE F32 gelu_tanh(const F32& x) {
  const F32 cube = x * x * x;
  const F32 u = splat(-1.59576912160573f) * fma(cube, splat(0.044715f), x);
  return x / (splat(1.0f) + exp(u));
}

// The exact one: x times the normal distribution's integral. erfc(z) = e^(-z^2) q(t) with t = 1 / (1 + z / 2) for
// z >= 0; q was fitted to 9e-8 relative on z in [0, 18] (least squares, reweighted to the largest error).
NG_INLINE F32 gelu_erf(const F32& x) {
  const F32 z = abs(x) * splat(0.70710678118654752f);
  const F32 t = splat(1.0f) / fma(z, splat(0.5f), splat(1.0f));
  F32 q = splat(-0.05792308765f);
  q = fma(q, t, splat(0.2798228307f));
  q = fma(q, t, splat(-0.4790527291f));
  q = fma(q, t, splat(0.2706147281f));
  q = fma(q, t, splat(-0.02271700323f));
  q = fma(q, t, splat(0.2015180245f));
  q = fma(q, t, splat(0.2432871f));
  q = fma(q, t, splat(0.2823637818f));
  q = fma(q, t, splat(0.282086409f));
  const F32 half_erfc = splat(0.5f) * (exp(splat(0.0f) - z * z) * (q * t));
  return x * select(greater(x, splat(0.0f)), splat(1.0f) - half_erfc, half_erfc);
}

}  // namespace
}  // namespace nanogpt
