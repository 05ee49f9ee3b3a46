# flashmoe_options: what every translation unit of this project is compiled with. No -march: one
# binary must run on every machine of its architecture; faster code is chosen at run time.

add_library(flashmoe_options INTERFACE)
target_include_directories(flashmoe_options INTERFACE ${PROJECT_SOURCE_DIR})
# Without these two, gcc does not vectorise loops with comparisons of floats. Nothing here reads errno
# or floating-point exception flags.
target_compile_options(flashmoe_options INTERFACE -Wall -Wextra -fno-math-errno -fno-trapping-math)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # False alarms in the standard library's string concatenation (GCC bug 105651).
  target_compile_options(flashmoe_options INTERFACE -Wno-restrict)
endif()
if(FLASHMOE_WERROR)
  target_compile_options(flashmoe_options INTERFACE -Werror)
endif()

if(FLASHMOE_SANITIZE STREQUAL "thread")
  set(flashmoe_sanitizers -fsanitize=thread)
elseif(FLASHMOE_SANITIZE STREQUAL "address")
  set(flashmoe_sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
else()
  set(flashmoe_sanitizers)
endif()
if(flashmoe_sanitizers)
  target_compile_options(flashmoe_options INTERFACE ${flashmoe_sanitizers} -O1
                                                    -fno-omit-frame-pointer)
  target_link_options(flashmoe_options INTERFACE ${flashmoe_sanitizers})
endif()
