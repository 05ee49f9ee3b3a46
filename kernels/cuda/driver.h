// Functions of the CUDA driver, found at run time: libcuda must not be needed to import the module.
#pragma once

#include <cuda.h>

namespace flashmoe::cuda {

// The function of that name as CUDA `version` (12000 is 12.0) has it. Throws std::runtime_error.
void* driver_function(const char* name, unsigned version);

}  // namespace flashmoe::cuda
