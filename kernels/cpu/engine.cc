#include "kernels/cpu/engine.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace flashmoe::cpu {
namespace {

int32_t available_cores() {
  if (const char* text = std::getenv("FLASHMOE_CPU_THREADS")) {
    constexpr int32_t kMost = 4096;
    int32_t cores = 0;
    const auto [end, error] = std::from_chars(text, text + std::strlen(text), cores);
    if (error != std::errc() || *end != '\0' || cores < 1 || cores > kMost) {
      throw std::invalid_argument("FLASHMOE_CPU_THREADS is '" + std::string(text) +
                                  "', but must be a whole number from 1 to " +
                                  std::to_string(kMost));
    }
    return cores;
  }
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
  return std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
}

std::string describe_missing(const Team& team) {
  std::string present, missing;
  for (size_t rank = 0; rank < team.entries.size(); ++rank) {
    (team.entries[rank] ? present : missing).append(" ").append(std::to_string(rank));
  }
  return "PEs" + present + ": awaited PEs" + missing +
         " did not enter the call (phase enter): expected " + std::to_string(team.entries.size()) +
         " PEs, seen " + std::to_string(team.present) + " when the deadline passed";
}

// Runs that are remembered: no device is that many executions of one program behind another.
constexpr size_t kRuns = 64;

// Heaps, once used, are kept for the next call of the same sizes; more idle ones than this are let
// go, the longest idle first.
constexpr size_t kIdleHeaps = 8;

}  // namespace

CallSite::CallSite()
    : tag_([] {
        static std::atomic<uint32_t> next{1};
        return next.fetch_add(1);
      }()) {}

CallSite::Run& CallSite::run(int64_t id) {
  for (Run& run : runs_) {
    if (run.id == id) return run;
  }
  if (runs_.size() == kRuns) runs_.pop_front();
  return runs_.emplace_back(Run{id, {}, {}});
}

std::shared_ptr<Team> CallSite::join(Run& run, const Entry& entry) {
  const int64_t call = run.entries[entry.device]++;
  const size_t rank = static_cast<size_t>(entry.rank);
  for (const std::shared_ptr<Team>& team : run.teams) {
    if (team->group != entry.group || team->call != call) continue;
    // A rank that the team does not have: the caller will find that the sizes differ.
    if (rank >= team->entries.size() || !team->entries[rank]) return team;
  }
  const auto team = std::make_shared<Team>();
  team->run = run.id;
  team->group = entry.group;
  team->call = call;
  team->entries.resize(entry.config.shape.num_pes);
  return run.teams.emplace_back(team);
}

// A call that runs.
struct Engine::Call {
  std::vector<Entry> entries;  // [P]
  std::shared_ptr<HeapGroup> heaps;
  std::vector<std::unique_ptr<Arena>> arenas;
  std::vector<std::unique_ptr<PeCall>> pes;
  int32_t running;  // PEs that have not left; guarded by the engine's mutex
};

Engine::Engine(int32_t cores, int64_t large_call)
    : cores_(cores), large_call_(large_call), watchdog_([this] { watch(); }) {}

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
  entry.entered = Clock::now();
  std::vector<Done> refused{entry.done};
  std::string refusal;
  {
    const std::lock_guard lock(mutex_);
    CallSite::Run& run = site.run(entry.run);
    if (const std::string* failure = failure_of(run.id)) {
      refusal = *failure;
    } else if (entry.rank < 0 || entry.rank >= num_pes) {
      refusal = "rank " + std::to_string(entry.rank) + " is out of range: the group has " +
                std::to_string(num_pes) + " PEs";
    } else {
      const std::shared_ptr<Team> team = site.join(run, entry);
      const auto other = std::find_if(team->entries.begin(), team->entries.end(),
                                      [](const auto& present) { return present.has_value(); });
      if (other != team->entries.end() && !((*other)->config == entry.config)) {
        refusal = "PE " + std::to_string(entry.rank) +
                  " entered the call with other sizes than PE " + std::to_string((*other)->rank);
        mark_failed(run.id, refusal);
      } else {
        if (team->present == 0) {
          team->deadline = Clock::now() + entry.config.deadline;
          waiting_.push_back(team);
          waiting_changed_.notify_all();
        }
        const int32_t rank = entry.rank;
        team->entries[rank] = std::move(entry);
        if (++team->present < num_pes) return;
        run.teams.remove(team);
        waiting_.remove(team);
        refused.clear();
        for (const auto& present : team->entries) refused.push_back(present->done);
        try {
          start(*team);
          return;
        } catch (const std::exception& error) {
          refusal = std::string("the call could not be started: ") + error.what();
          mark_failed(run.id, refusal);
        }
      }
    }
  }
  for (const Done& done : refused) refuse(done, refusal);
}

