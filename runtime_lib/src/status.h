// The one exception type inside the runtime; c_abi.cpp turns it into a status and a sentence.
#pragma once

#include <stdexcept>
#include <string>

#include "hetcomp/hetcomp.h"

namespace hetcomp {

class Error : public std::runtime_error {
 public:
  Error(hetcomp_status status, const std::string& sentence) : std::runtime_error(sentence), status_(status) {}
  hetcomp_status status() const { return status_; }

 private:
  hetcomp_status status_;
};

// "3.4 GB", for sentences.
std::string in_words(std::size_t bytes);

}  // namespace hetcomp
