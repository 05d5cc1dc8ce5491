// jinja2's tests: what stands behind `is`.
#include <functional>
#include <map>

#include "template_calls.h"
#include "template_text.h"

namespace hetcomp {

namespace {

using Test = std::function<bool(const Value&, const CallArguments&)>;

std::int64_t whole(const Value& value) {
  if (!value.is_integer()) throw TemplateError("a test takes an integer, not " + type_name(value));
  return value.integer();
}

Test ordering(bool (*holds)(int)) {
  return
      [holds](const Value& value, const CallArguments& a) { return holds(order(value, a.required(0, ""))); };
}

bool is_sized_and_indexed(const Value& value) {
  const auto* items = value.sequence();
  return value.text() || value.is_undefined() || (value.dict() && !value.dict()->is_namespace) ||
         (items && items->kind < Sequence::Kind::kView);
}

bool same_as(const Value& a, const Value& b) {
  if (a.data.index() != b.data.index()) return false;
  if (a.sequence()) return a.sequence() == b.sequence();
  if (a.dict()) return a.dict() == b.dict();
  return equal(a, b);
}

const std::map<std::string, Test>& tests() {
  using A = CallArguments;
  static const std::map<std::string, Test> table = [] {
    std::map<std::string, Test> all{
        {"boolean", [](const Value& v, const A&) { return v.as<bool>() != nullptr; }},
        {"callable",
         [](const Value& v, const A&) { return v.as<Macro>() || v.as<Builtin>() || v.as<Method>(); }},
        {"defined", [](const Value& v, const A&) { return !v.is_undefined(); }},
        {"divisibleby",
         [](const Value& v, const A& a) {
           const std::int64_t by = whole(a.required(0, "num"));
           if (by == 0) throw TemplateError("division by zero");
           return by == -1 || whole(v) % by == 0;
         }},
        {"eq", [](const Value& v, const A& a) { return equal(v, a.required(0, "")); }},
        {"even", [](const Value& v, const A&) { return whole(v) % 2 == 0; }},
        {"false", [](const Value& v, const A&) { return v.as<bool>() && !*v.as<bool>(); }},
        {"float", [](const Value& v, const A&) { return v.as<double>() != nullptr; }},
        {"in", [](const Value& v, const A& a) { return contains(a.required(0, ""), v); }},
        {"integer", [](const Value& v, const A&) { return v.as<std::int64_t>() != nullptr; }},
        {"iterable", [](const Value& v, const A&) { return is_iterable(v); }},
        {"lower", [](const Value& v, const A&) { return text::is_lower(to_text(v)); }},
        {"mapping", [](const Value& v, const A&) { return v.dict() && !v.dict()->is_namespace; }},
        {"ne", [](const Value& v, const A& a) { return !equal(v, a.required(0, "")); }},
        {"none", [](const Value& v, const A&) { return v.is_none(); }},
        {"number", [](const Value& v, const A&) { return v.is_number(); }},
        {"odd", [](const Value& v, const A&) { return whole(v) % 2 != 0; }},
        {"sameas", [](const Value& v, const A& a) { return same_as(v, a.required(0, "")); }},
        {"sequence", [](const Value& v, const A&) { return is_sized_and_indexed(v); }},
        {"string", [](const Value& v, const A&) { return v.text() != nullptr; }},
        {"true", [](const Value& v, const A&) { return v.as<bool>() && *v.as<bool>(); }},
        {"undefined", [](const Value& v, const A&) { return v.is_undefined(); }},
        {"upper", [](const Value& v, const A&) { return text::is_upper(to_text(v)); }},
        {"lt", ordering([](int c) { return c < 0; })},
        {"le", ordering([](int c) { return c <= 0; })},
        {"gt", ordering([](int c) { return c > 0; })},
        {"ge", ordering([](int c) { return c >= 0; })},
    };
    all["=="] = all["equalto"] = all["eq"];
    all["!="] = all["ne"];
    all["<"] = all["lessthan"] = all["lt"];
    all["<="] = all["le"];
    all[">"] = all["greaterthan"] = all["gt"];
    all[">="] = all["ge"];
    return all;
  }();
  return table;
}

}  // namespace

bool apply_test(const std::string& name, const Value& value, const CallArguments& arguments) {
  const auto found = tests().find(name);
  if (found == tests().end()) throw TemplateError("there is no test '" + name + "'");
  return found->second(value, arguments);
}

}  // namespace hetcomp
