#include "library.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

namespace vfmk {
namespace {

const char* const isa_names[] = {"baseline", "avx2", "avx512"};

CpuIsa best_isa() {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? CpuIsa::avx512 : CpuIsa::avx2;
#endif
  return CpuIsa::baseline;
}

CpuIsa choose_isa() {
  const CpuIsa best = best_isa();
  const char* wanted = std::getenv("VFMK_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (CpuIsa isa : {CpuIsa::baseline, CpuIsa::avx2, CpuIsa::avx512}) {
    if (std::string(wanted) != isa_names[static_cast<int>(isa)]) continue;
    STD_TORCH_CHECK(isa <= best, "VFMK_CPU_ISA: this machine has ",
                    isa_names[static_cast<int>(best)], " at best, got ", wanted);
    return isa;
  }
  STD_TORCH_CHECK(false, "VFMK_CPU_ISA: expected avx512, avx2 or baseline, got ", wanted);
}

std::string build_info() {
  std::string info = "cpu: " + std::string(isa_names[static_cast<int>(cpu_isa())]) + "; cuda: ";
#if defined(VFMK_WITH_CUDA)
  return info + VFMK_CUDA_ARCHITECTURES;
#else
  return info + "none";
#endif
}

}  // namespace

CpuIsa cpu_isa() {
  static const CpuIsa isa = choose_isa();
  return isa;
}

}  // namespace vfmk

STABLE_TORCH_LIBRARY_FRAGMENT(vfmk_native, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(vfmk_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&vfmk::build_info));
}
