// The wgmmas of a warpgroup that are not waited for yet.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <list>
#include <vector>

#include "kernels/emulator/machine.h"
#include "kernels/emulator/tensor_core.h"

namespace flashmoe::emulator {

// The accumulators of a chain of wgmmas, from the first of them to the wait.
struct Accumulators {
  int columns;
  std::array<float*, kWarpgroupSize> registers{};  // null: not issued, or given back
  std::vector<float> values;                       // [128][columns / 2]
  uint64_t last = 0;                               // wgmma of the chain
  int left = kWarpgroupSize;                       // threads that wait for their results
};

struct IssuedWgmma {
  WgmmaInstruction instruction;
  bool accumulate;
  Accumulators* accumulators;
  bool begins_chain;
  int issued = 0;                       // threads
  std::vector<Shadow::Written> writes;  // of the operands
};

struct Warpgroup {
  Warpgroup(int block_, int index_, Id agent_) : block(block_), index(index_), agent(agent_) {}

  struct Lane {
    bool fenced = false;
    uint64_t issued = 0;     // wgmmas
    uint32_t committed = 0;  // groups
  };

  int block, index;
  Id agent;  // who reads the operands
  std::array<Lane, kWarpgroupSize> lanes;
  std::deque<IssuedWgmma> wgmmas;      // not multiplied yet
  uint64_t first = 0;                  // index of wgmmas[0]
  std::vector<uint64_t> group_end{0};  // [g]: wgmmas in groups 1 to g
  std::vector<int> commits{0};         // [g]: threads that committed g
  uint32_t complete = 0;               // groups whose results exist
  uint64_t last_completion = 0;        // when
  std::list<Accumulators> in_flight;
  std::vector<Thread*> waiters;
};

}  // namespace flashmoe::emulator
