#!/bin/sh
# Prints the first C++20 compiler of $CXX, c++, g++, clang++; says what to do if there is none.
set -eu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/probe.cc" <<'END'
#include <atomic>
#include <concepts>
#include <span>
template <std::integral T>
T first(std::span<T> values) { return values.front(); }
int main() {
  std::atomic<int> flag{1};
  flag.wait(0);
  int values[] = {0};
  return first(std::span<int>(values));
}
END

for compiler in ${CXX:-c++ g++ clang++}; do
  if "$compiler" -std=c++20 -pthread "$work/probe.cc" -o "$work/probe" 2>"$work/errors"; then
    command -v "$compiler"
    exit 0
  fi
  { echo "$compiler:"; head -n 3 "$work/errors"; } >>"$work/report"
done
{
  echo "No C++20 compiler was found. Tried:"
  sed 's/^/  /' "$work/report"
  echo "Install g++ 11 or clang++ 14 or newer (Debian, Ubuntu: apt-get install g++; macOS:"
  echo "xcode-select --install), or name one:  make ... CXX=/path/to/c++"
} >&2
exit 1
