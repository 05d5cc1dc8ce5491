// What a template can call: methods of values, filters, tests and global functions.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "template_value.h"

namespace hetcomp {

struct CallArguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;

  // The argument at `index` or called `name`; null if it is not given.
  const Value* find(std::size_t index, std::string_view name) const;
  bool flag(std::size_t index, std::string_view name, bool otherwise) const;
  std::int64_t integer(std::size_t index, std::string_view name, std::int64_t otherwise) const;
  std::string text(std::size_t index, std::string_view name, const std::string& otherwise) const;
  const Value& required(std::size_t index, std::string_view name) const;
  // Throws TemplateError if more than `count` are given, so that nothing is silently ignored.
  void at_most(std::size_t count, std::string_view callee) const;
};

// Whether `object.name` is a method rather than an item.
bool has_method(const Value& object, const std::string& name);
Value call_method(const Value& object, const std::string& name, const CallArguments& arguments);

Value apply_filter(const std::string& name, const Value& value, const CallArguments& arguments);
bool apply_test(const std::string& name, const Value& value, const CallArguments& arguments);
Value call_builtin(const std::string& name, const CallArguments& arguments);
bool is_builtin(const std::string& name);

// `object.name` and `object[key]` as jinja2 resolves them; undefined if there is no such thing.
Value get_attribute(const Value& object, const std::string& name);
Value get_item(const Value& object, const Value& key);

}  // namespace hetcomp
