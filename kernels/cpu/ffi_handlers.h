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

}  // namespace flashmoe::cpu
