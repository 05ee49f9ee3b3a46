// The handlers that XLA calls, for registration by the Python extension.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace flashmoe::cuda {

XLA_FFI_Error* initialize(XLA_FFI_CallFrame* frame);
XLA_FFI_Error* forward(XLA_FFI_CallFrame* frame);

}  // namespace flashmoe::cuda
