// A model's chat template, evaluated from the syntax tree that hetcomp/artifact/chat_template.py writes as
// `chat_template.hetc.json`. Same text as transformers' apply_chat_template, proven when a model is compiled.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace hetcomp {

struct ChatTemplateTree;

// render() is const and may be called from several threads at once. No exception leaves this class.
class ChatTemplate {
 public:
  // Returns null and sets *error (one sentence) if `json` is not a compiled chat template.
  static std::unique_ptr<ChatTemplate> load(std::string_view json, std::string* error);
  ~ChatTemplate();
  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // context_json: one JSON object with the template's variables, usually
  //   {"messages": [{"role": "user", "content": "..."}], "add_generation_prompt": true}
  // plus "tools", "documents", "enable_thinking" and so on. bos_token, eos_token and the other special tokens
  // are already known; tools and documents are null unless given, as in transformers. Returns nothing and
  // sets *error if the context is no JSON object or the template refuses the conversation.
  std::optional<std::string> render(std::string_view context_json, std::string* error) const;

 private:
  explicit ChatTemplate(std::unique_ptr<ChatTemplateTree> tree);
  std::unique_ptr<ChatTemplateTree> tree_;
};

}  // namespace hetcomp
