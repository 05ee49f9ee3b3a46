#include "kernels/cuda/ffi_handlers.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

#include "kernels/cuda/runtime.h"

namespace flashmoe::cuda {

// The attributes of a call; flashmoe_jax/cuda_call.py gives them. Those of the gate count only
// where the kernel routes.
struct CallAttributes {
  int64_t num_pes;
  int64_t num_experts;
  int64_t experts_per_token;
  int64_t capacity;  // or core::kNoCapacity
  int64_t max_rows;
  bool exact;                            // see CallSizes
  xla::ffi::Span<const int32_t> groups;  // see CallKind
  int64_t tag;                           // see core::counted_word
  int64_t activation;                    // a core::Activation
  double deadline_seconds;
  bool check_weights;
  bool routes;
  bool softmax;  // else sigmoid
  bool renormalize;
  double scaling_factor;
  int64_t num_groups;
  int64_t groups_per_token;
};

}  // namespace flashmoe::cuda

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flashmoe::cuda::CallAttributes, StructMember<int64_t>("num_pes"),
    StructMember<int64_t>("num_experts"), StructMember<int64_t>("experts_per_token"),
    StructMember<int64_t>("capacity"), StructMember<int64_t>("max_rows"),
    StructMember<bool>("exact"), StructMember<xla::ffi::Span<const int32_t>>("groups"),
    StructMember<int64_t>("tag"), StructMember<int64_t>("activation"),
    StructMember<double>("deadline_seconds"), StructMember<bool>("check_weights"),
    StructMember<bool>("routes"), StructMember<bool>("softmax"), StructMember<bool>("renormalize"),
    StructMember<double>("scaling_factor"), StructMember<int64_t>("num_groups"),
    StructMember<int64_t>("groups_per_token"));

namespace flashmoe::cuda {
namespace {

namespace ffi = xla::ffi;

// Operands and results by position; flashmoe_jax/fused_cuda.py passes them in this order. One that
// a call does not have is an empty vector. The caller's routing follows the experts' parameters, or
// what the gate needs to make one.
enum Operand {
  kX,
  kGate,
  kUp,
  kDown,
  kGateBias,
  kUpBias,
  kDownBias,
  kIndices,
  kWeights,
  kGivenOperands,  // how many there are with the caller's routing
  kRouter = kIndices,
  kSelectionBias,
  kMask,
  kGateOperands,  // and with the gate's
};
enum CallResult {
  kY,
  kDropped,
  kGivenResults,
  kLogits = kGivenResults,
  kMadeIndices,
  kMadeWeights,
  kGateResults,
};

bool is_absent(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
}

template <typename T = void>
T* data(const ffi::RemainingArgs& operands, size_t i) {
  const ffi::AnyBuffer buffer = operands.get<ffi::AnyBuffer>(i).value();
  return is_absent(buffer) ? nullptr : static_cast<T*>(buffer.untyped_data());
}
template <typename T = void>
T* data(const ffi::RemainingRets& results, size_t i) {
  return static_cast<T*>(results.get<ffi::AnyBuffer>(i).value()->untyped_data());
}

core::DType dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return core::DType::kFloat32;
    case ffi::BF16:
      return core::DType::kBFloat16;
    case ffi::F16:
      return core::DType::kFloat16;
    default:
      throw std::invalid_argument("x must be float32, bfloat16 or float16");
  }
}

CallKind kind_of(const ffi::RemainingArgs& operands, const CallAttributes& attributes) {
  const ffi::AnyBuffer x = operands.get<ffi::AnyBuffer>(kX).value();
  const ffi::AnyBuffer up = operands.get<ffi::AnyBuffer>(kUp).value();
  return {
      .sizes =
          {
              .num_pes = static_cast<int32_t>(attributes.num_pes),
              .tokens = static_cast<int32_t>(x.dimensions()[0]),
              .hidden = static_cast<int32_t>(x.dimensions()[1]),
              .intermediate = static_cast<int32_t>(up.dimensions()[2]),
              .num_experts = static_cast<int32_t>(attributes.num_experts),
              .experts_per_token = static_cast<int32_t>(attributes.experts_per_token),
              .capacity = attributes.capacity,
              .max_rows = attributes.max_rows,
              .dtype = dtype_of(x),
              .exact = attributes.exact,
          },
      .groups = {attributes.groups.begin(), attributes.groups.end()},
  };
}

