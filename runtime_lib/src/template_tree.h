// The syntax tree of a chat template as hetcomp/artifact/chat_template.py writes it, and its evaluation.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

#include "template_value.h"

namespace hetcomp {

enum class NodeKind {
  kAdd,
  kAnd,
  kAssign,
  kAssignBlock,
  kBreak,
  kCall,
  kCallBlock,
  kCompare,
  kConcat,
  kCondExpr,
  kConst,
  kContinue,
  kDict,
  kDiv,
  kFloorDiv,
  kFor,
  kFilter,
  kGetattr,
  kGetitem,
  kIf,
  kList,
  kMacro,
  kMod,
  kMul,
  kName,
  kNeg,
  kNot,
  kNSRef,
  kOr,
  kOutput,
  kPos,
  kPow,
  kScope,
  kSlice,
  kSub,
  kTemplate,
  kTest,
  kTuple,
};

// What the fields hold for each kind is listed in chat_template.py.
struct TemplateNode {
  NodeKind kind = NodeKind::kConst;
  std::string name;
  Value value;
  std::vector<std::string> names;
  std::vector<TemplateNode> parts;
  std::vector<TemplateNode> body;
  std::vector<TemplateNode> otherwise;
  // keyword arguments: the value of keywords[i] is named[i]
  std::vector<std::string> keywords;
  std::vector<TemplateNode> named;
};

// Throws TemplateError or nlohmann::json::exception.
TemplateNode read_template_node(const nlohmann::ordered_json& json, int depth = 0);

// Renders the tree with these global variables. Throws TemplateError.
std::string render_template(const TemplateNode& root, std::vector<std::pair<std::string, Value>> variables);

}  // namespace hetcomp
