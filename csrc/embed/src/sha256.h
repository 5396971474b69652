// SHA-256 (FIPS 180-4), for comparing a file's parts with its manifest.
#pragma once

#include <cstddef>
#include <string>

namespace twinflow {

// The digest of `size` bytes, in lower-case hexadecimal.
std::string sha256(const void* data, size_t size);

}  // namespace twinflow
