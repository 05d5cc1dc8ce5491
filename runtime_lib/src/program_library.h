// A compiled program of an artifact, loaded.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "file.h"
#include "hetcomp/program.h"
#include "manifest.h"

namespace hetcomp {

// The best program whose instruction set is in `available`; `forced` (may be empty) asks for one by name.
// Throws Error.
const ProgramRecord& choose_program(const Manifest& manifest, const std::vector<std::string>& available,
                                    const std::string& forced);

// The file must have been verified. Throws Error if it does not fit the manifest.
class ProgramLibrary {
 public:
  ProgramLibrary(const std::filesystem::path& path, const ProgramRecord& record, const Manifest& manifest);
  ~ProgramLibrary();
  ProgramLibrary(const ProgramLibrary&) = delete;
  ProgramLibrary& operator=(const ProgramLibrary&) = delete;

  const hetcomp_program& program() const { return *program_; }

 private:
  void check(const ProgramRecord& record, const Manifest& manifest) const;

  File file_;  // open for as long as the library, so that its name for dlopen stays its own
  void* handle_ = nullptr;
  const hetcomp_program* program_ = nullptr;
};

}  // namespace hetcomp
