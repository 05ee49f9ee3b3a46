// Which instruction sets this CPU has, and which of them to use.
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "kernels/cpu/simd/levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace flashmoe::cpu::simd {
namespace {

constexpr const char* kVariable = "FLASHMOE_CPU_ISA";

KernelSet named(const char* name, KernelSet set) {
  set.name = name;
  return set;
}

#if defined(__x86_64__)

// Bits of CPUID and XGETBV, by the names of Intel's Software Developer's Manual.
class Cpu {
 public:
  Cpu() {
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0 || !has(ecx, 27)) return;  // OSXSAVE
    unsigned high;
    asm volatile("xgetbv" : "=a"(state_), "=d"(high) : "c"(0));
    leaf1_ecx_ = ecx;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return;
    leaf7_ebx_ = ebx;
    leaf7_edx_ = edx;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) leaf7_1_eax_ = eax;
  }

  bool avx2() const {
    return saves({1, 2}) && has(leaf1_ecx_, 12) && has(leaf1_ecx_, 29) &&  // FMA, F16C
           has(leaf7_ebx_, 5);
  }
  bool avx512() const {  // F, DQ, BW, VL
    return avx2() && saves({5, 6, 7}) && has(leaf7_ebx_, 16) && has(leaf7_ebx_, 17) &&
           has(leaf7_ebx_, 30) && has(leaf7_ebx_, 31);
  }
  bool avx512_bf16() const { return avx512() && has(leaf7_1_eax_, 5); }
  bool amx_bf16() const {  // AMX-TILE, AMX-BF16
    return avx512_bf16() && saves({17, 18}) && has(leaf7_edx_, 24) && has(leaf7_edx_, 22);
  }

  static bool is_intel() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) != 0 && ebx == signature_INTEL_ebx;
  }

 private:
  static bool has(unsigned word, int bit) { return (word >> bit & 1u) != 0; }
  // Whether the operating system saves these parts of a thread's state.
  bool saves(std::initializer_list<int> components) const {
    for (int bit : components) {
      if (!has(state_, bit)) return false;
    }
    return true;
  }

  unsigned state_ = 0;
  unsigned leaf1_ecx_ = 0;
  unsigned leaf7_ebx_ = 0;
  unsigned leaf7_edx_ = 0;
  unsigned leaf7_1_eax_ = 0;
};

// Linux lets a process use the tile registers only after it has asked, and may refuse (a
// container's policy, a signal stack that is too small for them).
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif  // __x86_64__

std::vector<KernelSet> detect() {
  std::vector<KernelSet> sets{named("portable", portable::kKernels)};
#if defined(__x86_64__)
  const Cpu cpu;
  if (cpu.avx2()) sets.push_back(named("avx2", avx2::kKernels));
  if (cpu.avx512()) sets.push_back(named("avx512", avx512::kKernels));
  if (cpu.avx512_bf16()) {
    sets.push_back(named("avx512_bf16", avx512::kKernels));
    sets.back().bfloat16.multiply = avx512_bf16::multiply;
  }
  if (cpu.amx_bf16() && may_use_tiles()) {
    sets.push_back(named("amx", avx512::kKernels));
    sets.back().bfloat16.multiply = amx::multiply;
  }
#endif
  return sets;
}

const KernelSet& preferred() {
  const std::vector<KernelSet>& sets = supported_kernels();
  const KernelSet* best = &sets.back();
#if defined(__x86_64__)
  // Intel's cores take more than twice as long for this dot product as for a multiply-add (measured
  // for products: 114 against 212 GFLOP/s), so that it only costs there.
  if (best->name == std::string_view("avx512_bf16") && Cpu::is_intel()) --best;
#endif
  return *best;
}

}  // namespace

const std::vector<KernelSet>& supported_kernels() {
  static const std::vector<KernelSet> sets = detect();
  return sets;
}

const KernelSet& find_kernels(std::string_view name) {
  if (name.empty()) return preferred();
  std::string supported;
  for (const KernelSet& set : supported_kernels()) {
    if (set.name == name) return set;
    supported += supported.empty() ? set.name : std::string(", ") + set.name;
  }
  throw std::invalid_argument(std::string(kVariable) + " is '" + std::string(name) +
                              "', but this CPU supports: " + supported +
                              ". Choose one of these, or unset it for the best.");
}

const KernelSet& kernel_set() {
  static const KernelSet& chosen = []() -> const KernelSet& {
    const char* value = std::getenv(kVariable);
    return find_kernels(value == nullptr ? "" : value);
  }();
  return chosen;
}

}  // namespace flashmoe::cpu::simd
