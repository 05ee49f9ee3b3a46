// Virtual time.
#include "kernels/emulator/machine.h"

namespace flashmoe::emulator {

uint64_t nanoseconds() {
  begin_hook("nanoseconds", __builtin_return_address(0));
  machine->looked();
  return machine->now;
}

void sleep(uint32_t nanoseconds) {
  begin_hook("sleep", __builtin_return_address(0));
  Machine& m = *machine;
  m.sleep_until(m.now + m.lengthened(nanoseconds + 1));
}

}  // namespace flashmoe::emulator
