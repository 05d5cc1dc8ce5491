#include "template_tree.h"

#include <map>
#include <nlohmann/json.hpp>

namespace hetcomp {

namespace {

using Json = nlohmann::ordered_json;

NodeKind kind_of(const std::string& name) {
  static const std::map<std::string, NodeKind> kinds{
      {"Add", NodeKind::kAdd},
      {"And", NodeKind::kAnd},
      {"Assign", NodeKind::kAssign},
      {"AssignBlock", NodeKind::kAssignBlock},
      {"Break", NodeKind::kBreak},
      {"Call", NodeKind::kCall},
      {"CallBlock", NodeKind::kCallBlock},
      {"Compare", NodeKind::kCompare},
      {"Concat", NodeKind::kConcat},
      {"CondExpr", NodeKind::kCondExpr},
      {"Const", NodeKind::kConst},
      {"Continue", NodeKind::kContinue},
      {"Dict", NodeKind::kDict},
      {"Div", NodeKind::kDiv},
      {"FloorDiv", NodeKind::kFloorDiv},
      {"For", NodeKind::kFor},
      {"Filter", NodeKind::kFilter},
      {"Getattr", NodeKind::kGetattr},
      {"Getitem", NodeKind::kGetitem},
      {"If", NodeKind::kIf},
      {"List", NodeKind::kList},
      {"Macro", NodeKind::kMacro},
      {"Mod", NodeKind::kMod},
      {"Mul", NodeKind::kMul},
      {"Name", NodeKind::kName},
      {"Neg", NodeKind::kNeg},
      {"Not", NodeKind::kNot},
      {"NSRef", NodeKind::kNSRef},
      {"Or", NodeKind::kOr},
      {"Output", NodeKind::kOutput},
      {"Pos", NodeKind::kPos},
      {"Pow", NodeKind::kPow},
      {"Scope", NodeKind::kScope},
      {"Slice", NodeKind::kSlice},
      {"Sub", NodeKind::kSub},
      {"Template", NodeKind::kTemplate},
      {"Test", NodeKind::kTest},
      {"Tuple", NodeKind::kTuple},
  };
  const auto found = kinds.find(name);
  if (found == kinds.end()) throw TemplateError("unknown node '" + name + "'");
  return found->second;
}

// How many `parts` the evaluator relies on; a tree with fewer is refused here rather than checked at every
// step.
std::size_t parts_needed(NodeKind kind) {
  switch (kind) {
    case NodeKind::kSlice:
      return 3;
    case NodeKind::kAdd:
    case NodeKind::kAnd:
    case NodeKind::kAssign:
    case NodeKind::kCompare:
    case NodeKind::kCondExpr:
    case NodeKind::kDiv:
    case NodeKind::kFloorDiv:
    case NodeKind::kFor:
    case NodeKind::kGetitem:
    case NodeKind::kMod:
    case NodeKind::kMul:
    case NodeKind::kOr:
    case NodeKind::kPow:
    case NodeKind::kSub:
      return 2;
    case NodeKind::kAssignBlock:
    case NodeKind::kCall:
    case NodeKind::kCallBlock:
    case NodeKind::kFilter:
    case NodeKind::kGetattr:
    case NodeKind::kIf:
    case NodeKind::kNeg:
    case NodeKind::kNot:
    case NodeKind::kPos:
    case NodeKind::kTest:
      return 1;
    default:
      return 0;
  }
}

void check(const TemplateNode& node) {
  const auto fail = [](const char* what) {
    throw TemplateError(std::string("a node has the wrong ") + what);
  };
  if (node.parts.size() < parts_needed(node.kind)) fail("number of parts");
  if (node.kind == NodeKind::kDict && node.parts.size() % 2 != 0) fail("number of parts");
  if (node.kind == NodeKind::kCompare && node.names.size() + 1 != node.parts.size())
    fail("number of operators");
  if (node.kind == NodeKind::kMacro && node.parts.size() > node.names.size()) fail("number of defaults");
  if (node.kind == NodeKind::kNSRef && node.names.size() != 1) fail("number of names");
  if (node.kind == NodeKind::kCallBlock && (node.body.size() != 1 || node.body[0].kind != NodeKind::kMacro)) {
    fail("body");
  }
}

std::vector<TemplateNode> nodes_of(const Json& json, const char* field, int depth) {
  std::vector<TemplateNode> nodes;
  if (json.contains(field)) {
    for (const Json& child : json.at(field)) nodes.push_back(read_template_node(child, depth + 1));
  }
  return nodes;
}

}  // namespace

TemplateNode read_template_node(const Json& json, int depth) {
  if (depth > 200) throw TemplateError("the template is nested more than 200 levels deep");
  TemplateNode node;
  node.kind = kind_of(json.at("kind").get<std::string>());
  if (json.contains("name")) node.name = json.at("name").get<std::string>();
  if (json.contains("value")) node.value = Value::from_json(json.at("value"));
  if (json.contains("names")) node.names = json.at("names").get<std::vector<std::string>>();
  node.parts = nodes_of(json, "parts", depth);
  node.body = nodes_of(json, "body", depth);
  node.otherwise = nodes_of(json, "else", depth);
  if (json.contains("named")) {
    for (const auto& [key, child] : json.at("named").items()) {
      node.keywords.push_back(key);
      node.named.push_back(read_template_node(child, depth + 1));
    }
  }
  check(node);
  return node;
}

}  // namespace hetcomp
