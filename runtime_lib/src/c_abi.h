// What all functions of the C ABI share.
#pragma once

#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "hetcomp/hetcomp.h"
#include "model.h"
#include "status.h"

struct hetcomp_model {
  explicit hetcomp_model(std::shared_ptr<hetcomp::Model> loaded) : model(std::move(loaded)) {}
  std::shared_ptr<hetcomp::Model> model;
};

namespace hetcomp::abi {

// Keeps the sentence for hetcomp_last_error.
hetcomp_status record(hetcomp_status status, const char* sentence) noexcept;

// Runs body; exceptions become statuses.
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

}  // namespace hetcomp::abi
