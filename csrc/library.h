// What every operator of the compiled library shares.
#pragma once

namespace vfmk {

// Instruction sets for which the sources under cpu/ are compiled, from the least to the most.
enum class CpuIsa { baseline, avx2, avx512 };

// The best one this machine has, or the one that the environment variable VFMK_CPU_ISA names.
// Throws if the machine lacks the one named, or if there is no such name.
CpuIsa cpu_isa();

}  // namespace vfmk
