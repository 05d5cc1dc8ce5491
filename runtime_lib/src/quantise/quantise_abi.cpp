// What libhetcomp_quantise.so exports.
#include <new>

#include "quantise.h"

int32_t hetcomp_quantise(const hetcomp_quantise_request* request) {
  if (!request) return HETCOMP_QUANTISE_BAD_REQUEST;
  try {
    return hetcomp::quantise::quantise(*request);
  } catch (const std::bad_alloc&) {
    return HETCOMP_QUANTISE_NO_MEMORY;
  }
}

int32_t hetcomp_repack(const hetcomp_repack_request* request) {
  if (!request) return HETCOMP_QUANTISE_BAD_REQUEST;
  try {
    return hetcomp::quantise::repack(*request);
  } catch (const std::bad_alloc&) {
    return HETCOMP_QUANTISE_NO_MEMORY;
  }
}
