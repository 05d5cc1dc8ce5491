// Walks the syntax tree of a chat template with jinja2's scoping rules.
#include <algorithm>
#include <deque>
#include <optional>

#include "template_arithmetic.h"
#include "template_calls.h"
#include "template_tree.h"

namespace hetcomp {

// One scope of variables: the template's own, one for each round of a loop, one for each call of a macro.
struct Frame {
  Frame* parent = nullptr;
  std::vector<std::pair<std::string, Value>> variables;

  Value* find(const std::string& name) {
    for (auto& [key, value] : variables) {
      if (key == name) return &value;
    }
    return nullptr;
  }

  void set(const std::string& name, Value value) {
    if (Value* old = find(name)) {
      *old = std::move(value);
    } else {
      variables.emplace_back(name, std::move(value));
    }
  }
};

namespace {

// Bounds macros that call each other and trees nested in trees, well before the stack of a thread (8 MB)
// ends: with the address sanitizer a level takes about 6 KB.
constexpr int kDeepest = 600;

class Evaluator {
 public:
  explicit Evaluator(std::vector<std::pair<std::string, Value>> variables) {
    frames_.push_back(Frame{nullptr, std::move(variables)});
    frame_ = &frames_.back();
  }

  std::string run_template(const TemplateNode& root) {
    run(root.body);
    return std::move(out_);
  }

 private:
  enum class Flow { kOn, kBreak, kContinue };

  class Deeper {
   public:
    explicit Deeper(int* depth) : depth_(depth) {
      if (++*depth_ > kDeepest) {
        --*depth_;
        throw TemplateError("it calls itself too deeply");
      }
    }
    ~Deeper() { --*depth_; }
    Deeper(const Deeper&) = delete;
    Deeper& operator=(const Deeper&) = delete;

   private:
    int* depth_;
  };

  // Runs `body` in a fresh scope below `parent`. Scopes live until the end: a macro defined in one may still
  // be called.
  template <typename Body>
  auto in_frame(Frame* parent, Body body) {
    Frame* const before = frame_;
    frames_.push_back(Frame{parent, {}});
    frame_ = &frames_.back();
    struct Restore {
      Frame** frame;
      Frame* before;
      ~Restore() { *frame = before; }
    } restore{&frame_, before};
    return body();
  }

  // Runs `body` with its output caught.
  template <typename Body>
  std::string captured(Body body) {
    std::string before = std::exchange(out_, {});
    body();
    return std::exchange(out_, std::move(before));
  }

  Flow run(const std::vector<TemplateNode>& nodes) {
    const Deeper deeper(&depth_);
    for (const TemplateNode& node : nodes) {
      const Flow flow = run(node);
      if (flow != Flow::kOn) return flow;
    }
    return Flow::kOn;
  }

  Flow run(const TemplateNode& node) {
    switch (node.kind) {
      case NodeKind::kOutput:
        for (const TemplateNode& part : node.parts) out_ += to_text(evaluate(part));
        return Flow::kOn;
      case NodeKind::kIf:
        return run(truthy(evaluate(node.parts[0])) ? node.body : node.otherwise);
      case NodeKind::kFor:
        return run_for(node);
      case NodeKind::kAssign:
        assign(node.parts[0], evaluate(node.parts[1]));
        return Flow::kOn;
      case NodeKind::kAssignBlock: {
        std::string text = captured([&] { in_frame(frame_, [&] { run(node.body); }); });
        assign(node.parts[0], Value(std::move(text)));
        return Flow::kOn;
      }
      case NodeKind::kMacro:
        frame_->set(node.name, Value(Value::Data(Macro{&node, frame_})));
        return Flow::kOn;
      case NodeKind::kCallBlock: {
        const Value caller(Value::Data(Macro{&node.body[0], frame_}));
        out_ += to_text(call(node.parts[0], &caller));
        return Flow::kOn;
      }
      case NodeKind::kScope:
        return in_frame(frame_, [&] { return run(node.body); });
      case NodeKind::kBreak:
        return Flow::kBreak;
      case NodeKind::kContinue:
        return Flow::kContinue;
      default:
        throw TemplateError("a node stands where it cannot");
    }
  }

  Flow run_for(const TemplateNode& node) {
    auto loop = std::make_shared<Loop>();
    for (Value& item : iterate(evaluate(node.parts[1]))) {
      const bool wanted = node.parts.size() < 3 || in_frame(
                                                       frame_,
                                                       [&] {
                                                         assign(node.parts[0], item);
                                                         return truthy(evaluate(node.parts[2]));
                                                       });
      if (wanted) loop->items.push_back(std::move(item));
    }
    if (loop->items.empty()) {
      return in_frame(frame_, [&] { return run(node.otherwise); });
    }
    const Value variable(Value::Data{loop});
    for (; loop->index < loop->items.size(); ++loop->index) {
      const Flow flow = in_frame(frame_, [&] {
        frame_->set("loop", variable);
        assign(node.parts[0], loop->items[loop->index]);
        return run(node.body);
      });
      if (flow == Flow::kBreak) break;
    }
    return Flow::kOn;
  }

