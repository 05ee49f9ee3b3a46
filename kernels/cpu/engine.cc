#include "kernels/cpu/engine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <utility>

namespace flashmoe::cpu {
namespace {

int32_t available_cores() {
  if (const char* text = std::getenv("FLASHMOE_CPU_THREADS")) {
    const int threads = std::atoi(text);
    if (threads > 0) return threads;
  }
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

std::string missing_pes(const Team& team) {
  std::string pes;
  for (size_t rank = 0; rank < team.entries.size(); ++rank) {
    if (!team.entries[rank]) pes.append(" ").append(std::to_string(rank));
  }
  return pes;
}

}  // namespace

// Heaps, once used, are kept for the next call of the same sizes; more idle ones than this are let
// go, the longest idle first.
constexpr size_t kIdleHeaps = 8;

CallSite::CallSite()
    : tag_([] {
        static std::atomic<uint32_t> next{1};
        return next.fetch_add(1);
      }()) {}

CallSite::Run& CallSite::run(int64_t id) {
  // No device is that many executions of one program behind another.
  constexpr size_t kRuns = 64;
  for (Run& run : runs_) {
    if (run.id == id) return run;
  }
  if (runs_.size() == kRuns) runs_.pop_front();
  return runs_.emplace_back(Run{id, {}, {}});
}

// A call that runs.
struct Engine::Call {
  std::vector<Entry> entries;  // [P]
  std::shared_ptr<HeapGroup> heaps;
  std::vector<std::unique_ptr<Arena>> arenas;
  std::vector<std::unique_ptr<PeCall>> pes;
  int32_t running;  // PEs that have not left; guarded by the engine's mutex
};

Engine::Engine(int32_t cores) : cores_(cores), watchdog_([this] { watch(); }) {}

Engine::~Engine() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  waiting_changed_.notify_all();
  watchdog_.join();
}

Engine& Engine::instance() {
  // Never destroyed: XLA may still hold its threads when the process ends.
  static Engine* const engine = new Engine(available_cores());
  return *engine;
}

void Engine::enter(CallSite& site, Entry entry) {
  const int32_t num_pes = entry.config.shape.num_pes;
  std::vector<Done> refused{entry.done};
  std::string refusal;
  {
    const std::lock_guard lock(mutex_);
    CallSite::Run& run = site.run(entry.run);
    const std::tuple key{entry.group, run.entries[entry.device]++};
    std::shared_ptr<Team>& team = run.teams[key];
    if (team == nullptr) {
      team = std::make_shared<Team>();
      team->entries.resize(num_pes);
      team->deadline = Clock::now() + entry.config.deadline;
      waiting_.push_back(team);
      waiting_changed_.notify_all();
    }
    const auto other = std::find_if(team->entries.begin(), team->entries.end(),
                                    [](const auto& present) { return present.has_value(); });
    if (!team->failure.empty()) {
      refusal = team->failure;
    } else if (entry.rank < 0 || entry.rank >= num_pes) {
      refusal = "rank " + std::to_string(entry.rank) + " is out of range: the group has " +
                std::to_string(num_pes) + " PEs";
    } else if (team->entries[entry.rank]) {
      refusal = "two devices entered the same call as PE " + std::to_string(entry.rank);
    } else if (other != team->entries.end() && !((*other)->config == entry.config)) {
      refusal = "PE " + std::to_string(entry.rank) + " entered the call with other sizes than PE " +
                std::to_string((*other)->rank);
    } else {
      const int32_t rank = entry.rank;
      team->entries[rank] = std::move(entry);
      if (++team->present == num_pes) {
        const std::shared_ptr<Team> complete = std::move(team);
        run.teams.erase(key);
        waiting_.remove(complete);
        refused.clear();
        for (const auto& present : complete->entries) refused.push_back(present->done);
        try {
          start(*complete);
          return;
        } catch (const std::exception& error) {
          refusal = std::string("the call could not be started: ") + error.what();
        }
      } else {
        return;
      }
    }
  }
  for (const Done& done : refused) done(refusal);
}

void Engine::start(Team& team) {
  auto call = std::make_shared<Call>();
  for (std::optional<Entry>& entry : team.entries) call->entries.push_back(std::move(*entry));
  const CallConfig& config = call->entries[0].config;
  const int32_t num_pes = config.shape.num_pes;
  const int32_t workers = std::max(1, cores_ / num_pes);
  call->running = num_pes;
  call->heaps = take_heaps(config);
  for (int32_t rank = 0; rank < num_pes; ++rank) {
    call->arenas.push_back(take_arena());
    call->pes.push_back(std::visit(
        [&](const auto& buffers) {
          if constexpr (std::is_same_v<decltype(buffers), const ForwardBuffers&>) {
            return make_forward(config, *call->heaps, rank, workers, buffers);
          } else {
            return make_backward(config, *call->heaps, rank, workers, buffers);
          }
        },
        call->entries[rank].buffers));
  }
  for (int32_t rank = 0; rank < num_pes; ++rank) {
    for (int32_t index = 0; index < workers; ++index) {
      worker(call->entries[rank].device, index)
          .give([this, call, rank, index]() -> std::function<void()> {
            if (!call->pes[rank]->run(index, *call->arenas[rank])) return nullptr;
            std::optional<std::string> error;
            if (call->heaps->failed()) error = call->heaps->failure();
            leave(*call, rank);
            return [done = std::move(call->entries[rank].done), error] { done(error); };
          });
    }
  }
}

Worker& Engine::worker(int32_t device, int32_t index) {
  std::unique_ptr<Worker>& worker = workers_[{device, index}];
  if (worker == nullptr) worker = std::make_unique<Worker>();
  return *worker;
}

std::shared_ptr<HeapGroup> Engine::take_heaps(const CallConfig& config) {
  std::shared_ptr<HeapGroup> heaps;
  const auto fitting = std::find_if(idle_heaps_.rbegin(), idle_heaps_.rend(), [&](const auto& h) {
    return h->fits(config.shape, config.traffic);
  });
  if (fitting != idle_heaps_.rend()) {
    heaps = std::move(*fitting);
    idle_heaps_.erase(std::next(fitting).base());
  } else {
    heaps = std::make_shared<HeapGroup>(config.shape, config.traffic);
  }
  heaps->next_epoch();
  return heaps;
}

std::unique_ptr<Arena> Engine::take_arena() {
  if (idle_arenas_.empty()) return std::make_unique<Arena>();
  std::unique_ptr<Arena> arena = std::move(idle_arenas_.back());
  idle_arenas_.pop_back();
  return arena;
}

void Engine::leave(Call& call, int32_t rank) {
  const std::lock_guard lock(mutex_);
  idle_arenas_.push_back(std::move(call.arenas[rank]));
  if (--call.running > 0 || call.heaps->failed()) return;
  idle_heaps_.push_back(std::move(call.heaps));
  if (idle_heaps_.size() > kIdleHeaps) idle_heaps_.erase(idle_heaps_.begin());
}

// Gives up calls whose PEs did not all enter in time.
void Engine::watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (waiting_.empty()) {
      waiting_changed_.wait(lock);
      continue;
    }
    const auto earliest =
        std::min_element(waiting_.begin(), waiting_.end(),
                         [](const auto& a, const auto& b) { return a->deadline < b->deadline; });
    const std::shared_ptr<Team> team = *earliest;
    if (Clock::now() < team->deadline) {
      waiting_changed_.wait_until(lock, team->deadline);
      continue;
    }
    waiting_.erase(earliest);
    team->failure = "phase enter: awaited PEs" + missing_pes(*team) +
                    " did not enter the call: expected " + std::to_string(team->entries.size()) +
                    " PEs, seen " + std::to_string(team->present) + " when the deadline passed";
    std::vector<std::pair<int32_t, Done>> present;
    for (const std::optional<Entry>& entry : team->entries) {
      if (entry) present.emplace_back(entry->rank, entry->done);
    }
    lock.unlock();
    for (const auto& [rank, done] : present)
      done("PE " + std::to_string(rank) + ", " + team->failure);
    lock.lock();
  }
}

}  // namespace flashmoe::cpu
