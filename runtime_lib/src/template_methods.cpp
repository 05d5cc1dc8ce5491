// Attributes, items, methods and global functions of template values.
#include <algorithm>
#include <array>
#include <ctime>

#include "template_calls.h"
#include "template_text.h"

namespace hetcomp {

namespace {

constexpr std::array<std::string_view, 25> kTextMethods = {
    "strip",    "lstrip",  "rstrip",  "split",       "rsplit",  "splitlines", "startswith",
    "endswith", "upper",   "lower",   "replace",     "title",   "capitalize", "join",
    "find",     "rfind",   "index",   "count",       "isdigit", "isalpha",    "isalnum",
    "isspace",  "isupper", "islower", "removeprefix"};
constexpr std::array<std::string_view, 11> kDictMethods = {
    "items", "keys", "values", "get", "copy", "pop", "popitem", "clear", "update", "setdefault", "fromkeys"};
constexpr std::array<std::string_view, 2> kListMethods = {"index", "count"};
// range(n) beyond this is refused, as in jinja2's sandbox.
constexpr std::int64_t kMaxRange = 100000;

template <typename Names>
bool is_in(const Names& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

Value texts(std::vector<std::string> parts) {
  std::vector<Value> items;
  for (std::string& part : parts) items.emplace_back(std::move(part));
  return Value::make_sequence(std::move(items));
}

// startswith and endswith take one text or a tuple of them.
template <typename Matches>
Value any_affix(const Value& affix, Matches matches) {
  if (affix.text()) return Value(matches(*affix.text()));
  const auto* several = affix.sequence();
  if (!several || several->kind != Sequence::Kind::kTuple) {
    throw TemplateError("startswith and endswith take a string or a tuple, not " + type_name(affix));
  }
  return Value(std::any_of(several->items.begin(), several->items.end(),
                           [&](const Value& one) { return one.text() && matches(*one.text()); }));
}

const std::string& text_argument(const CallArguments& arguments, std::size_t index, std::string_view callee) {
  const Value& value = arguments.required(index, "");
  if (!value.text()) throw TemplateError(std::string(callee) + "() takes a string, not " + type_name(value));
  return *value.text();
}

std::string joined(const std::string& separator, const Value& values) {
  std::string out;
  bool first = true;
  for (const Value& item : iterate(values)) {
    if (!item.text()) throw TemplateError("join() takes strings, not " + type_name(item));
    if (!std::exchange(first, false)) out += separator;
    out += *item.text();
  }
  return out;
}

Value strip_method(const std::string& self, const std::string& name, const CallArguments& arguments) {
  arguments.at_most(1, name);
  std::optional<std::string> characters;
  if (const Value* given = arguments.find(0, "chars"); given && !given->is_none())
    characters = to_text(*given);
  const auto side = name == "strip"    ? text::Side::kBoth
                    : name == "lstrip" ? text::Side::kLeft
                                       : text::Side::kRight;
  return Value(text::strip(self, characters, side));
}

Value split_method(const std::string& self, const std::string& name, const CallArguments& arguments) {
  arguments.at_most(2, name);
  const Value* separator = arguments.find(0, "sep");
  if (separator && separator->text() && separator->text()->empty()) throw TemplateError("empty separator");
  const std::string by = separator && !separator->is_none() ? text_argument({{*separator}, {}}, 0, name) : "";
  return texts(text::split(self, by, arguments.integer(1, "maxsplit", -1), name == "rsplit"));
}

Value question(const std::string& self, const std::string& name) {
  if (name == "isdigit") return Value(text::is_digit(self));
  if (name == "isalpha") return Value(text::is_alpha(self));
  if (name == "isalnum") return Value(text::is_alnum(self));
  if (name == "isspace") return Value(text::is_space(self));
  if (name == "isupper") return Value(text::is_upper(self));
  return Value(text::is_lower(self));
}

Value text_method(const std::string& self, const std::string& name, const CallArguments& arguments) {
  if (name == "strip" || name == "lstrip" || name == "rstrip") return strip_method(self, name, arguments);
  if (name == "split" || name == "rsplit") return split_method(self, name, arguments);
  if (name == "splitlines") return texts(text::split_lines(self, arguments.flag(0, "keepends", false)));
  if (name == "replace") {
    arguments.at_most(3, name);
    return Value(text::replace(self, text_argument(arguments, 0, name), text_argument(arguments, 1, name),
                               arguments.integer(2, "count", -1)));
  }
  arguments.at_most(1, name);
  if (name == "startswith") {
    return any_affix(arguments.required(0, ""),
                     [&](const std::string& affix) { return self.starts_with(affix); });
  }
  if (name == "endswith") {
    return any_affix(arguments.required(0, ""),
                     [&](const std::string& affix) { return self.ends_with(affix); });
  }
  if (name == "join") return Value(joined(self, arguments.required(0, "")));
  if (name == "count") return Value(text::count(self, text_argument(arguments, 0, name)));
  if (name == "removeprefix") {
    const std::string& prefix = text_argument(arguments, 0, name);
    return Value(self.starts_with(prefix) ? self.substr(prefix.size()) : self);
  }
  if (name == "find" || name == "rfind" || name == "index") {
    const std::int64_t at = text::find(self, text_argument(arguments, 0, name), name == "rfind");
    if (at < 0 && name == "index") throw TemplateError("substring not found");
    return Value(at);
  }
  arguments.at_most(0, name);
  if (name == "upper") return Value(text::upper(self));
  if (name == "lower") return Value(text::lower(self));
  if (name == "title") return Value(text::title(self));
  if (name == "capitalize") return Value(text::capitalize(self));
  return question(self, name);
}

Value dict_method(const Dict& self, const std::string& name, const CallArguments& arguments) {
  if (name == "get") {
    arguments.at_most(2, name);
    if (const Value* found = self.find(arguments.required(0, "key"))) return *found;
    const Value* otherwise = arguments.find(1, "default");
    return otherwise ? *otherwise : Value();
  }
  arguments.at_most(0, name);
  if (name == "copy") return Value::make_dict(self.items);
  std::vector<Value> items;
  for (const auto& [key, value] : self.items) {
    if (name == "items") {
      items.push_back(Value::make_sequence({key, value}, Sequence::Kind::kTuple));
    } else if (name == "keys" || name == "values") {
      items.push_back(name == "keys" ? key : value);
    } else {
      throw TemplateError("." + name + "() would change a dict, which templates may not");
    }
  }
  return Value::make_sequence(std::move(items), Sequence::Kind::kView);
}

Value list_method(const Sequence& self, const std::string& name, const CallArguments& arguments) {
  arguments.at_most(1, name);
  const Value& wanted = arguments.required(0, "");
  const auto is_it = [&](const Value& item) { return equal(item, wanted); };
  if (name == "count") {
    return Value(static_cast<std::int64_t>(std::count_if(self.items.begin(), self.items.end(), is_it)));
  }
  const auto found = std::find_if(self.items.begin(), self.items.end(), is_it);
  if (found == self.items.end()) throw TemplateError("the value is not in the list");
  return Value(static_cast<std::int64_t>(found - self.items.begin()));
}

Value loop_attribute(const Loop& loop, const std::string& name) {
  const auto count = static_cast<std::int64_t>(loop.items.size());
  const auto index = static_cast<std::int64_t>(loop.index);
  if (name == "index") return Value(index + 1);
  if (name == "index0") return Value(index);
  if (name == "revindex") return Value(count - index);
  if (name == "revindex0") return Value(count - index - 1);
  if (name == "first") return Value(index == 0);
  if (name == "last") return Value(index + 1 == count);
  if (name == "length") return Value(count);
  if (name == "depth") return Value(std::int64_t{loop.depth});
  if (name == "depth0") return Value(std::int64_t{loop.depth - 1});
  if (name == "previtem" && index > 0) return loop.items[loop.index - 1];
  if (name == "nextitem" && index + 1 < count) return loop.items[loop.index + 1];
  if (name == "previtem") return Value::undefined("there is no previous item");
  if (name == "nextitem") return Value::undefined("there is no next item");
  return Value::undefined("loop has no attribute '" + name + "'");
}

Value loop_method(Loop& loop, const std::string& name, const CallArguments& arguments) {
  if (name == "cycle") {
    if (arguments.positional.empty()) throw TemplateError("no items for cycling given");
    return arguments.positional[loop.index % arguments.positional.size()];
  }
  Value now = Value::make_sequence(arguments.positional, Sequence::Kind::kTuple);
  const bool changed = !loop.changed || !equal(*loop.changed, now);
  loop.changed = std::make_shared<Value>(std::move(now));
  return Value(changed);
}

Value range_of(const CallArguments& arguments) {
  arguments.at_most(3, "range");
  const auto bound = [&](std::size_t index) {
    const Value& value = arguments.required(index, "");
    if (!value.is_integer()) throw TemplateError("range() takes integers, not " + type_name(value));
    return value.integer();
  };
  const bool one = arguments.positional.size() == 1;
  const std::int64_t start = one ? 0 : bound(0);
  const std::int64_t stop = one ? bound(0) : bound(1);
  const std::int64_t step = arguments.positional.size() == 3 ? bound(2) : 1;
  if (step == 0) throw TemplateError("range() arg 3 must not be zero");
  std::vector<Value> items;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    if (static_cast<std::int64_t>(items.size()) == kMaxRange)
      throw TemplateError("range() is longer than 100000");
    items.emplace_back(i);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  return Value::make_sequence(std::move(items));
}

Value dict_of(const CallArguments& arguments, bool is_namespace) {
  arguments.at_most(arguments.named.size() + 1, is_namespace ? "namespace" : "dict");
  auto dict = std::make_shared<Dict>();
  if (!arguments.positional.empty()) {
    const auto* from = arguments.positional[0].dict();
    if (!from)
      throw TemplateError("dict() and namespace() take a dict, not " + type_name(arguments.positional[0]));
    dict->items = from->items;
    dict->depth = from->depth;
  }
  for (const auto& [name, value] : arguments.named) dict->set(Value(name), value);
  dict->is_namespace = is_namespace;
  return Value(Value::Data(std::move(dict)));
}

Value now_text(const std::string& format) {
  const std::time_t now = std::time(nullptr);
  std::tm local{};
  localtime_r(&now, &local);
  std::string out(256 + format.size() * 16, '\0');
  out.resize(std::strftime(out.data(), out.size(), format.c_str(), &local));
  return Value(std::move(out));
}

}  // namespace

bool has_method(const Value& object, const std::string& name) {
  if (object.text()) return is_in(kTextMethods, name) || name == "removesuffix";
  if (const auto* dict = object.dict()) return !dict->is_namespace && is_in(kDictMethods, name);
  if (const auto* items = object.sequence())
    return items->kind < Sequence::Kind::kView && is_in(kListMethods, name);
  return object.as<std::shared_ptr<Loop>>() && (name == "cycle" || name == "changed");
}

Value call_method(const Value& object, const std::string& name, const CallArguments& arguments) {
  if (const auto* self = object.text()) {
    if (name != "removesuffix") return text_method(*self, name, arguments);
    const std::string& suffix = text_argument(arguments, 0, name);
    return Value(self->ends_with(suffix) ? self->substr(0, self->size() - suffix.size()) : *self);
  }
  if (const auto* dict = object.dict()) return dict_method(*dict, name, arguments);
  if (const auto* items = object.sequence()) return list_method(*items, name, arguments);
  return loop_method(**object.as<std::shared_ptr<Loop>>(), name, arguments);
}

Value get_attribute(const Value& object, const std::string& name) {
  if (const auto* missing = object.as<Undefined>()) throw TemplateError(missing->what);
  if (const auto* loop = object.as<std::shared_ptr<Loop>>(); loop && !has_method(object, name)) {
    return loop_attribute(**loop, name);
  }
  if (has_method(object, name)) return Value(Value::Data(Method{std::make_shared<Value>(object), name}));
  if (const auto* dict = object.dict()) {
    if (const Value* found = dict->find(Value(name))) return *found;
  }
  return Value::undefined(type_name(object) + " has no attribute '" + name + "'");
}

Value get_item(const Value& object, const Value& key) {
  if (const auto* missing = object.as<Undefined>()) throw TemplateError(missing->what);
  if (const auto* dict = object.dict(); dict && !dict->is_namespace) {
    if (const Value* found = dict->find(key)) return *found;
  }
  const auto* items = object.sequence();
  if (key.is_integer() && (object.text() || (items && items->kind < Sequence::Kind::kView))) {
    const std::int64_t count = length(object);
    const std::int64_t at = key.integer() < 0 ? key.integer() + count : key.integer();
    if (at >= 0 && at < count) {
      return items ? items->items[static_cast<std::size_t>(at)]
                   : Value(std::string(text::characters(*object.text())[static_cast<std::size_t>(at)]));
    }
  }
  if (key.text()) {
    // jinja2 tries the attribute when there is no such item
    if (!object.dict() || object.dict()->is_namespace || has_method(object, *key.text())) {
      return get_attribute(object, *key.text());
    }
    return Value::undefined("a dict has no item '" + *key.text() + "'");
  }
  return Value::undefined(type_name(object) + " has no such item");
}

bool is_builtin(const std::string& name) {
  return name == "range" || name == "namespace" || name == "dict" || name == "raise_exception" ||
         name == "strftime_now";
}

Value call_builtin(const std::string& name, const CallArguments& arguments) {
  if (name == "range") return range_of(arguments);
  if (name == "namespace") return dict_of(arguments, true);
  if (name == "dict") return dict_of(arguments, false);
  arguments.at_most(1, name);
  if (name == "strftime_now") return now_text(text_argument(arguments, 0, name));
  throw TemplateError(to_text(arguments.required(0, "message")));
}

const Value* CallArguments::find(std::size_t index, std::string_view name) const {
  if (index < positional.size()) return &positional[index];
  for (const auto& [key, value] : named) {
    if (key == name) return &value;
  }
  return nullptr;
}

bool CallArguments::flag(std::size_t index, std::string_view name, bool otherwise) const {
  const Value* value = find(index, name);
  return value ? truthy(*value) : otherwise;
}

std::int64_t CallArguments::integer(std::size_t index, std::string_view name, std::int64_t otherwise) const {
  const Value* value = find(index, name);
  if (!value || value->is_none()) return otherwise;
  if (!value->is_integer())
    throw TemplateError("argument '" + std::string(name) + "' is " + type_name(*value));
  return value->integer();
}

std::string CallArguments::text(std::size_t index, std::string_view name,
                                const std::string& otherwise) const {
  const Value* value = find(index, name);
  return value ? to_text(*value) : otherwise;
}

const Value& CallArguments::required(std::size_t index, std::string_view name) const {
  const Value* value = find(index, name);
  if (!value) throw TemplateError("an argument is missing in a call");
  return *value;
}

void CallArguments::at_most(std::size_t count, std::string_view callee) const {
  if (positional.size() + named.size() > count) {
    throw TemplateError(std::string(callee) + "() is given more than " + std::to_string(count) +
                        " arguments");
  }
}

}  // namespace hetcomp
