#include "tests/native/runner.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "tests/native/harness.h"

namespace flashmoe::testing {

struct Endings::State {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<int> times_ended;
  std::vector<std::optional<std::string>> errors;
  int left;
};

Endings::Endings(int parts) : state_(std::make_shared<State>()) {
  state_->times_ended.resize(static_cast<size_t>(parts));
  state_->errors.resize(static_cast<size_t>(parts));
  state_->left = parts;
}

cpu::Done Endings::done(int part, std::function<void()> then) const {
  return [state = state_, part, then = std::move(then)](std::optional<std::string> error) {
    {
      const std::lock_guard lock(state->mutex);
      const size_t i = static_cast<size_t>(part);
      if (++state->times_ended[i] > 1) error = "the part ended more than once";
      if (error) state->errors[i] = std::move(error);
      --state->left;
    }
    state->changed.notify_all();
    if (then) then();
  };
}

std::vector<std::optional<std::string>> Endings::await() const {
  std::unique_lock lock(state_->mutex);
  check(state_->changed.wait_for(lock, std::chrono::minutes(4), [&] { return state_->left <= 0; }),
        std::to_string(state_->left) + " parts of calls never ended");
  return state_->errors;
}

void Endings::await_success() const {
  for (const std::optional<std::string>& error : await()) {
    check(!error, "a call failed: " + error.value_or(""));
  }
}

cpu::Entry entry(const Problem& problem, bool backward, int32_t rank, const Place& place,
                 cpu::Done done) {
  cpu::Entry entry{
      .run = place.run,
      .device = place.first_device + rank,
      .group = place.group,
      .rank = rank,
      .config = problem.config(backward),
      .buffers = {},
      .done = std::move(done),
  };
  if (backward) {
    entry.buffers = problem.backward_buffers(rank);
  } else {
    entry.buffers = problem.forward_buffers(rank);
  }
  return entry;
}

void run_call(cpu::Engine& engine, cpu::CallSite& site, const Problem& problem, bool backward,
              const Place& place) {
  const int32_t pes = problem.layer.shape.num_pes;
  const Endings endings(pes);
  for (int32_t rank = 0; rank < pes; ++rank) {
    engine.enter(site, entry(problem, backward, rank, place, endings.done(rank)));
  }
  endings.await_success();
}

}  // namespace flashmoe::testing
