# openblas::openblas: the OpenBLAS of the Python package scipy-openblas32, whose symbols carry the
# prefix scipy_.

if(FLASHMOE_OPENBLAS_DIR)
  set(openblas_dir ${FLASHMOE_OPENBLAS_DIR})
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import pathlib, scipy_openblas32 as b; print(pathlib.Path(b.get_lib_dir()).parent)"
    OUTPUT_VARIABLE openblas_dir
    OUTPUT_STRIP_TRAILING_WHITESPACE
    ERROR_VARIABLE openblas_error
    RESULT_VARIABLE openblas_result)
  if(NOT openblas_result EQUAL 0)
    message(FATAL_ERROR "${Python_EXECUTABLE} cannot import scipy_openblas32. Install "
                        "scipy-openblas32, or pass its folder as -DFLASHMOE_OPENBLAS_DIR=FOLDER.\n"
                        "${openblas_error}")
  endif()
endif()

set(openblas_library
    ${openblas_dir}/lib/${CMAKE_SHARED_LIBRARY_PREFIX}scipy_openblas${CMAKE_SHARED_LIBRARY_SUFFIX})
foreach(path IN ITEMS ${openblas_dir}/include/cblas.h ${openblas_library})
  if(NOT EXISTS ${path})
    message(FATAL_ERROR "scipy-openblas32 lacks ${path}.")
  endif()
endforeach()
message(STATUS "OpenBLAS: ${openblas_library}")

add_library(openblas::openblas SHARED IMPORTED)
set_target_properties(
  openblas::openblas PROPERTIES IMPORTED_LOCATION ${openblas_library}
                                INTERFACE_INCLUDE_DIRECTORIES ${openblas_dir}/include)
