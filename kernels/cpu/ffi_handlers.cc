#include "kernels/cpu/ffi_handlers.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels/cpu/engine.h"
#include "kernels/cpu/simd/kernels.h"
#include "kernels/cpu/tile_sizes.h"

namespace flashmoe::cpu {

// The attributes of both calls; flashmoe_jax/fused.py gives them.
struct CallAttributes {
  int64_t num_pes;
  int64_t num_experts;
  int64_t activation;  // an Activation
  int64_t capacity;    // or core::kNoCapacity
  int64_t max_rows;
  double deadline_seconds;
  bool check_weights;
};

}  // namespace flashmoe::cpu

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    flashmoe::cpu::CallAttributes, StructMember<int64_t>("num_pes"),
    StructMember<int64_t>("num_experts"), StructMember<int64_t>("activation"),
    StructMember<int64_t>("capacity"), StructMember<int64_t>("max_rows"),
    StructMember<double>("deadline_seconds"), StructMember<bool>("check_weights"));

namespace flashmoe::cpu {
namespace {

namespace ffi = xla::ffi;

struct CallSiteState {
  static ffi::TypeId id;
  CallSite site;
};
ffi::TypeId CallSiteState::id = {};

// Operands and results by position; flashmoe_jax/fused.py passes them in this order. One that a
// call does not have is an empty vector.
enum Operand {
  kCoordinates,  // int32 [2]: expert group, rank in it
  kX,
  kIndices,
  kWeights,
  kGate,
  kUp,
  kDown,
  kGateBias,
  kUpBias,
  kDownBias,
  kRows,  // from here on backward only
  kPreGate,
  kPreUp,
  kGradY,
};
enum ForwardResult { kY, kDropped, kKeptRows, kKeptPreGate, kKeptPreUp };
enum BackwardResult {
  kGradX,
  kGradWeights,
  kGradGate,
  kGradUp,
  kGradDown,
  kGradGateBias,
  kGradUpBias,
  kGradDownBias,
};

bool is_absent(const ffi::AnyBuffer& buffer) {
  return buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
}

const void* data(const ffi::RemainingArgs& operands, Operand i) {
  const ffi::AnyBuffer buffer = operands.get<ffi::AnyBuffer>(i).value();
  return is_absent(buffer) ? nullptr : buffer.untyped_data();
}
void* data(const ffi::RemainingRets& results, size_t i) {
  ffi::Result<ffi::AnyBuffer> buffer = results.get<ffi::AnyBuffer>(i).value();
  return is_absent(*buffer) ? nullptr : buffer->untyped_data();
}

RoutedTokens routed_tokens(const ffi::RemainingArgs& operands) {
  return {data(operands, kX), static_cast<const int32_t*>(data(operands, kIndices)),
          static_cast<const float*>(data(operands, kWeights))};
}
ExpertWeights expert_weights(const ffi::RemainingArgs& operands) {
  return {data(operands, kGate),     data(operands, kUp),     data(operands, kDown),
          data(operands, kGateBias), data(operands, kUpBias), data(operands, kDownBias)};
}

std::optional<DType> dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32:
      return DType::kFloat32;
    case ffi::BF16:
      return DType::kBFloat16;
    case ffi::F16:
      return DType::kFloat16;
    default:
      return std::nullopt;
  }
}

