#include "kernels/cuda/ffi_handlers.h"

#include <cuda_runtime_api.h>

#include <bit>
#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include "kernels/cuda/runtime.h"

namespace flashmoe::cuda {

// The attributes of a call; flashmoe_jax/fused_cuda.py gives them. Those of the gate count only
// where the kernel routes.
struct CallAttributes {
  int64_t reservation;  // see Runtime
  int64_t activation;   // a core::Activation
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
    flashmoe::cuda::CallAttributes, StructMember<int64_t>("reservation"),
    StructMember<int64_t>("activation"), StructMember<double>("deadline_seconds"),
    StructMember<bool>("check_weights"), StructMember<bool>("routes"),
    StructMember<bool>("softmax"), StructMember<bool>("renormalize"),
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

std::optional<core::DType> dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return core::DType::kFloat32;
    case ffi::BF16:
      return core::DType::kBFloat16;
    case ffi::F16:
      return core::DType::kFloat16;
    default:
      return std::nullopt;
  }
}

// Whether memory was reserved for a call of these operands. Other ones can only come from a program
// that was traced in another process.
bool fits(const Configuration& configuration, const ffi::RemainingArgs& operands) {
  const core::Shape& shape = configuration.shape;
  const ffi::AnyBuffer x = operands.get<ffi::AnyBuffer>(kX).value();
  const ffi::AnyBuffer up = operands.get<ffi::AnyBuffer>(kUp).value();
  return dtype_of(x) == configuration.variant->dtype && x.dimensions().size() == 2 &&
         x.dimensions()[0] == shape.tokens && x.dimensions()[1] == shape.hidden &&
         up.dimensions().size() == 3 && up.dimensions()[0] == shape.local_experts() &&
         up.dimensions()[1] == shape.hidden && up.dimensions()[2] == shape.intermediate;
}

// A number that calls of other sizes or attributes most likely do not have, equal on all PEs
// (FNV-1a).
uint32_t tag(const core::Shape& shape, const CallAttributes& attributes) {
  uint32_t hash = 2166136261u;
  const auto add = [&](uint64_t value) {
    for (int shift = 0; shift < 64; shift += 8) {
      hash = (hash ^ static_cast<uint8_t>(value >> shift)) * 16777619u;
    }
  };
  for (const int32_t size : {shape.num_pes, shape.tokens, shape.hidden, shape.intermediate,
                             shape.num_experts, shape.experts_per_token, shape.block_rows}) {
    add(static_cast<uint64_t>(size));
  }
  for (const int64_t value :
       {shape.capacity, shape.max_rows, attributes.activation, int64_t{attributes.routes},
        int64_t{attributes.softmax}, int64_t{attributes.renormalize}, attributes.num_groups,
        attributes.groups_per_token}) {
    add(static_cast<uint64_t>(value));
  }
  add(std::bit_cast<uint64_t>(attributes.scaling_factor));
  return hash;
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
  const Reservation& reservation = Runtime::instance().find(attributes.reservation, gpu);
  const Configuration& configuration = reservation.configuration();
  if (!fits(configuration, operands)) {
    return ffi::Error::InvalidArgument(
        "flashmoe_jax: memory was reserved for a call of other sizes; a program must be traced in "
        "the process that runs it");
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
      .tag = tag(configuration.shape, attributes),
      .deadline = attributes.deadline_seconds,
      .check_weights = attributes.check_weights,
      .gate = routes ? &gate : nullptr,
  };
  reservation.launch(call, buffers, stream);
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

ffi::Error on_initialize(int32_t gpu, ffi::RemainingArgs, ffi::RemainingRets,
                         CallAttributes attributes) {
  return reporting_errors([&] {
    Runtime::instance().find(attributes.reservation, gpu);
    return ffi::Error::Success();
  });
}

ffi::Error on_execute(cudaStream_t stream, int32_t gpu, ffi::RemainingArgs operands,
                      ffi::RemainingRets results, CallAttributes attributes) {
  return reporting_errors([&] { return execute(stream, gpu, operands, results, attributes); });
}

}  // namespace

// Makes room on a GPU that the call was not traced for, before anything of the program runs there.
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
