#include "unicode_regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstdint>
#include <stdexcept>

#include "utf8.h"

namespace hetcomp {

namespace {

std::string message_of(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

template <typename T, void (*Free)(T*)>
struct Freed {
  void operator()(T* p) const { Free(p); }
};
using CompileContext =
    std::unique_ptr<pcre2_compile_context, Freed<pcre2_compile_context, pcre2_compile_context_free>>;
using MatchContext =
    std::unique_ptr<pcre2_match_context, Freed<pcre2_match_context, pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Freed<pcre2_match_data, pcre2_match_data_free>>;

}  // namespace

struct Regex::Code {
  pcre2_code* code = nullptr;
  MatchContext limits;
  ~Code() { pcre2_code_free(code); }
};

Regex::Regex(const std::string& pattern) : code_(std::make_unique<Code>()) {
  const CompileContext context(pcre2_compile_context_create(nullptr));
  code_->limits.reset(pcre2_match_context_create(nullptr));
  if (!context || !code_->limits) throw std::runtime_error("out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                              PCRE2_UTF | PCRE2_UCP, &error, &offset, context.get());
  if (!code_->code) {
    throw std::runtime_error("pattern /" + pattern + "/ at offset " + std::to_string(offset) + ": " +
                             message_of(error));
  }
  // A machine that forbids writable and executable pages has no JIT; matching works without it.
  pcre2_jit_compile(code_->code, PCRE2_JIT_COMPLETE);
  // One match may walk over megabytes of spaces; memory stays bounded by the heap limit.
  pcre2_set_match_limit(code_->limits.get(), UINT32_MAX);
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

std::vector<std::pair<std::size_t, std::size_t>> Regex::spans(std::string_view text) const {
  const MatchData data(pcre2_match_data_create(1, nullptr));
  if (!data) throw std::runtime_error("out of memory");
  std::vector<std::pair<std::size_t, std::size_t>> found;
  std::size_t from = 0;
  bool matched_before = false;
  std::size_t last_end = 0;
  while (from <= text.size()) {
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    int rc = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, data.get(),
                         code_->limits.get());
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {
      rc = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data.get(),
                       code_->limits.get());
    }
    if (rc == PCRE2_ERROR_NOMATCH) break;
    if (rc < 0)
      throw std::runtime_error("the pre-tokenizer's pattern gave up on this text: " + message_of(rc));
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data.get());
    const std::size_t begin = bounds[0];
    const std::size_t end = bounds[1];
    if (begin == end && matched_before && last_end == end) {
      if (from >= text.size()) break;
      from += utf8_length(text.substr(from));
      continue;
    }
    found.emplace_back(begin, end);
    from = last_end = end;
    matched_before = true;
  }
  return found;
}

}  // namespace hetcomp
