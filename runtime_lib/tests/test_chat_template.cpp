// The chat template evaluator on hand-written trees. Equality with jinja2 is
// tests/unit/test_chat_template.py.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "chat_template.h"
#include "hetcomp/tokenizer_abi.h"

namespace hetcomp {
namespace {

// {% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt
// %}>{% endif %}
constexpr const char* kTree =
    R"({"format":"hetcomp-chat-template","version":1,"tokens":{"eos_token":"</s>"},"template":
  {"kind":"Template","body":[
    {"kind":"For","parts":[{"kind":"Name","name":"m"},{"kind":"Name","name":"messages"}],"body":[
      {"kind":"Output","parts":[{"kind":"Const","value":"<"},
        {"kind":"Getattr","name":"role","parts":[{"kind":"Name","name":"m"}]},{"kind":"Const","value":">"},
        {"kind":"Getattr","name":"content","parts":[{"kind":"Name","name":"m"}]},
        {"kind":"Name","name":"eos_token"}]}]},
    {"kind":"If","parts":[{"kind":"Name","name":"add_generation_prompt"}],"body":[
      {"kind":"Output","parts":[{"kind":"Const","value":">"}]}]}]}})";

std::unique_ptr<ChatTemplate> load(const char* tree) {
  std::string error;
  auto chat_template = ChatTemplate::load(tree, &error);
  EXPECT_TRUE(chat_template) << error;
  return chat_template;
}

TEST(ChatTemplate, RendersMessages) {
  const auto chat_template = load(kTree);
  std::string error;
  const std::string messages =
      R"("messages":[{"role":"user","content":"hé"},{"role":"assistant","content":""}])";
  EXPECT_EQ(chat_template->render("{" + messages + "}", &error), "<user>hé</s><assistant></s>");
  EXPECT_EQ(chat_template->render("{" + messages + R"(,"add_generation_prompt":true})", &error),
            "<user>hé</s><assistant></s>>");
  EXPECT_EQ(chat_template->render("{" + messages + R"(,"eos_token":"!"})", &error), "<user>hé!<assistant>!");
}

TEST(ChatTemplate, KeysWithoutAValueAreAbsent) {
  const auto chat_template = load(kTree);
  std::string error;
  EXPECT_EQ(chat_template->render(R"({"messages":[{"role":"user","content":null}]})", &error), "<user></s>");
}

TEST(ChatTemplate, RefusesWhatIsNoConversation) {
  const auto chat_template = load(kTree);
  for (const char* context :
       {"", "{", "[]", "1", "{\"messages\":[]}", "{\"messages\":{}}", "{\"messages\":[1]}"}) {
    std::string error;
    EXPECT_FALSE(chat_template->render(context, &error)) << context;
    EXPECT_TRUE(error.starts_with("The chat template")) << error;
  }
}

TEST(ChatTemplate, OneTreeServesManyThreads) {
  const auto chat_template = load(kTree);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&chat_template, i] {
      const std::string content(static_cast<std::size_t>(i) * 10, 'x');
      for (int round = 0; round < 200; ++round) {
        std::string error;
        const auto text =
            chat_template->render(R"({"messages":[{"role":"u","content":")" + content + R"("}]})", &error);
        EXPECT_EQ(text, "<u>" + content + "</s>");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(ChatTemplate, CInterfaceReportsErrors) {
  hetcomp_chat_template* handle = nullptr;
  char* error = nullptr;
  EXPECT_EQ(hetcomp_chat_template_load("{}", 2, &handle, &error), 1);
  EXPECT_STREQ(error, "The compiled chat template cannot be read: it is not a compiled chat template.");
  hetcomp_text_free(error);
  ASSERT_EQ(hetcomp_chat_template_load(kTree, std::string(kTree).size(), &handle, nullptr), 0);
  char* text = nullptr;
  size_t length = 0;
  EXPECT_EQ(hetcomp_chat_template_render(handle, "{}", 2, &text, &length, nullptr), 0);
  EXPECT_EQ(std::string(text, length), "");
  hetcomp_text_free(text);
  hetcomp_chat_template_free(handle);
}

}  // namespace
}  // namespace hetcomp
