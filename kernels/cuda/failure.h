// What the host says of a launch that failed.
#pragma once

#include <string>

#include "kernels/core/shape.h"
#include "kernels/cuda/workspace.h"

namespace flashmoe::cuda {

// In words: which PE failed, in which phase, what it awaited, expected and saw.
std::string describe(const ErrorRecord& error, const core::Shape& shape);

}  // namespace flashmoe::cuda
