// Marks functions that a GPU kernel and the host both run.
#pragma once

#if defined(__CUDACC__)
#define FLASHMOE_HOST_DEVICE __host__ __device__
#else
#define FLASHMOE_HOST_DEVICE
#endif
