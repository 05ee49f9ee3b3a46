#include "tests/native/harness.h"

#include <exception>
#include <mutex>
#include <thread>

namespace flashmoe::testing {

void check(bool condition, std::string_view message, std::source_location where) {
  if (condition) return;
  std::string_view file = where.file_name();
  file.remove_prefix(file.find_last_of('/') + 1);  // npos + 1 is 0
  throw CheckFailed(std::string(file) + ":" + std::to_string(where.line()) + ": " +
                    std::string(message));
}

void check_contains(std::string_view text, const std::vector<std::string>& parts,
                    std::source_location where) {
  for (const std::string& part : parts) {
    check(text.find(part) != std::string_view::npos,
          "'" + part + "' is missing in the message '" + std::string(text) + "'", where);
  }
}

void on_threads(int count, const std::function<void(int)>& f) {
  std::mutex mutex;
  std::exception_ptr first;
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      try {
        f(i);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!first) first = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (first) std::rethrow_exception(first);
}

}  // namespace flashmoe::testing
