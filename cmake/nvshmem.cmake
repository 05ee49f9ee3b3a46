# flashmoe_find_nvshmem(MISSING ROOT...): looks for NVSHMEM in the folders and sets
# FLASHMOE_NVSHMEM_VERSION, FLASHMOE_NVSHMEM_INCLUDE and FLASHMOE_NVSHMEM_DEVICE, its device library,
# or MISSING to what stands in the way. The versions that fit are those of kernels/cuda/nvshmem.h.

set(flashmoe_oldest_nvshmem 3.3.24)

function(flashmoe_find_nvshmem missing)
  find_path(include nvshmem.h PATHS ${ARGN} PATH_SUFFIXES include NO_DEFAULT_PATH NO_CACHE)
  if(NOT include)
    list(JOIN ARGN " or " roots)
    set(${missing} "no include/nvshmem.h in ${roots}" PARENT_SCOPE)
    return()
  endif()

  set(version "of an unknown version")
  set(header ${include}/non_abi/nvshmem_version.h)
  if(EXISTS ${header})
    file(READ ${header} defined)
    set(version)
    foreach(part MAJOR MINOR PATCH)
      string(REGEX MATCH "NVSHMEM_VENDOR_${part}_VERSION +([0-9]+)" found "${defined}")
      list(APPEND version ${CMAKE_MATCH_1})
    endforeach()
    list(JOIN version . version)
  endif()
  string(REGEX MATCH "^[0-9]+" major ${flashmoe_oldest_nvshmem})
  if(NOT version MATCHES "^${major}\\." OR version VERSION_LESS flashmoe_oldest_nvshmem)
    set(${missing} "only NVSHMEM ${version} in ${include}; it must be ${flashmoe_oldest_nvshmem} or \
a later one of the same major version" PARENT_SCOPE)
    return()
  endif()

  # That of these headers: another one could be of another version.
  file(REAL_PATH ${include}/../lib/libnvshmem_device.a device)
  if(NOT EXISTS ${device})
    set(${missing} "no ${device}, the device library of the NVSHMEM that is there" PARENT_SCOPE)
    return()
  endif()
  set(FLASHMOE_NVSHMEM_VERSION ${version} PARENT_SCOPE)
  set(FLASHMOE_NVSHMEM_INCLUDE ${include} PARENT_SCOPE)
  set(FLASHMOE_NVSHMEM_DEVICE ${device} PARENT_SCOPE)
endfunction()
