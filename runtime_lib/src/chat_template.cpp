#include "chat_template.h"

#include <exception>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "template_tree.h"

namespace hetcomp {

namespace {

using Json = nlohmann::ordered_json;

// What transformers does to each message before the template sees it: keys without a value go, and reasoning,
// which callers pass under three names, is there under the two that templates read.
Json prepared_message(const Json& message) {
  if (!message.is_object()) throw TemplateError("a message is not an object with role and content");
  Json kept = Json::object();
  for (const auto& [key, value] : message.items()) {
    if (!value.is_null()) kept[key] = value;
  }
  for (const char* name : {"reasoning_content", "thinking", "reasoning"}) {
    if (!kept.contains(name)) continue;
    const Json reasoning = kept[name];
    Json aliased = Json::object();
    aliased["thinking"] = reasoning;
    for (const auto& [key, value] : kept.items()) aliased[key] = value;
    aliased["reasoning_content"] = reasoning;
    return aliased;
  }
  return kept;
}

Json prepared_messages(const Json& messages) {
  if (!messages.is_array() || messages.empty())
    throw TemplateError("messages is not a list of at least one message");
  Json out = Json::array();
  for (const Json& message : messages) out.push_back(prepared_message(message));
  return out;
}

}  // namespace

struct ChatTemplateTree {
  TemplateNode root;
  // Special tokens by their names in tokenizer_config.json (bos_token, ...).
  std::vector<std::pair<std::string, Value>> tokens;
};

ChatTemplate::ChatTemplate(std::unique_ptr<ChatTemplateTree> tree) : tree_(std::move(tree)) {}
ChatTemplate::~ChatTemplate() = default;

std::unique_ptr<ChatTemplate> ChatTemplate::load(std::string_view text, std::string* error) {
  try {
    const auto json = Json::parse(text);
    if (!json.is_object() || json.value("format", "") != "hetcomp-chat-template") {
      throw TemplateError("it is not a compiled chat template");
    }
    const int version = json.at("version").get<int>();
    if (version != 1) {
      throw TemplateError("its version is " + std::to_string(version) + " and this runtime reads version 1");
    }
    auto tree = std::make_unique<ChatTemplateTree>();
    tree->root = read_template_node(json.at("template"));
    if (tree->root.kind != NodeKind::kTemplate)
      throw TemplateError("its tree does not start with a template");
    for (const auto& [name, token] : json.at("tokens").items()) {
      tree->tokens.emplace_back(name, Value(token.get<std::string>()));
    }
    return std::unique_ptr<ChatTemplate>(new ChatTemplate(std::move(tree)));
  } catch (const std::exception& problem) {
    *error = std::string("The compiled chat template cannot be read: ") + problem.what() + ".";
    return nullptr;
  }
}

std::optional<std::string> ChatTemplate::render(std::string_view context_json, std::string* error) const {
  try {
    const auto context = Json::parse(context_json);
    if (!context.is_object()) {
      *error = "The chat template's variables are not a JSON object; give {\"messages\": [...], ...}.";
      return std::nullopt;
    }
    auto variables = tree_->tokens;
    const auto set = [&](const std::string& name, Value value) {
      std::erase_if(variables, [&](const auto& variable) { return variable.first == name; });
      variables.emplace_back(name, std::move(value));
    };
    // transformers always defines these
    for (const char* name : {"tools", "documents"}) set(name, Value());
    set("add_generation_prompt", Value(false));
    for (const auto& [name, value] : context.items()) {
      set(name, Value::from_json(name == "messages" ? prepared_messages(value) : value));
    }
    return render_template(tree_->root, std::move(variables));
  } catch (const nlohmann::json::exception& problem) {
    *error = std::string("The chat template's variables are not JSON: ") + problem.what() + ".";
  } catch (const std::exception& problem) {
    *error = std::string("The chat template refuses the conversation: ") + problem.what() + ".";
  }
  return std::nullopt;
}

}  // namespace hetcomp
