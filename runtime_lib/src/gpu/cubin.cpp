#include "cubin.h"

#include <elf.h>

#include <cstring>

#include "../file.h"
#include "../status.h"

namespace hetcomp::gpu {
namespace {

constexpr std::uint64_t kLargestCubin = 64U << 20;  // a kernel's is tens of KB
constexpr std::uint16_t kCudaMachine = 190;         // EM_CUDA

class Elf {
 public:
  Elf(std::span<const std::byte> bytes, const std::string& where) : bytes_(bytes), where_(where) {}

  void check() const {
    const auto header = at<Elf64_Ehdr>(0);
    if (std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_ident[EI_DATA] != ELFDATA2LSB || header.e_machine != kCudaMachine)
      refuse("it is not a cubin");
    if ((header.e_shnum > 0 && header.e_shentsize != sizeof(Elf64_Shdr)) ||
        (header.e_phnum > 0 && header.e_phentsize != sizeof(Elf64_Phdr)))
      refuse("the entries of its tables have another size");
    for (std::uint64_t i = 0; i < header.e_phnum; ++i) {
      require_inside(header.e_phoff, (i + 1) * sizeof(Elf64_Phdr));
      const auto segment = at<Elf64_Phdr>(header.e_phoff + i * sizeof(Elf64_Phdr));
      require_inside(segment.p_offset, segment.p_filesz);
    }
    for (std::uint64_t i = 0; i < header.e_shnum; ++i) {
      require_inside(header.e_shoff, (i + 1) * sizeof(Elf64_Shdr));
      const auto section = at<Elf64_Shdr>(header.e_shoff + i * sizeof(Elf64_Shdr));
      if (section.sh_type != SHT_NOBITS) require_inside(section.sh_offset, section.sh_size);
    }
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(HETCOMP_BAD_ARTIFACT, where_ + " cannot be loaded as GPU code: " + what +
                                          "; compile the model again or copy the artifact anew.");
  }
  void require_inside(std::uint64_t offset, std::uint64_t size) const {
    if (offset > bytes_.size() || size > bytes_.size() - offset) refuse("it is truncated");
  }
  template <class T>
  T at(std::uint64_t offset) const {
    require_inside(offset, sizeof(T));
    T value;
    std::memcpy(&value, bytes_.data() + offset, sizeof(T));
    return value;
  }

  std::span<const std::byte> bytes_;
  const std::string& where_;
};

}  // namespace

void require_cubin(std::span<const std::byte> bytes, const std::string& where) { Elf(bytes, where).check(); }

std::vector<std::byte> read_cubin(const std::filesystem::path& artifact, const KernelRecord& kernel) {
  const File file(inside(artifact, "gpu/" + kernel.file));
  const std::string where = file.path().string();
  if (file.size() > kLargestCubin)
    throw Error(HETCOMP_BAD_ARTIFACT, where + " is " + in_words(file.size()) + ": not the code of a kernel.");
  std::vector<std::byte> bytes(file.size());
  file.read(0, bytes);
  if (sha256(bytes) != kernel.sha256) {
    throw Error(HETCOMP_BAD_ARTIFACT,
                where + " does not have the SHA-256 in kernels.json: it is damaged; copy the artifact anew.");
  }
  require_cubin(bytes, where);
  return bytes;
}

}  // namespace hetcomp::gpu
