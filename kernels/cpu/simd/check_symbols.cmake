# Fails if the static library LIBRARY has a function that the linker may exchange for one of the same
# name elsewhere, unless its name says for which instruction set it is compiled.
execute_process(COMMAND ${NM} -A ${LIBRARY} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE "\n" ";" symbols "${symbols}")
foreach(symbol IN LISTS symbols)
  if(symbol MATCHES " [Wu] _Z"
     AND NOT symbol MATCHES "(dispatch|scratch)\\.cc\\.o"  # not compiled for a level
     AND NOT symbol MATCHES "4simd(8portable|4avx2|6avx512|11avx512_bf16|3amx)")
    message(SEND_ERROR "${symbol} may reach CPUs that lack its instructions: have it inlined.")
  endif()
endforeach()
