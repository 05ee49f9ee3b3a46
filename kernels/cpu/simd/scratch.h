// Memory of the calling thread for operands in the form in which a product reads them.
#pragma once

#include <cstdint>

namespace flashmoe::cpu::simd {

enum class Scratch { kPanels, kFactors, kResult };
inline constexpr int kScratchKinds = 3;

// Room for `bytes`, at the start of a page. It stays valid until the same thread asks for more of
// the same kind.
void* reserve_scratch(Scratch kind, int64_t bytes);

}  // namespace flashmoe::cpu::simd