ffi::Future enter(CallSiteState* state, ffi::RunId run, int32_t device,
                  const ffi::RemainingArgs& operands, const CallAttributes& attributes,
                  bool backward, PeBuffers buffers) {
  ffi::Promise promise;
  ffi::Future future(promise);
  const auto operand = [&](Operand i) { return operands.get<ffi::AnyBuffer>(i).value(); };
  const ffi::AnyBuffer x = operand(kX);
  const std::optional<DType> dtype = dtype_of(x);
  if (!dtype) {
    promise.SetError(ffi::Error::InvalidArgument(
        "flashmoe_jax: x must be float32, bfloat16 or float16 in the fused implementation"));
    return future;
  }
  if (attributes.activation < 0 || attributes.activation >= kActivations) {
    promise.SetError(ffi::Error::InvalidArgument("flashmoe_jax: unknown activation " +
                                                 std::to_string(attributes.activation)));
    return future;
  }
  Entry entry{};
  entry.run = run.run_id;
  entry.device = device;
  entry.group = operand(kCoordinates).typed_data<int32_t>()[0];
  entry.rank = operand(kCoordinates).typed_data<int32_t>()[1];
  CallConfig& config = entry.config;
  config.shape = core::Shape{
      .num_pes = static_cast<int32_t>(attributes.num_pes),
      .tokens = static_cast<int32_t>(x.dimensions()[0]),
      .hidden = static_cast<int32_t>(x.dimensions()[1]),
      .intermediate = static_cast<int32_t>(operand(kUp).dimensions()[2]),
      .num_experts = static_cast<int32_t>(attributes.num_experts),
      .experts_per_token = static_cast<int32_t>(operand(kIndices).dimensions()[1]),
      .capacity = attributes.capacity,
      .max_rows = attributes.max_rows,
      .block_rows = 0,
      .block_tokens = kBlockTokens,
      .block_columns = kBlockColumns,
  };
  core::Shape& shape = config.shape;
  shape.block_rows =
      block_rows(shape.num_pes, shape.tokens, shape.num_experts, shape.experts_per_token);
  config.traffic = core::Traffic{
      .backward = backward,
      .resend_rows = backward && is_absent(operand(kRows)),
      .element_bytes = *dtype == DType::kFloat32 ? 4 : 2,
  };
  config.dtype = *dtype;
  config.activation = static_cast<Activation>(attributes.activation);
  config.tag = state->site.tag();
  // At most 30 years, far from the end of the clock's range.
  config.deadline = std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::chrono::duration<double>(std::min(attributes.deadline_seconds, 1e9)));
  config.check_weights = attributes.check_weights;
  entry.buffers = std::move(buffers);
  entry.done = [promise](std::optional<std::string> error) mutable {
    if (error) {
      promise.SetError(ffi::Error::Internal("flashmoe_jax: " + *error));
    } else {
      promise.SetAvailable();
    }
  };
  Engine::instance().enter(state->site, std::move(entry));
  return future;
}

ffi::Future enter_forward(CallSiteState* state, ffi::RunId run, int32_t device,
                          ffi::RemainingArgs operands, ffi::RemainingRets results,
                          CallAttributes attributes) {
  return enter(state, run, device, operands, attributes, /*backward=*/false,
               ForwardBuffers{
                   .tokens = routed_tokens(operands),
                   .experts = expert_weights(operands),
                   .y = data(results, kY),
                   .dropped = static_cast<int32_t*>(data(results, kDropped)),
                   .kept = {data(results, kKeptRows), data(results, kKeptPreGate),
                            data(results, kKeptPreUp)},
               });
}

ffi::Future enter_backward(CallSiteState* state, ffi::RunId run, int32_t device,
                           ffi::RemainingArgs operands, ffi::RemainingRets results,
                           CallAttributes attributes) {
  return enter(
      state, run, device, operands, attributes, /*backward=*/true,
      BackwardBuffers{
          .tokens = routed_tokens(operands),
          .experts = expert_weights(operands),
          .kept = {data(operands, kRows), data(operands, kPreGate), data(operands, kPreUp)},
          .dy = data(operands, kGradY),
          .dx = data(results, kGradX),
          .d_weights = static_cast<float*>(data(results, kGradWeights)),
          .d_experts = {data(results, kGradGate), data(results, kGradUp), data(results, kGradDown),
                        data(results, kGradGateBias), data(results, kGradUpBias),
                        data(results, kGradDownBias)},
      });
}

auto execute_binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::State<CallSiteState>>()
      .Ctx<ffi::RunId>()
      .Ctx<ffi::DeviceOrdinal>()
      .RemainingArgs()
      .RemainingRets()
      .Attrs<CallAttributes>();
}

}  // namespace

XLA_FFI_TypeId* call_site_type_id() { return &CallSiteState::id; }

XLA_FFI_TypeInfo* call_site_type_info() {
  static XLA_FFI_TypeInfo info = ffi::MakeTypeInfo<CallSiteState>();
  return &info;
}

XLA_FFI_Error* instantiate(XLA_FFI_CallFrame* frame) {
  static const auto handler =
      ffi::Ffi::BindInstantiate().To([]() -> ffi::ErrorOr<std::unique_ptr<CallSiteState>> {
        try {
          simd::kernel_set();
          Engine::instance();
        } catch (const std::invalid_argument& error) {
          return ffi::Unexpected(
              ffi::Error::InvalidArgument("flashmoe_jax: " + std::string(error.what())));
        }
        return std::make_unique<CallSiteState>();
      });
  return handler->Call(frame);
}

XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame) {
  static const auto handler = execute_binding().To(enter_forward);
  return handler->Call(frame);
}

XLA_FFI_Error* backward(XLA_FFI_CallFrame* frame) {
  static const auto handler = execute_binding().To(enter_backward);
  return handler->Call(frame);
}

}  // namespace flashmoe::cpu
