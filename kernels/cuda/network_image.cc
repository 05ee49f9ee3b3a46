#include "kernels/cuda/network_image.h"

// What bin2c makes of the images: network_sm80 and network_sm90, arrays of 8-byte words.
#include "network_sm80.inc"
#include "network_sm90.inc"

namespace flashmoe::cuda {

std::span<const std::byte> network_image_sm80() { return std::as_bytes(std::span(network_sm80)); }
std::span<const std::byte> network_image_sm90() { return std::as_bytes(std::span(network_sm90)); }

}  // namespace flashmoe::cuda
