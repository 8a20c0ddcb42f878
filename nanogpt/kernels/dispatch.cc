// Which instruction sets this build holds, and which of them this machine runs.
#include <stdexcept>

#include "model.h"

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nanogpt {

extern const Isa kIsa_portable;
#if defined(__x86_64__)
extern const Isa kIsa_avx2, kIsa_avx512vnni;
#if defined(NANOGPT_HAVE_AMX)
extern const Isa kIsa_amx;
#endif
#elif defined(__aarch64__)
extern const Isa kIsa_neon;
#endif

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
#if defined(NANOGPT_HAVE_AMX)
bool has_amx() {
#if defined(NANOGPT_EMULATED_AMX)
  return true;
#else
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = d >> 24 & 1, int8 = d >> 25 & 1;
  // Linux gives a process the tiles' state only when it asks (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
  return tile && int8 && has_avx512vnni() && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#endif
}
#endif
#elif defined(__linux__) && defined(__aarch64__)
bool has_dotprod() { return getauxval(AT_HWCAP) & HWCAP_ASIMDDP; }
#elif defined(__aarch64__)
bool has_dotprod() { return true; }  // every Apple machine of this architecture
#endif

struct Choice {
  const Isa* isa;
  bool (*usable)();
};

bool always() { return true; }

const Choice kChoices[] = {
#if defined(__x86_64__)
#if defined(NANOGPT_HAVE_AMX)
    {&kIsa_amx, has_amx},
#endif
    {&kIsa_avx512vnni, has_avx512vnni},
    {&kIsa_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kIsa_neon, has_dotprod},
#endif
    {&kIsa_portable, always},
};

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Choice& choice : kChoices)
    if (choice.usable()) names.push_back(choice.isa->name);
  return names;
}

const Isa* find_isa(const std::string& name) {
  for (const Choice& choice : kChoices)
    if ((name.empty() || name == choice.isa->name) && choice.usable()) return choice.isa;
  throw std::invalid_argument("the instruction set " + name + " is not in this build or not in this machine");
}

}  // namespace nanogpt