  void assign(const TemplateNode& target, Value value) {
    if (target.kind == NodeKind::kName) {
      frame_->set(target.name, std::move(value));
    } else if (target.kind == NodeKind::kNSRef) {
      const Value object = lookup(target.name);
      if (!object.dict() || !object.dict()->is_namespace) {
        throw TemplateError("'" + target.name + "' is not a namespace, so its attributes cannot be set");
      }
      object.dict()->set(Value(target.names[0]), std::move(value));
    } else if (target.kind == NodeKind::kTuple) {
      std::vector<Value> items = iterate(value);
      if (items.size() != target.parts.size()) {
        throw TemplateError(std::to_string(items.size()) + " values are unpacked into " +
                            std::to_string(target.parts.size()) + " names");
      }
      for (std::size_t i = 0; i < items.size(); ++i) assign(target.parts[i], std::move(items[i]));
    } else {
      throw TemplateError("an assignment has no name");
    }
  }

  Value lookup(const std::string& name) {
    for (Frame* frame = frame_; frame; frame = frame->parent) {
      if (const Value* found = frame->find(name)) return *found;
    }
    if (is_builtin(name)) return Value(Value::Data(Builtin{name}));
    return Value::undefined("'" + name + "' is undefined");
  }

  std::vector<Value> evaluate_all(const std::vector<TemplateNode>& nodes, std::size_t from = 0) {
    std::vector<Value> values;
    for (std::size_t i = from; i < nodes.size(); ++i) values.push_back(evaluate(nodes[i]));
    return values;
  }

  CallArguments arguments_of(const TemplateNode& node) {
    CallArguments arguments{evaluate_all(node.parts, 1), {}};
    for (std::size_t i = 0; i < node.named.size(); ++i) {
      arguments.named.emplace_back(node.keywords[i], evaluate(node.named[i]));
    }
    return arguments;
  }

  Value evaluate(const TemplateNode& node) {
    const Deeper deeper(&depth_);
    const auto& parts = node.parts;
    switch (node.kind) {
      case NodeKind::kConst:
        return node.value;
      case NodeKind::kName:
        return lookup(node.name);
      case NodeKind::kTuple:
        return Value::make_sequence(evaluate_all(parts), Sequence::Kind::kTuple);
      case NodeKind::kList:
        return Value::make_sequence(evaluate_all(parts));
      case NodeKind::kDict:
        return dict_of(parts);
      case NodeKind::kCondExpr:
        return conditional(parts);
      case NodeKind::kAnd: {
        Value left = evaluate(parts[0]);
        return truthy(left) ? evaluate(parts[1]) : left;
      }
      case NodeKind::kOr: {
        Value left = evaluate(parts[0]);
        return truthy(left) ? left : evaluate(parts[1]);
      }
      case NodeKind::kNot:
        return Value(!truthy(evaluate(parts[0])));
      case NodeKind::kNeg:
        return arithmetic(NodeKind::kMul, Value(std::int64_t{-1}), number_of(parts[0]));
      case NodeKind::kPos:
        return number_of(parts[0]);
      case NodeKind::kCompare:
        return Value(compare(node));
      case NodeKind::kConcat: {
        std::string text;
        for (const TemplateNode& part : parts) text += to_text(evaluate(part));
        return Value(std::move(text));
      }
      case NodeKind::kGetattr:
        return get_attribute(evaluate(parts[0]), node.name);
      case NodeKind::kGetitem:
        return item_of(parts);
      case NodeKind::kFilter: {
        const Value value = evaluate(parts[0]);
        return apply_filter(node.name, value, arguments_of(node));
      }
      case NodeKind::kTest: {
        const Value value = evaluate(parts[0]);
        return Value(apply_test(node.name, value, arguments_of(node)));
      }
      case NodeKind::kCall:
        return call(node, nullptr);
      default:
        return operation(node);
    }
  }

  // The operand of a sign; a bool becomes an int.
  Value number_of(const TemplateNode& node) {
    const Value value = evaluate(node);
    if (const auto* missing = value.as<Undefined>()) throw TemplateError(missing->what);
    if (!value.is_number()) throw TemplateError("a sign stands before " + type_name(value));
    return value.is_integer() ? Value(value.integer()) : value;
  }

  Value operation(const TemplateNode& node) {
    if (node.parts.size() != 2) throw TemplateError("a node stands where it cannot");
    const Value left = evaluate(node.parts[0]);
    return arithmetic(node.kind, left, evaluate(node.parts[1]));
  }

