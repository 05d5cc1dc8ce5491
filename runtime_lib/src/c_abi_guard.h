// What every function of the C ABI does around its work: arguments, exceptions, memory for the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "hetcomp/hetcomp.h"
#include "status.h"

namespace hetcomp::c_abi {

inline thread_local std::string last_error;

// Keeps the sentence for hetcomp_last_error.
inline hetcomp_status record(hetcomp_status status, const char* sentence) noexcept {
  try {
    last_error = sentence;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Exceptions of `body` become statuses: none leaves the library.
template <class Body>
hetcomp_status guard(const Body& body) noexcept {
  try {
    body();
    return HETCOMP_OK;
  } catch (const Error& error) {
    return record(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return record(HETCOMP_OUT_OF_MEMORY, "The system has no memory left for this call.");
  } catch (const std::exception& error) {
    return record(HETCOMP_INTERNAL, error.what());
  } catch (...) {
    return record(HETCOMP_INTERNAL, "An unknown error occurred; report this bug.");
  }
}

inline void require(const void* pointer, const char* name) {
  if (pointer == nullptr)
    throw Error(HETCOMP_INVALID_ARGUMENT, std::string("The argument ") + name + " is null.");
}

// The caller's struct, read as far as the caller's header knew it; the rest keeps its default.
template <class Options>
Options copy_options(const Options* given, Options defaults) {
  if (given == nullptr) return defaults;
  if (given->struct_size < sizeof(std::uint32_t) || given->struct_size > sizeof(Options)) {
    throw Error(
        HETCOMP_INVALID_ARGUMENT,
        "An options struct is not initialised, or of a newer hetcomp.h: call its _init function first.");
  }
  std::memcpy(static_cast<void*>(&defaults), given, given->struct_size);
  return defaults;
}

// For the caller to free with hetcomp_free.
template <class T>
T* allocate(std::size_t n) {
  auto* memory = static_cast<T*>(std::malloc(n * sizeof(T)));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// With a NUL behind it. length: null, or where to put how many bytes there are before.
inline char* copy_text(const std::string& text, std::size_t* length) {
  char* copy = allocate<char>(text.size() + 1);
  std::memcpy(copy, text.c_str(), text.size() + 1);
  if (length != nullptr) *length = text.size();
  return copy;
}

}  // namespace hetcomp::c_abi