ffi::Error execute(cudaStream_t stream, int32_t gpu, const ffi::RemainingArgs& operands,
                   const ffi::RemainingRets& results, const CallAttributes& attributes) {
  const bool routes = attributes.routes;
  if (operands.size() != static_cast<size_t>(routes ? kGateOperands : kGivenOperands) ||
      results.size() != static_cast<size_t>(routes ? kGateResults : kGivenResults)) {
    return ffi::Error::InvalidArgument("flashmoe_jax: wrong number of operands or results");
  }
  if (attributes.activation < 0 || attributes.activation >= core::kActivations) {
    return ffi::Error::InvalidArgument("flashmoe_jax: unknown activation " +
                                       std::to_string(attributes.activation));
  }
  const Gate gate{
      .softmax = attributes.softmax,
      .renormalize = attributes.renormalize,
      .scaling_factor = static_cast<float>(attributes.scaling_factor),
      .num_groups = static_cast<int32_t>(attributes.num_groups),
      .groups_per_token = static_cast<int32_t>(attributes.groups_per_token),
  };
  PeBuffers buffers{};
  buffers.x = data(operands, kX);
  buffers.gate = data(operands, kGate);
  buffers.up = data(operands, kUp);
  buffers.down = data(operands, kDown);
  buffers.gate_bias = data(operands, kGateBias);
  buffers.up_bias = data(operands, kUpBias);
  buffers.down_bias = data(operands, kDownBias);
  if (routes) {
    buffers.router = data<float>(operands, kRouter);
    buffers.selection_bias = data<float>(operands, kSelectionBias);
    buffers.mask = data<uint8_t>(operands, kMask);
    buffers.logits = data<float>(results, kLogits);
    buffers.indices = data<int32_t>(results, kMadeIndices);
    buffers.weights = data<float>(results, kMadeWeights);
  } else {
    buffers.indices = data<int32_t>(operands, kIndices);
    buffers.weights = data<float>(operands, kWeights);
  }
  buffers.y = data(results, kY);
  buffers.dropped = data<int32_t>(results, kDropped);
  const Call call{
      .activation = static_cast<core::Activation>(attributes.activation),
      .tag = static_cast<uint32_t>(attributes.tag),
      .deadline = attributes.deadline_seconds,
      .check_weights = attributes.check_weights,
      .gate = routes ? &gate : nullptr,
  };
  const CallKind kind = kind_of(operands, attributes);
  Runtime::instance().find(kind, gpu)->launch(call, buffers, stream);
  return ffi::Error::Success();
}

template <typename Body>
ffi::Error reporting_errors(const Body& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    return ffi::Error::Internal("flashmoe_jax: " + std::string(error.what()));
  }
}

ffi::Error on_initialize(int32_t gpu, ffi::RemainingArgs operands, ffi::RemainingRets,
                         CallAttributes attributes) {
  return reporting_errors([&] {
    Runtime::instance().reserve(kind_of(operands, attributes), gpu);
    return ffi::Error::Success();
  });
}

ffi::Error on_execute(cudaStream_t stream, int32_t gpu, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, CallAttributes attributes) {
  return reporting_errors([&] { return execute(stream, gpu, operands, results, attributes); });
}

}  // namespace

// Makes room on a GPU before anything of the program runs there. All processes of the program come
// here, as they do for XLA's own collectives.
XLA_FFI_Error* initialize(XLA_FFI_CallFrame* frame) {
  static const auto handler = ffi::Ffi::BindInitialize()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs<CallAttributes>()
                                  .To(on_initialize);
  return handler->Call(frame);
}

XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame) {
  static const auto handler = ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attrs<CallAttributes>()
                                  .To(on_execute);
  return handler->Call(frame);
}

}  // namespace flashmoe::cuda
