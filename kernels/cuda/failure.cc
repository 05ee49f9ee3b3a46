#include "kernels/cuda/failure.h"

#include <bit>
#include <cstdint>

#include "kernels/core/epoch.h"
#include "kernels/cuda/network_layout.h"

namespace flashmoe::cuda {
namespace {

std::string text(int64_t value) { return std::to_string(value); }
std::string text(uint64_t value) { return std::to_string(value); }

std::string counted(uint64_t word) {
  return "epoch " + std::to_string(core::epoch_of(word)) + " of call site " +
         std::to_string(core::tag_of(word));
}

std::string place(const ErrorRecord& error, uint64_t slot, const core::Shape& shape) {
  const auto experts = static_cast<uint64_t>(shape.experts_per_token);
  return "PE " + std::to_string(error.pe) + ", token " + text(slot / experts) + ", slot " +
         text(slot % experts);
}

std::string missing(const ErrorRecord& error, const std::string& what, const std::string& unit) {
  return "PE " + std::to_string(error.pe) + ": " + what + ": expected " + text(error.expected) +
         unit + ", seen " + text(error.seen) +
         ", when the deadline passed (FLASHMOE_DEADLINE_SECONDS or MoEConfig.deadline_seconds)";
}

}  // namespace

std::string describe(const ErrorRecord& error, const core::Shape& shape) {
  const std::string pe = "PE " + std::to_string(error.pe) + ": ";
  switch (static_cast<Failure>(error.failure)) {
    case Failure::kNone:
      return "nothing failed";
    case Failure::kBadIndex:
      return "expert index " + text(std::bit_cast<int64_t>(error.seen)) + " (" +
             place(error, error.expected, shape) + ") is out of range: allowed are 0 to " +
             std::to_string(shape.num_experts - 1) + ", and -1 for a masked slot";
    case Failure::kBadWeight:
      return "an expert weight (" + place(error, error.expected, shape) +
             ") is not finite: mask the slot with index -1 instead";
    case Failure::kBarrier:
      return missing(error, "thread blocks missing at a barrier of this PE in phase plan",
                     " arrivals");
    case Failure::kCounts:
      return pe + "no counts from PE " + text(error.awaited) + " in phase plan: expected " +
             counted(error.expected) + ", seen " + counted(error.seen) +
             ", when the deadline passed (FLASHMOE_DEADLINE_SECONDS or "
             "MoEConfig.deadline_seconds)";
    case Failure::kOtherCall:
      return pe + "another call is executed by PE " + text(error.awaited) +
             " in phase plan: expected " + counted(error.expected) + ", seen " +
             counted(error.seen) + "; all PEs must execute the same calls in the same order";
    case Failure::kRows:
      return missing(error, "rows missing in phase expert for row block " + text(error.awaited),
                     " rows");
    case Failure::kFirstStage:
      return missing(error,
                     "first-stage tiles missing in phase expert for row block " +
                         text(error.awaited) + ", awaited from this PE itself",
                     "");
    case Failure::kSecondStage:
      return missing(error,
                     "second-stage tiles missing in phase expert for the rows from " +
                         text(error.awaited * kRowsOfPart) + " on, awaited from this PE itself",
                     "");
    case Failure::kResults:
      return missing(error, "results missing in phase combine for token " + text(error.awaited),
                     " pieces");
  }
  return pe + "unknown failure " + std::to_string(error.failure);
}

}  // namespace flashmoe::cuda
