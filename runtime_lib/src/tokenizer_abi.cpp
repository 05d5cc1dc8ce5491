#include "hetcomp/tokenizer_abi.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <string>

#include "chat_template.h"
#include "tokenizer.h"

struct hetcomp_tokenizer {
  std::unique_ptr<hetcomp::Tokenizer> tokenizer;
};

struct hetcomp_chat_template {
  std::unique_ptr<hetcomp::ChatTemplate> chat_template;
};

namespace {

char* copy_text(const std::string& text) {
  auto* copy = static_cast<char*>(std::malloc(text.size() + 1));
  if (copy) std::memcpy(copy, text.c_str(), text.size() + 1);
  return copy;
}

int fail(const std::string& message, char** error) {
  if (error) *error = copy_text(message);
  return 1;
}

int give_text(const std::string& value, char** text, size_t* length, char** error) {
  *text = copy_text(value);
  if (!*text) return fail("Out of memory.", error);
  *length = value.size();
  return 0;
}

// No exception may cross the C boundary; bad_alloc is the one the classes below let through.
template <typename Body>
int guarded(char** error, Body body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail("Out of memory.", error);
  } catch (const std::exception& problem) {
    return fail(std::string("Internal error: ") + problem.what() + ".", error);
  }
}

}  // namespace

int hetcomp_tokenizer_load(const char* json, size_t length, hetcomp_tokenizer** out, char** error) {
  return guarded(error, [&] {
    std::string message;
    auto tokenizer = hetcomp::Tokenizer::load({json, length}, &message);
    if (!tokenizer) return fail(message, error);
    *out = new hetcomp_tokenizer{std::move(tokenizer)};
    return 0;
  });
}

void hetcomp_tokenizer_free(hetcomp_tokenizer* tokenizer) { delete tokenizer; }

int hetcomp_tokenizer_encode(const hetcomp_tokenizer* tokenizer, const char* text, size_t length,
                             int parse_special, int add_special, int32_t** ids, size_t* count, char** error) {
  return guarded(error, [&] {
    std::string message;
    const auto found =
        tokenizer->tokenizer->encode({text, length}, parse_special != 0, add_special != 0, &message);
    if (!found) return fail(message, error);
    *ids = static_cast<int32_t*>(std::malloc((found->size() + 1) * sizeof(int32_t)));
    if (!*ids) return fail("Out of memory.", error);
    if (!found->empty()) std::memcpy(*ids, found->data(), found->size() * sizeof(int32_t));
    *count = found->size();
    return 0;
  });
}

int hetcomp_tokenizer_decode(const hetcomp_tokenizer* tokenizer, const int32_t* ids, size_t count,
                             int skip_special, char** text, size_t* length, char** error) {
  return guarded(error, [&] {
    return give_text(tokenizer->tokenizer->decode(std::span(ids, count), skip_special != 0), text, length,
                     error);
  });
}

int hetcomp_tokenizer_decode_stream(const hetcomp_tokenizer* tokenizer, const int32_t* ids, size_t count,
                                    int skip_special, char** text, size_t* length, char** error) {
  return guarded(error, [&] {
    hetcomp::StreamDecoder stream(*tokenizer->tokenizer, skip_special != 0);
    std::string whole;
    for (size_t i = 0; i < count; ++i) whole += stream.feed(ids[i]);
    whole += stream.flush();
    return give_text(whole, text, length, error);
  });
}

int hetcomp_chat_template_load(const char* json, size_t length, hetcomp_chat_template** out, char** error) {
  return guarded(error, [&] {
    std::string message;
    auto chat_template = hetcomp::ChatTemplate::load({json, length}, &message);
    if (!chat_template) return fail(message, error);
    *out = new hetcomp_chat_template{std::move(chat_template)};
    return 0;
  });
}

void hetcomp_chat_template_free(hetcomp_chat_template* chat_template) { delete chat_template; }

int hetcomp_chat_template_render(const hetcomp_chat_template* chat_template, const char* context,
                                 size_t context_length, char** text, size_t* length, char** error) {
  return guarded(error, [&] {
    std::string message;
    const auto rendered = chat_template->chat_template->render({context, context_length}, &message);
    if (!rendered) return fail(message, error);
    return give_text(*rendered, text, length, error);
  });
}

void hetcomp_ids_free(int32_t* ids) { std::free(ids); }
void hetcomp_text_free(char* text) { std::free(text); }
