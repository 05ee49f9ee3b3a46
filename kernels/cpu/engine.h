// Brings the PEs of a call together and runs them on the engine's own threads.
//
// XLA enters a call once per device, each on its own time, and may enter independent calls in
// different orders on different devices. Were every PE's worker to start what came first, PE 0
// could wait in call A for PE 1, and PE 1 in call B for PE 0. So a call starts when its last PE has
// entered, and is then appended to the queues of all its workers at once. All queues thus agree on
// the order of the calls, and the oldest unfinished call is at the head of every queue it is in: it
// can run, whatever the others do.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "kernels/cpu/call.h"
#include "kernels/cpu/cores.h"
#include "kernels/cpu/heap.h"
#include "kernels/cpu/pe_call.h"
#include "kernels/cpu/progress.h"
#include "kernels/cpu/trace.h"
#include "kernels/cpu/worker.h"
#include "kernels/cpu/workspace.h"

namespace flashmoe::cpu {

using PeBuffers = std::variant<ForwardBuffers, BackwardBuffers>;

// Tells the caller of one PE that its part has ended: with a message if it failed.
using Done = std::function<void(std::optional<std::string> error)>;

// One PE's entry into a call.
struct Entry {
  int64_t run;     // which execution of the program
  int32_t device;  // of this process
  int32_t group;   // which expert group, where the mesh has several
  int32_t rank;    // of the PE in its group
  CallConfig config;
  PeBuffers buffers;
  Done done;
  Clock::time_point entered{};  // set by the engine
};

// The PEs that have entered a call. On a mesh axis over which nothing of the call varies, several
// devices have the same group and rank, and equal data: they form several teams, and it does not
// matter who is in which.
struct Team {
  int64_t run;
  int32_t group;
  int64_t call;  // how many the device had entered before at the site in this run
  std::vector<std::optional<Entry>> entries;  // [P]
  int32_t present = 0;
  Clock::time_point deadline;
};

// A place in a program where the operator is called. All devices of a process that run the program
// share it, and it is what tells one call from another: the n-th entry of a device during a run
// belongs to the n-th call here.
class CallSite {
 public:
  CallSite();
  uint32_t tag() const { return tag_; }

 private:
  friend class Engine;
  struct Run {
    int64_t id;
    std::map<int32_t, int64_t> entries;      // of each device so far
    std::list<std::shared_ptr<Team>> teams;  // that wait for PEs, or were given up
  };

  Run& run(int64_t id);
  // The team that an entry belongs to, a new one if need be.
  std::shared_ptr<Team> join(Run& run, const Entry& entry);

  const uint32_t tag_;
  std::list<Run> runs_;  // the newest, oldest first
};

class Engine {
 public:
  // Multiply-adds with the expert weights by which a PE's part of a call is over within a few
  // milliseconds. In smaller calls it does not pay to wake more threads than needed, and to hand
  // cores from one to the next.
  static constexpr int64_t kLargeCall = int64_t{1} << 26;

  // Computes on so many cores. Every PE of a call has a worker for each core in its share, at least
  // one. In a large call, where workers wait for a core if there are too few, it has twice as many,
  // so that one with more rows than others gets the cores of those that wait or are through.
  explicit Engine(int32_t cores, int64_t large_call = kLargeCall);
  // All calls must have ended.
  ~Engine();

  // The engine of the process, with the cores that it may run on (or FLASHMOE_CPU_THREADS). Throws
  // std::invalid_argument if that is no number of cores.
  static Engine& instance();
  int32_t cores() const { return cores_.count(); }

  // Enters a call. `done` is called once, from another thread.
  void enter(CallSite& site, Entry entry);

  // From now on records the tasks of all calls that start, at most `capacity` of them; what was
  // recorded before is forgotten.
  void start_trace(int64_t capacity);
  // Ends that and returns the records.
  TraceBuffer::Contents stop_trace();

 private:
  struct Call;

  void start(Team& team);
  Worker& worker(int32_t device, int32_t index);
  Progress& progress(int32_t device);
  std::shared_ptr<HeapGroup> take_heaps(const CallConfig& config);
  std::unique_ptr<Arena> take_arena();
  void leave(Call& call, int32_t rank);
  // Ends the part of a PE in a call that does not take place.
  void refuse(const Done& done, const std::string& message);
  const std::string* failure_of(int64_t run) const;           // or null; mutex_ is held
  void mark_failed(int64_t run, const std::string& message);  // mutex_ is held
  void watch();

  // Programs that failed. What is left of such a run is refused, so that expert groups that have
  // not failed do not go on to a collective in which they would wait for those that have.
  struct FailedRun {
    int64_t id;
    std::string message;
  };

  Cores cores_;
  const int64_t large_call_;
  std::mutex mutex_;                  // guards all below, and all call sites
  std::list<FailedRun> failed_runs_;  // the newest
  std::map<std::pair<int32_t, int32_t>, std::unique_ptr<Worker>> workers_;  // (device, index)
  std::map<int32_t, std::unique_ptr<Progress>> progress_;                   // of a device
  std::vector<std::shared_ptr<HeapGroup>> idle_heaps_;
  std::vector<std::unique_ptr<Arena>> idle_arenas_;
  std::shared_ptr<TraceBuffer> trace_;  // null: nothing is recorded
  int64_t calls_ = 0;
  std::list<std::shared_ptr<Team>> waiting_;
  std::condition_variable waiting_changed_;
  bool stopping_ = false;
  // Tells those who are refused. The watchdog must not: XLA may keep the thread that completes a
  // future for long, while other deadlines pass.
  Worker refusals_;
  std::thread watchdog_;
};

}  // namespace flashmoe::cpu
