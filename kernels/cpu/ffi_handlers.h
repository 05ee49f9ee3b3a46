// The handlers that XLA calls, for registration by the Python extension.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace flashmoe::cpu {

// A call site, made when XLA loads a program and shared by all devices that run it.
XLA_FFI_TypeId* call_site_type_id();
XLA_FFI_TypeInfo* call_site_type_info();

XLA_FFI_Error* instantiate(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* backward(XLA_FFI_CallFrame* frame);

// Tile sizes of the engine. They do not depend on the number of PEs or of cores, so that the bits
// of a result do not either.
inline constexpr int32_t kBlockRows = 128;
inline constexpr int32_t kBlockTokens = 32;
inline constexpr int32_t kBlockColumns = 512;

}  // namespace flashmoe::cpu
