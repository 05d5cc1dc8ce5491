/* C functions for a compiled tokenizer and chat template on their own, without a model. The compiler proves
 * parity with HF through them. Strings are UTF-8 with explicit lengths and may contain NUL bytes.
 *
 * Every function returns 0 on success. On failure it returns 1 and, if `error` is not NULL, sets *error to
 * one sentence that the caller frees with hetcomp_text_free. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifndef HETCOMP_EXPORT
#define HETCOMP_EXPORT __attribute__((visibility("default")))
#endif

typedef struct hetcomp_tokenizer hetcomp_tokenizer;
typedef struct hetcomp_chat_template hetcomp_chat_template;

HETCOMP_EXPORT int hetcomp_tokenizer_load(const char* json, size_t length, hetcomp_tokenizer** out,
                                          char** error);
HETCOMP_EXPORT void hetcomp_tokenizer_free(hetcomp_tokenizer* tokenizer);

/* *ids is an array of *count ids that the caller frees with hetcomp_ids_free. */
HETCOMP_EXPORT int hetcomp_tokenizer_encode(const hetcomp_tokenizer* tokenizer, const char* text,
                                            size_t length, int parse_special, int add_special, int32_t** ids,
                                            size_t* count, char** error);
/* *text has *length bytes (and a NUL after them); the caller frees it with hetcomp_text_free. */
HETCOMP_EXPORT int hetcomp_tokenizer_decode(const hetcomp_tokenizer* tokenizer, const int32_t* ids,
                                            size_t count, int skip_special, char** text, size_t* length,
                                            char** error);
/* As decode, but one id at a time through the streaming decoder; differs only in where it holds bytes back.
 */
HETCOMP_EXPORT int hetcomp_tokenizer_decode_stream(const hetcomp_tokenizer* tokenizer, const int32_t* ids,
                                                   size_t count, int skip_special, char** text,
                                                   size_t* length, char** error);

HETCOMP_EXPORT int hetcomp_chat_template_load(const char* json, size_t length, hetcomp_chat_template** out,
                                              char** error);
HETCOMP_EXPORT void hetcomp_chat_template_free(hetcomp_chat_template* chat_template);
/* context: a JSON object with messages, add_generation_prompt, tools, ... */
HETCOMP_EXPORT int hetcomp_chat_template_render(const hetcomp_chat_template* chat_template,
                                                const char* context, size_t context_length, char** text,
                                                size_t* length, char** error);

HETCOMP_EXPORT void hetcomp_ids_free(int32_t* ids);
HETCOMP_EXPORT void hetcomp_text_free(char* text);

#ifdef __cplusplus
}
#endif
