"""What every C++ source is compiled with; cmake/compile_options.cmake has the reasons."""

COPTS = [
    "-std=c++20",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Wno-restrict",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
]
