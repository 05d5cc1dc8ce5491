// The C ABI's objects with owners, and failures as exceptions: hetcomp-run uses nothing but hetcomp.h.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "hetcomp/hetcomp.h"

namespace hetcomp::cli {

// A call that failed; the sentence is hetcomp_last_error's.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void check(hetcomp_status status) {
  if (status != HETCOMP_OK) throw Failure(hetcomp_last_error());
}

template <auto Free>
struct FreeWith {
  template <class T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};

using ModelPtr = std::unique_ptr<hetcomp_model, FreeWith<hetcomp_model_free>>;
using SessionPtr = std::unique_ptr<hetcomp_session, FreeWith<hetcomp_session_free>>;
using GenerationPtr = std::unique_ptr<hetcomp_generation, FreeWith<hetcomp_generation_free>>;
template <class T>
using Buffer = std::unique_ptr<T, FreeWith<hetcomp_free>>;

inline std::vector<std::int32_t> tokenize(const hetcomp_model* model, const std::string& text,
                                          bool add_special) {
  std::int32_t* ids = nullptr;
  std::size_t n = 0;
  check(hetcomp_tokenize(model, text.data(), text.size(), 1, add_special ? 1 : 0, &ids, &n));
  const Buffer<std::int32_t> owner(ids);
  return {ids, ids + n};
}

inline std::string chat_render(const hetcomp_model* model, const std::string& context) {
  char* text = nullptr;
  std::size_t length = 0;
  check(hetcomp_chat_render(model, context.data(), context.size(), &text, &length));
  const Buffer<char> owner(text);
  return {text, length};
}

}  // namespace hetcomp::cli
