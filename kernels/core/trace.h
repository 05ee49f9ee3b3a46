// What the operator records of its own tasks, on any backend.
#pragma once

#include <cstdint>

namespace flashmoe::core {

// In the order in which a PE passes them. flashmoe_jax/profiling.py lists the same names.
enum class Phase : int32_t {
  kEnter,     // from the entry of the PE until its first worker starts; waits for the other PEs
  kRoute,     // my slots, grouped by expert
  kPlan,      // counts published, those of all PEs awaited, the plan computed
  kDispatch,  // rows put into the heap of their expert's PE
  kFirst,     // a tile of TileKind::kFirst; waits for its rows
  kSecond,    // a tile of TileKind::kSecond, results put back; waits for the first stage
  kWeights,   // a tile of TileKind::kWeights; waits for the first stage
  kCombine,   // the results of a block of tokens summed; waits for them
};

// A task of a worker. Times are nanoseconds of one monotonic clock.
struct TraceRecord {
  int64_t call;      // of the process, counted from 0
  int64_t begin;     // the worker turned to the task
  int64_t ready;     // it stopped waiting for what the task needs
  int64_t end;       // it was done
  int32_t backward;  // 0 or 1
  int32_t group;     // expert group
  int32_t pe;        // rank in the group
  int32_t worker;    // of the PE
  Phase phase;
  int32_t expert;     // global index, or -1
  int32_t row_block;  // of the receive buffer, or -1; of kCombine the token block
  int32_t rows;       // that the task treats
};

}  // namespace flashmoe::core