  Value dict_of(const std::vector<TemplateNode>& parts) {
    Value made = Value::make_dict();
    for (std::size_t i = 0; i < parts.size(); i += 2) {
      const Value key = evaluate(parts[i]);
      made.dict()->set(key, evaluate(parts[i + 1]));
    }
    return made;
  }

  Value conditional(const std::vector<TemplateNode>& parts) {
    if (truthy(evaluate(parts[0]))) return evaluate(parts[1]);
    return parts.size() > 2 ? evaluate(parts[2]) : Value::undefined("an inline if without else is false");
  }

  Value item_of(const std::vector<TemplateNode>& parts) {
    const Value object = evaluate(parts[0]);
    if (parts[1].kind != NodeKind::kSlice) return get_item(object, evaluate(parts[1]));
    const auto& bounds = parts[1].parts;
    const Value start = evaluate(bounds[0]);
    const Value stop = evaluate(bounds[1]);
    return slice(object, start, stop, evaluate(bounds[2]));
  }

  bool compare(const TemplateNode& node) {
    Value left = evaluate(node.parts[0]);
    for (std::size_t i = 0; i < node.names.size(); ++i) {
      Value right = evaluate(node.parts[i + 1]);
      if (!holds(node.names[i], left, right)) return false;
      left = std::move(right);
    }
    return true;
  }

  static bool holds(const std::string& sign, const Value& left, const Value& right) {
    if (sign == "eq") return equal(left, right);
    if (sign == "ne") return !equal(left, right);
    if (sign == "in") return contains(right, left);
    if (sign == "notin") return !contains(right, left);
    for (const Value* side : {&left, &right}) {
      if (const auto* missing = side->as<Undefined>()) throw TemplateError(missing->what);
    }
    const int compared = order(left, right);
    if (sign == "lt") return compared < 0;
    if (sign == "lteq") return compared <= 0;
    if (sign == "gt") return compared > 0;
    if (sign == "gteq") return compared >= 0;
    throw TemplateError("unknown comparison '" + sign + "'");
  }

  Value call(const TemplateNode& node, const Value* caller) {
    if (node.kind != NodeKind::kCall) throw TemplateError("a call block calls nothing");
    const Value callee = evaluate(node.parts[0]);
    CallArguments arguments = arguments_of(node);
    if (const auto* macro = callee.as<Macro>()) return call_macro(*macro, std::move(arguments), caller);
    if (caller) throw TemplateError("a call block calls something that is not a macro");
    if (const auto* builtin = callee.as<Builtin>()) return call_builtin(builtin->name, arguments);
    if (const auto* method = callee.as<Method>())
      return call_method(*method->object, method->name, arguments);
    if (const auto* missing = callee.as<Undefined>()) throw TemplateError(missing->what);
    throw TemplateError(type_name(callee) + " cannot be called");
  }

  Value call_macro(const Macro& macro, CallArguments arguments, const Value* caller) {
    const TemplateNode& node = *macro.node;
    const std::size_t count = node.names.size();
    if (arguments.positional.size() > count) {
      throw TemplateError("macro '" + node.name + "' takes not more than " + std::to_string(count) +
                          " arguments");
    }
    std::vector<std::optional<Value>> given(count);
    for (std::size_t i = 0; i < arguments.positional.size(); ++i)
      given[i] = std::move(arguments.positional[i]);
    for (auto& [name, value] : arguments.named) {
      const auto at = static_cast<std::size_t>(std::find(node.names.begin(), node.names.end(), name) -
                                               node.names.begin());
      if (at == count) throw TemplateError("macro '" + node.name + "' takes no argument '" + name + "'");
      if (given[at]) throw TemplateError("macro '" + node.name + "' gets argument '" + name + "' twice");
      given[at] = std::move(value);
    }
    return Value(captured([&] {
      in_frame(macro.closure, [&] {
        if (caller) frame_->set("caller", *caller);
        bind(node, given);
        run(node.body);
      });
    }));
  }

  // Defaults belong to the last arguments and see the arguments before them.
  void bind(const TemplateNode& node, std::vector<std::optional<Value>>& given) {
    const std::size_t first_default = node.names.size() - node.parts.size();
    for (std::size_t i = 0; i < node.names.size(); ++i) {
      if (given[i]) {
        frame_->set(node.names[i], std::move(*given[i]));
      } else if (i >= first_default) {
        frame_->set(node.names[i], evaluate(node.parts[i - first_default]));
      } else {
        frame_->set(node.names[i], Value::undefined("parameter '" + node.names[i] + "' was not provided"));
      }
    }
  }

  std::deque<Frame> frames_;  // a deque, so that frames stay where they are
  Frame* frame_ = nullptr;
  std::string out_;
  int depth_ = 0;
};

}  // namespace

std::string render_template(const TemplateNode& root, std::vector<std::pair<std::string, Value>> variables) {
  return Evaluator(std::move(variables)).run_template(root);
}

}  // namespace hetcomp
