// Which kernel computes a call, and which calls are refused.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/configuration.h"
#include "tests/emulator/cases.h"
#include "tests/native/harness.h"

namespace flashmoe::testing {
namespace {

using core::DType;
using cuda::CallSizes;
using cuda::KernelVariant;

KernelVariant kernel(DType dtype, int32_t block_rows, bool exact = true, bool network = false) {
  return {.dtype = dtype,
          .exact = exact,
          .block_rows = block_rows,
          .columns = 128,
          .threads = 512,
          .shared_bytes = 0,
          .tensor_maps = false,
          .network = network,
          .kernel = nullptr};
}

const std::vector<KernelVariant> kKernels{
    kernel(DType::kBFloat16, 128),
    kernel(DType::kBFloat16, 64),
    kernel(DType::kFloat32, 128),
    kernel(DType::kFloat32, 64),
    kernel(DType::kFloat32, 128, false),
    kernel(DType::kFloat32, 64, false),
    kernel(DType::kBFloat16, 64, true, true),
};

CallSizes sizes(DType dtype, int32_t tokens) {
  return {.num_pes = 2,
          .tokens = tokens,
          .hidden = 64,
          .intermediate = 72,
          .num_experts = 8,
          .experts_per_token = 2,
          .capacity = core::kNoCapacity,
          .max_rows = int64_t{4} * tokens,
          .dtype = dtype,
          .exact = true};
}

void check_found(const CallSizes& of, size_t expected) {
  check(cuda::find_variant(kKernels, of) == &kKernels[expected],
        "another kernel than number " + std::to_string(expected));
}

void kernel_of_a_call(uint64_t) {
  // 128 tokens of 2 PEs in 2 slots each are 64 rows for each of 8 experts.
  check_found(sizes(DType::kBFloat16, 0), 1);
  check_found(sizes(DType::kBFloat16, 128), 1);
  check_found(sizes(DType::kBFloat16, 129), 0);
  CallSizes call = sizes(DType::kFloat32, 128);
  check_found(call, 3);
  call.exact = false;
  check_found(call, 5);
  call.tokens = 1000;
  check_found(call, 4);
  // 16-bit products have one kind of error.
  call.dtype = DType::kBFloat16;
  check_found(call, 0);
  // The only one of the transport.
  call.network = true;
  check_found(call, 6);
  call.dtype = DType::kFloat32;
  check(cuda::find_variant(kKernels, call) == nullptr, "a kernel without the network transport");
  check(cuda::find_variant(kKernels, sizes(DType::kFloat16, 8)) == nullptr, "another type");
}

void refused(const CallSizes& call, const std::string& message) {
  std::string said;
  try {
    cuda::configure(call, kKernels[0], 4);
  } catch (const std::invalid_argument& error) {
    said = error.what();
  }
  check_contains(said, {message});
}

void calls_that_are_refused(uint64_t) {
  const CallSizes right = sizes(DType::kBFloat16, 8);
  check(cuda::configure(right, kKernels[0], 4).ctas == 4, "a right call");
  CallSizes call = right;
  call.num_experts = 9;
  refused(call, "the experts must divide among the PEs");
  call.num_experts = 514;
  refused(call, "at most 512 experts");
  call = right;
  call.experts_per_token = 17;
  refused(call, "at most 16 experts per token");
  call = right;
  call.hidden = 68;
  refused(call, "a row of 68 elements must be a multiple of 16 bytes");
  call = right;
  call.intermediate = 4;
  refused(call, "a row of 4 elements");
  call.dtype = DType::kFloat32;
  cuda::configure(call, kKernels[2], 4);
  call.tokens = -1;
  refused(call, "at least 1");
}

}  // namespace

std::vector<Case> configuration_cases() {
  return {{"configuration: kernel of a call", kernel_of_a_call},
          {"configuration: calls that are refused", calls_that_are_refused}};
}

}  // namespace flashmoe::testing
