// Enters calls into the engine as XLA does, and collects how they ended.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/cpu/engine.h"
#include "tests/native/problem.h"

namespace flashmoe::testing {

// What Engine takes for a large call.
inline constexpr int64_t kAllLarge = 0, kNoneLarge = std::numeric_limits<int64_t>::max();

// How the parts of some calls ended.
class Endings {
 public:
  explicit Endings(int parts);

  // What the engine is to call when a part ends. `then` is called next, on the same thread.
  cpu::Done done(int part, std::function<void()> then = nullptr) const;
  // Waits until every part has ended, and gives their errors.
  std::vector<std::optional<std::string>> await() const;
  // Waits until every part has ended, and checks that none failed.
  void await_success() const;

 private:
  struct State;
  std::shared_ptr<State> state_;  // also held by those who have yet to end
};

// Where a call is made from.
struct Place {
  int64_t run = 0;
  int32_t first_device = 0;  // of rank 0; the others follow
  int32_t group = 0;
};

cpu::Entry entry(const Problem& problem, bool backward, int32_t rank, const Place& place,
                 cpu::Done done);

// A call of all PEs, entered by this thread in the order of the ranks, until it has ended well.
void run_call(cpu::Engine& engine, cpu::CallSite& site, const Problem& problem, bool backward,
              const Place& place);

}  // namespace flashmoe::testing