void Engine::start_trace(int64_t capacity) {
  const std::lock_guard lock(mutex_);
  trace_ = std::make_shared<TraceBuffer>(capacity);
}

TraceBuffer::Contents Engine::stop_trace() {
  std::shared_ptr<TraceBuffer> trace;
  {
    const std::lock_guard lock(mutex_);
    trace = std::move(trace_);
  }
  return trace == nullptr ? TraceBuffer::Contents{} : trace->close();
}

void Engine::start(Team& team) {
  const Clock::time_point now = Clock::now();
  auto call = std::make_shared<Call>();
  for (std::optional<Entry>& entry : team.entries) call->entries.push_back(std::move(*entry));
  const CallConfig& config = call->entries[0].config;
  const int32_t num_pes = config.shape.num_pes;
  const bool large =
      config.shape.slots() * config.shape.hidden * config.shape.intermediate >= large_call_;
  const int32_t share = std::max(1, cores_.count() / num_pes);
  const int32_t workers = large ? std::min(cores_.count(), 2 * share) : share;
  call->running = num_pes;
  call->heaps = take_heaps(config);
  std::vector<const Progress*> devices;
  for (const Entry& entry : call->entries) devices.push_back(&progress(entry.device));
  for (int32_t rank = 0; rank < num_pes; ++rank) {
    // Whatever can fail comes before the first job: from then on the PEs end by themselves.
    for (int32_t index = 0; index < workers; ++index) worker(call->entries[rank].device, index);
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
    call->pes[rank]->follow(progress(call->entries[rank].device), devices);
    if (large) call->pes[rank]->share(cores_);
    call->pes[rank]->record({trace_, calls_, config.traffic.backward, team.group, rank,
                             call->entries[rank].entered, now});
  }
  ++calls_;
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

void Engine::refuse(const Done& done, const std::string& message) {
  refusals_.give(
      [done, message]() -> std::function<void()> { return [done, message] { done(message); }; });
}

Worker& Engine::worker(int32_t device, int32_t index) {
  std::unique_ptr<Worker>& worker = workers_[{device, index}];
  if (worker == nullptr) worker = std::make_unique<Worker>();
  return *worker;
}

Progress& Engine::progress(int32_t device) {
  std::unique_ptr<Progress>& progress = progress_[device];
  if (progress == nullptr) progress = std::make_unique<Progress>();
  return *progress;
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

const std::string* Engine::failure_of(int64_t run) const {
  const auto failed = std::find_if(failed_runs_.begin(), failed_runs_.end(),
                                   [&](const FailedRun& failed) { return failed.id == run; });
  return failed == failed_runs_.end() ? nullptr : &failed->message;
}

void Engine::mark_failed(int64_t run, const std::string& message) {
  if (failure_of(run) != nullptr) return;
  if (failed_runs_.size() == kRuns) failed_runs_.pop_front();
  failed_runs_.push_back({run, message});
  waiting_changed_.notify_all();
}

void Engine::leave(Call& call, int32_t rank) {
  const std::lock_guard lock(mutex_);
  idle_arenas_.push_back(std::move(call.arenas[rank]));
  if (call.heaps->failed()) {
    mark_failed(call.entries[rank].run, call.heaps->failure());
    return;
  }
  if (--call.running > 0) return;
  idle_heaps_.push_back(std::move(call.heaps));
  if (idle_heaps_.size() > kIdleHeaps) idle_heaps_.erase(idle_heaps_.begin());
}

// Gives up calls whose PEs did not all enter in time, or whose run has failed elsewhere.
void Engine::watch() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    auto next = Clock::time_point::max();
    std::shared_ptr<Team> lost;
    for (const std::shared_ptr<Team>& team : waiting_) {
      if (failure_of(team->run) != nullptr || team->deadline <= Clock::now()) lost = team;
      next = std::min(next, team->deadline);
    }
    if (lost == nullptr) {
      if (waiting_.empty()) {
        waiting_changed_.wait(lock);
      } else {
        waiting_changed_.wait_until(lock, next);
      }
      continue;
    }
    waiting_.remove(lost);
    if (failure_of(lost->run) == nullptr) mark_failed(lost->run, describe_missing(*lost));
    const std::string message = *failure_of(lost->run);
    for (const std::optional<Entry>& entry : lost->entries) {
      if (entry) refuse(entry->done, message);
    }
  }
}

}  // namespace flashmoe::cpu
