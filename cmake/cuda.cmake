# flashmoe_cuda_object() and flashmoe_cuda: how the CUDA kernels are compiled, and what their host
# code is compiled and linked with. Sets FLASHMOE_CUDA_ENABLED and says why it is what it is.
#
# nvcc is called by name, not through CMake's CUDA language: that wants a toolkit in its usual
# places, while the one from PyPI has others; each source has architectures of its own; and what
# ptxas reports is kept for tools/check_machine_code.py.

set(FLASHMOE_CUDA AUTO CACHE STRING "Build the CUDA module: AUTO (where that can work), ON or OFF")
set_property(CACHE FLASHMOE_CUDA PROPERTY STRINGS AUTO ON OFF)
set(FLASHMOE_CUDA_TOOLCHAIN "" CACHE PATH
    "Folder that tools/cuda_toolchain.py printed; empty: search Python's packages and the system")
set(flashmoe_oldest_cuda 13.0)

# Where packages of PyPI may lie: folders that contain nvidia/cu13.
function(flashmoe_cuda_packages out)
  if(FLASHMOE_CUDA_TOOLCHAIN)
    set(${out} ${FLASHMOE_CUDA_TOOLCHAIN} PARENT_SCOPE)
    return()
  endif()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import sys; print(*(p for p in sys.path if p.endswith('-packages')), sep=';')"
    OUTPUT_VARIABLE folders OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  list(REMOVE_DUPLICATES folders)
  set(${out} ${folders} PARENT_SCOPE)
endfunction()

