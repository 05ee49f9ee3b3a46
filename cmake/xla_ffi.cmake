# xla::ffi: the header-only XLA FFI API.
#
# A handler built against the headers of one jaxlib loads in that jaxlib and in newer ones; in an
# older one it stops the whole backend from starting. So the headers must be those of the oldest
# supported jaxlib, whichever jaxlib the package later runs with.

set(flashmoe_oldest_jaxlib 0.10.1)

if(FLASHMOE_FFI_INCLUDE_DIR)
  set(ffi_include_dir ${FLASHMOE_FFI_INCLUDE_DIR})
else()
  # jaxlib is located without importing it: an isolated build has no jax beside it.
  execute_process(
    COMMAND
      ${Python_EXECUTABLE} -c
      "import importlib.metadata as m, importlib.util as u; print(m.version('jaxlib'), list(u.find_spec('jaxlib').submodule_search_locations)[0], sep=';')"
    OUTPUT_VARIABLE ffi_found
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_QUIET
    RESULT_VARIABLE ffi_result)
  set(ffi_advice
      "Install jaxlib==${flashmoe_oldest_jaxlib} for the build, or fetch its headers with "
      "'python tools/fetch_ffi_headers.py' and pass the folder it prints as "
      "-DFLASHMOE_FFI_INCLUDE_DIR=FOLDER.")
  if(NOT ffi_result EQUAL 0)
    message(FATAL_ERROR "The XLA FFI headers were not found: ${Python_EXECUTABLE} has no jaxlib. "
                        ${ffi_advice})
  endif()
  list(GET ffi_found 0 ffi_version)
  list(GET ffi_found 1 ffi_package_dir)
  if(NOT ffi_version VERSION_EQUAL flashmoe_oldest_jaxlib)
    message(FATAL_ERROR "The XLA FFI headers of jaxlib ${ffi_version} (${ffi_package_dir}) would "
                        "make a module that older jaxlibs cannot load; this project builds against "
                        "those of jaxlib ${flashmoe_oldest_jaxlib}. " ${ffi_advice})
  endif()
  set(ffi_include_dir ${ffi_package_dir}/include)
endif()

if(NOT EXISTS ${ffi_include_dir}/xla/ffi/api/ffi.h)
  message(FATAL_ERROR "${ffi_include_dir} has no xla/ffi/api/ffi.h. FLASHMOE_FFI_INCLUDE_DIR must "
                      "name the 'include' folder of a jaxlib.")
endif()
message(STATUS "XLA FFI headers: ${ffi_include_dir}")

add_library(xla_ffi INTERFACE)
target_include_directories(xla_ffi SYSTEM INTERFACE ${ffi_include_dir})
add_library(xla::ffi ALIAS xla_ffi)
