#include "kernels/cuda/kernel_arguments.h"

#include <algorithm>
#include <stdexcept>

namespace flashmoe::cuda {
namespace {

// Elements of a 128-byte line, and kChunkColumns of product.h.
constexpr int32_t kBoxColumns = 64;

static_assert(kExpertLimit == kMaxGateExperts);
static_assert(kExpertsPerTokenLimit == kMaxExpertsPerToken);

// Of the sm_90a engine: rows in 128-byte lines, weights in squares.
TensorMaps tensor_maps(const Configuration& configuration, std::byte* heap, const PePlace& place,
                       const PeBuffers& buffers, EncodeTensorMap* encode) {
  const core::Shape& shape = configuration.shape;
  const core::DType dtype = configuration.variant->dtype;
  const auto rows = [&](const std::byte* data, int32_t width) {
    // A tensor without rows cannot be described; nothing reads this one.
    const int64_t count = std::max(shape.recv_rows(), int64_t{1});
    return encode({data, dtype, width, count, 1, kBoxColumns, shape.block_rows});
  };
  const auto weights = [&](const void* data, int32_t depth, int32_t width) {
    return encode({data, dtype, width, depth, shape.local_experts(), kBoxColumns, kBoxColumns});
  };
  const int32_t hidden = shape.hidden, intermediate = shape.intermediate;
  const device::TensorMap up = weights(buffers.up, hidden, intermediate);
  return {
      .received = rows(heap + configuration.heap.recv.offset, hidden),
      .activated = rows(place.workspace + configuration.workspace.activated.offset, intermediate),
      .gate = buffers.gate == nullptr ? up : weights(buffers.gate, hidden, intermediate),
      .up = up,
      .down = weights(buffers.down, intermediate, hidden),
  };
}

GateArguments gate_arguments(const core::Shape& shape, const Gate& gate, const PeBuffers& buffers) {
  return {
      .x = buffers.x,
      .router = buffers.router,
      .selection_bias = buffers.selection_bias,
      .mask = buffers.mask,
      .logits = buffers.logits,
      .indices = buffers.indices,
      .weights = buffers.weights,
      .tokens = shape.tokens,
      .hidden = shape.hidden,
      .num_experts = shape.num_experts,
      .experts_per_token = shape.experts_per_token,
      .num_groups = gate.num_groups,
      .groups_per_token = gate.groups_per_token,
      .softmax = gate.softmax,
      .renormalize = gate.renormalize,
      .scaling_factor = gate.scaling_factor,
  };
}

// At most 30 years, far from the end of the clock's range.
uint64_t nanoseconds(double seconds) {
  return static_cast<uint64_t>(std::clamp(seconds, 0.0, 1e9) * 1e9);
}

}  // namespace

KernelArguments kernel_arguments(const Configuration& configuration, const Call& call,
                                 int32_t first_pe, std::span<std::byte* const> heaps,
                                 std::span<const PePlace> places,
                                 std::span<const PeBuffers> buffers, EncodeTensorMap* encode,
                                 std::span<const int32_t> processes) {
  const core::Shape& shape = configuration.shape;
  const KernelVariant& variant = *configuration.variant;
  const auto pes = static_cast<int32_t>(buffers.size());
  if (shape.num_pes > kMaxPes || pes > kMaxVirtualPes || places.size() != buffers.size() ||
      heaps.size() != static_cast<size_t>(shape.num_pes) || first_pe + pes > shape.num_pes) {
    throw std::invalid_argument("a launch of more PEs than the kernel takes");
  }
  KernelArguments arguments{
      .shape = shape,
      .heap = configuration.heap,
      .workspace = configuration.workspace,
      .activation = call.activation,
      .tag = call.tag,
      .deadline = nanoseconds(call.deadline),
      .first_pe = first_pe,
      .ctas = configuration.ctas,
      .check_weights = call.check_weights,
      .remote = pes < shape.num_pes,
      .routes = call.gate != nullptr,
      .heaps = {},
      .gates = {},
      .pes = {},
      .network = {.layout = configuration.network, .processes = {}},
  };
  std::copy(heaps.begin(), heaps.end(), arguments.heaps);
  if (variant.network) {
    if (processes.size() != heaps.size()) {
      throw std::invalid_argument("a network transport that does not know the PEs' processes");
    }
    std::copy(processes.begin(), processes.end(), arguments.network.processes);
  }
  for (int32_t i = 0; i < pes; ++i) {
    const PeBuffers& own = buffers[i];
    PeArguments& pe = arguments.pes[i];
    if (variant.tensor_maps) {
      pe.maps = tensor_maps(configuration, heaps[first_pe + i], places[i], own, encode);
    }
    pe.x = own.x;
    pe.indices = own.indices;
    pe.weights = own.weights;
    pe.gate = own.gate;
    pe.up = own.up;
    pe.down = own.down;
    pe.gate_bias = own.gate_bias;
    pe.up_bias = own.up_bias;
    pe.down_bias = own.down_bias;
    pe.y = own.y;
    pe.dropped = own.dropped;
    pe.workspace = places[i].workspace;
    pe.error = places[i].error;
    pe.absent = own.absent;
    if (call.gate != nullptr) arguments.gates[i] = gate_arguments(shape, *call.gate, own);
  }
  return arguments;
}

}  // namespace flashmoe::cuda