# Sets FLASHMOE_NVCC, FLASHMOE_CUDA_VERSION, FLASHMOE_CUDA_INCLUDE and FLASHMOE_CUDART, or `missing`
# to what stands in the way.
function(flashmoe_find_cuda missing)
  flashmoe_cuda_packages(packages)

  if(CMAKE_CUDA_COMPILER)
    set(nvcc ${CMAKE_CUDA_COMPILER})
  elseif(FLASHMOE_CUDA_TOOLCHAIN)
    set(nvcc ${FLASHMOE_CUDA_TOOLCHAIN}/nvidia/cu13/bin/nvcc)
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc $ENV{CUDACXX})
  else()
    list(TRANSFORM packages APPEND /nvidia/cu13 OUTPUT_VARIABLE roots)
    find_program(nvcc NAMES nvcc PATHS ${roots} $ENV{CUDA_HOME} $ENV{CUDA_PATH} PATH_SUFFIXES bin
                 NO_DEFAULT_PATH NO_CACHE)
    find_program(nvcc NAMES nvcc PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
  if(NOT nvcc)
    set(${missing} "no nvcc in ${packages}, CUDACXX, CUDA_HOME or PATH" PARENT_SCOPE)
    return()
  endif()

  # nvcc may be a wrapper, so where its toolkit lies is what it says it would pass on.
  execute_process(COMMAND ${nvcc} --version OUTPUT_VARIABLE version ERROR_VARIABLE version
                  RESULT_VARIABLE result)
  if(NOT result EQUAL 0 OR NOT version MATCHES "V([0-9]+\\.[0-9]+\\.[0-9]+)")
    string(REGEX MATCH "[^\n]*" said "${version}")
    set(${missing} "${nvcc}, which is no nvcc that runs (${said})" PARENT_SCOPE)
    return()
  endif()
  set(version ${CMAKE_MATCH_1})
  if(version VERSION_LESS flashmoe_oldest_cuda)
    set(${missing} "only ${nvcc} of CUDA ${version}, older than ${flashmoe_oldest_cuda}"
        PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${nvcc} --dryrun -c probe.cu OUTPUT_VARIABLE plan ERROR_VARIABLE plan)
  string(REGEX MATCH "TOP=([^\n]*)" top "${plan}")
  file(REAL_PATH "${CMAKE_MATCH_1}" top)
  string(REGEX MATCH "[^_]INCLUDES=[^\n]*" includes "${plan}")
  string(REGEX MATCHALL "-I[^\"]+" includes "${includes}")
  list(TRANSFORM includes REPLACE "^-I" "")
  string(REGEX MATCH "LIBRARIES=[^\n]*" libraries "${plan}")
  string(REGEX MATCHALL "-L[^\"]+" libraries "${libraries}")
  list(TRANSFORM libraries REPLACE "^-L" "")
  find_path(include NAMES cuda_runtime.h PATHS ${includes} ${top}/include NO_DEFAULT_PATH NO_CACHE)
  find_file(cudart NAMES libcudart_static.a PATHS ${libraries} ${top}/lib ${top}/lib64
            NO_DEFAULT_PATH NO_CACHE)
  if(NOT include OR NOT cudart)
    set(${missing} "no cuda_runtime.h or libcudart_static.a beside ${nvcc} (${top})"
        PARENT_SCOPE)
    return()
  endif()

  set(probe ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/cuda_probe)
  file(WRITE ${probe}.cu "#include <concepts>\n#include <cstdint>\n"
       "template <std::integral T> __global__ void kernel(T* x) { *x = 1; }\n"
       "void launch(int32_t* x) { kernel<<<1, 1>>>(x); }\n")
  set(key "${nvcc} ${version} ${CMAKE_CXX_COMPILER} ${CMAKE_CXX_COMPILER_VERSION}")
  if(NOT "${FLASHMOE_CUDA_PROBED}" STREQUAL key)
    execute_process(
      COMMAND ${nvcc} -std=c++20 -gencode arch=compute_90a,code=sm_90a -ccbin ${CMAKE_CXX_COMPILER}
              -c ${probe}.cu -o ${probe}.o
      RESULT_VARIABLE result OUTPUT_VARIABLE said ERROR_VARIABLE said)
    if(NOT result EQUAL 0)
      string(REGEX MATCH "[^\n]*error[^\n]*" error "${said}")
      string(CONCAT reason "only ${nvcc} ${version}, which does not work with "
                           "${CMAKE_CXX_COMPILER} (${error})")
      set(${missing} "${reason}" PARENT_SCOPE)
      return()
    endif()
    set(FLASHMOE_CUDA_PROBED "${key}" CACHE INTERNAL "Compilers that work together")
  endif()

  set(FLASHMOE_NVCC ${nvcc} PARENT_SCOPE)
  set(FLASHMOE_CUDA_VERSION ${version} PARENT_SCOPE)
  set(FLASHMOE_CUDA_INCLUDE ${include} PARENT_SCOPE)
  set(FLASHMOE_CUDART ${cudart} PARENT_SCOPE)
endfunction()

set(FLASHMOE_CUDA_ENABLED FALSE)
if(NOT FLASHMOE_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLASHMOE_CUDA is '${FLASHMOE_CUDA}'; it must be AUTO, ON or OFF.")
elseif(FLASHMOE_CUDA STREQUAL "OFF")
  message(STATUS "CUDA: no, FLASHMOE_CUDA is OFF")
  return()
elseif(NOT FLASHMOE_PYTHON_MODULES)
  message(STATUS "CUDA: no, only the Python modules have a part for it")
  return()
endif()
set(cuda_missing)
flashmoe_find_cuda(cuda_missing)
if(cuda_missing)
  set(cuda_advice "'make cuda', or FLASHMOE_CUDA=1 in the environment of pip or make, takes "
                  "compiler and libraries from PyPI.")
  if(FLASHMOE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CUDA was asked for, but there is ${cuda_missing}. " ${cuda_advice})
  endif()
  message(STATUS "CUDA: no, there is ${cuda_missing}. Only the CPU handlers are built; "
                 ${cuda_advice})
  return()
endif()
set(FLASHMOE_CUDA_ENABLED TRUE)
message(STATUS "CUDA: yes (${FLASHMOE_CUDA}), sm_80, sm_90 and sm_90a, with nvcc "
               "${FLASHMOE_CUDA_VERSION} (${FLASHMOE_NVCC})")

# flashmoe_cuda_object(SOURCE ARCHITECTURE [LATER...]): compiles one source for one architecture, into
# machine code for the later ones too, and appends the object to flashmoe_cuda_objects. What is not
# for one architecture alone (90a) also gets PTX, which the driver compiles for other later GPUs.
function(flashmoe_cuda_object source architecture)
  get_filename_component(name ${source} NAME)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${name}.o)
  set(input ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  set(code ${architecture} ${ARGN})
  list(TRANSFORM code PREPEND sm_)
  if(NOT architecture MATCHES "[a-z]$")
    list(APPEND code compute_${architecture})
  endif()
  list(JOIN code , code)
  set(flags -std=c++20 -O3 -lineinfo -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall
            -gencode arch=compute_${architecture},code=[${code}])
  if(FLASHMOE_WERROR)
    list(APPEND flags -Werror all-warnings)
  endif()
  add_custom_command(
    OUTPUT ${object}
    BYPRODUCTS ${object}.log
    DEPENDS ${input} ${PROJECT_SOURCE_DIR}/cmake/run_logged.cmake
    DEPFILE ${object}.d
    COMMAND ${CMAKE_COMMAND} -D LOG=${object}.log -P ${PROJECT_SOURCE_DIR}/cmake/run_logged.cmake --
            ${FLASHMOE_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${flags} -I${PROJECT_SOURCE_DIR}
            -MD -MF ${object}.d -MT ${object} -c ${input} -o ${object}
    COMMENT "Compiling ${source} for ${code}"
    VERBATIM)
  set_source_files_properties(${object} PROPERTIES EXTERNAL_OBJECT TRUE GENERATED TRUE)
  set(flashmoe_cuda_objects ${flashmoe_cuda_objects} ${object} PARENT_SCOPE)
endfunction()

# NVSHMEM's headers and device library, from PyPI's package or a system's.
include(nvshmem)
flashmoe_cuda_packages(nvshmem_roots)
list(TRANSFORM nvshmem_roots APPEND /nvidia/nvshmem)
if(NOT FLASHMOE_CUDA_TOOLCHAIN AND DEFINED ENV{NVSHMEM_HOME})
  list(PREPEND nvshmem_roots $ENV{NVSHMEM_HOME})
endif()
set(nvshmem_missing)
flashmoe_find_nvshmem(nvshmem_missing ${nvshmem_roots})
if(NOT nvshmem_missing)
  message(STATUS "CUDA: with the network transport, of NVSHMEM ${FLASHMOE_NVSHMEM_VERSION} "
                 "(${FLASHMOE_NVSHMEM_INCLUDE})")
elseif(FLASHMOE_CUDA STREQUAL "ON")
  message(FATAL_ERROR "CUDA was asked for, but there is ${nvshmem_missing}. Install "
                      "nvidia-nvshmem-cu13, or let NVSHMEM_HOME name another NVSHMEM; "
                      "FLASHMOE_CUDA=1 in the environment of pip or make takes it from PyPI.")
else()
  message(STATUS "CUDA: without the network transport, there is ${nvshmem_missing}")
endif()

# flashmoe_cuda_network_image(SOURCE ARCHITECTURE): compiles one source for one architecture, links
# it with NVSHMEM's device library, and makes an array of the result: SOURCE's name with .inc. Without
# NVSHMEM it is empty.
function(flashmoe_cuda_network_image source architecture)
  get_filename_component(name ${source} NAME_WE)
  set(output ${CMAKE_CURRENT_BINARY_DIR}/${name})
  set(flashmoe_cuda_network_images ${flashmoe_cuda_network_images} ${output}.inc PARENT_SCOPE)
  if(nvshmem_missing)
    file(GENERATE OUTPUT ${output}.inc
         CONTENT "static constexpr std::span<const unsigned long long> ${name};\n")
    return()
  endif()
  set(input ${CMAKE_CURRENT_SOURCE_DIR}/${source})
  set(target -gencode arch=compute_${architecture},code=sm_${architecture})
  set(flags -std=c++20 -O3 -rdc=true -Xptxas -v ${target})
  get_filename_component(bin ${FLASHMOE_NVCC} DIRECTORY)
  find_program(bin2c bin2c HINTS ${bin} REQUIRED NO_CACHE)
  add_custom_command(
    OUTPUT ${output}.inc
    BYPRODUCTS ${output}.o ${output}.log ${output}.fatbin
    DEPENDS ${input} ${PROJECT_SOURCE_DIR}/cmake/run_logged.cmake
    DEPFILE ${output}.d
    COMMAND ${CMAKE_COMMAND} -D LOG=${output}.log -P ${PROJECT_SOURCE_DIR}/cmake/run_logged.cmake --
            ${FLASHMOE_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${flags} -I${PROJECT_SOURCE_DIR}
            -isystem ${FLASHMOE_NVSHMEM_INCLUDE} -MD -MF ${output}.d -MT ${output}.inc -c ${input}
            -o ${output}.o
    COMMAND ${FLASHMOE_NVCC} -ccbin ${CMAKE_CXX_COMPILER} -dlink -fatbin --compress-mode=size
            ${target} ${output}.o ${FLASHMOE_NVSHMEM_DEVICE} -o ${output}.fatbin
    COMMAND ${bin2c} --const --static --type longlong --name ${name} ${output}.fatbin
            > ${output}.inc
    COMMENT "Compiling ${source} for sm_${architecture}, with NVSHMEM"
    VERBATIM)
endfunction()

# The CUDA runtime is linked statically, and NVSHMEM is loaded at run time by those who span GPUs,
# so the module needs nothing on a machine that only imports it.
add_library(flashmoe_cuda INTERFACE)
target_include_directories(flashmoe_cuda SYSTEM INTERFACE ${FLASHMOE_CUDA_INCLUDE})
target_link_libraries(flashmoe_cuda INTERFACE ${FLASHMOE_CUDART} rt ${CMAKE_DL_LIBS})
