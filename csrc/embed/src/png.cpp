// PNG files, encoded by stb_image_write.
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC  // its functions stay in this file: another copy in the program does no harm
#define STBI_WRITE_NO_STDIO
#include <stb_image_write.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "twinflow_rt_embed.h"

namespace twinflow {

namespace {

// NOLINTNEXTLINE(misc-const-correctness): the type that stb calls
void append(void* file, void* data, int size) {
  static_cast<std::ofstream*>(file)->write(static_cast<const char*>(data), size);
}

// Whether all of it was written.
bool write_file(const std::string& path, const Image& image) {
  const int height = static_cast<int>(image.height), width = static_cast<int>(image.width);
  std::ofstream file(path, std::ios::binary);
  const bool encoded = stbi_write_png_to_func(append, &file, width, height, 3, image.pixels.data(), 3 * width) != 0;
  file.close();
  return encoded && file;
}

}  // namespace

void write_png(const std::string& path, const Image& image) {
  const int64_t row = 3 * image.width;
  if (image.height < 1 || image.width < 1 || image.height > 65535 || image.width > 65535 ||
      static_cast<int64_t>(image.pixels.size()) != image.height * row || image.height * row > INT32_MAX / 2)
    throw Error(path + ": an image needs height x width x 3 bytes, both from 1 to 65535, and less than 1 GB");
  const std::string partial = path + "." + std::to_string(::getpid()) + ".part";
  if (!write_file(partial, image) || std::rename(partial.c_str(), path.c_str()) != 0) {
    std::remove(partial.c_str());
    throw Error(path + " cannot be written");
  }
}

}  // namespace twinflow
