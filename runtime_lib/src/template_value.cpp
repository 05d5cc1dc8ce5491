#include "template_value.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "utf8.h"

namespace hetcomp {

namespace {

constexpr int kDeepestValue = 300;

// The depth of a container that holds `value`.
int depth_around(const Value& value) {
  int depth = 0;
  if (const auto* items = value.sequence()) depth = items->depth;
  if (const auto* dict = value.dict()) depth = dict->depth;
  if (depth >= kDeepestValue) throw TemplateError("lists or dicts are nested more than 300 levels deep");
  return depth + 1;
}

}  // namespace

const Value* Dict::find(const Value& key) const {
  for (const auto& [name, value] : items) {
    if (equal(name, key)) return &value;
  }
  return nullptr;
}

void Dict::set(const Value& key, Value value) {
  depth = std::max(depth, depth_around(value));
  for (auto& [name, old] : items) {
    if (equal(name, key)) {
      old = std::move(value);
      return;
    }
  }
  items.emplace_back(key, std::move(value));
}

Value Value::make_sequence(std::vector<Value> items, Sequence::Kind kind) {
  int depth = 1;
  for (const Value& item : items) depth = std::max(depth, depth_around(item));
  return Value(Data(std::make_shared<Sequence>(Sequence{kind, std::move(items), depth})));
}

Value Value::make_dict(std::vector<std::pair<Value, Value>> items) {
  int depth = 1;
  for (const auto& [key, item] : items) depth = std::max({depth, depth_around(key), depth_around(item)});
  return Value(Data(std::make_shared<Dict>(Dict{std::move(items), false, depth})));
}

Value Value::from_json(const nlohmann::ordered_json& json, int depth) {
  if (depth > 200) throw TemplateError("the JSON is nested more than 200 levels deep");
  switch (json.type()) {
    case nlohmann::ordered_json::value_t::boolean:
      return Value(json.get<bool>());
    case nlohmann::ordered_json::value_t::number_integer:
      return Value(json.get<std::int64_t>());
    case nlohmann::ordered_json::value_t::number_unsigned:
      if (json.get<std::uint64_t>() > INT64_MAX) throw TemplateError("an integer needs more than 64 bits");
      return Value(json.get<std::int64_t>());
    case nlohmann::ordered_json::value_t::number_float:
      return Value(json.get<double>());
    case nlohmann::ordered_json::value_t::string:
      return Value(json.get<std::string>());
    case nlohmann::ordered_json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const auto& item : json) items.push_back(from_json(item, depth + 1));
      return make_sequence(std::move(items));
    }
    case nlohmann::ordered_json::value_t::object: {
      std::vector<std::pair<Value, Value>> items;
      items.reserve(json.size());
      for (const auto& [key, item] : json.items()) items.emplace_back(Value(key), from_json(item, depth + 1));
      return make_dict(std::move(items));
    }
    default:
      return Value();
  }
}

const std::string* Value::text() const {
  const auto* shared = as<std::shared_ptr<const std::string>>();
  return shared ? shared->get() : nullptr;
}

Sequence* Value::sequence() const {
  const auto* shared = as<std::shared_ptr<Sequence>>();
  return shared ? shared->get() : nullptr;
}

Dict* Value::dict() const {
  const auto* shared = as<std::shared_ptr<Dict>>();
  return shared ? shared->get() : nullptr;
}

std::int64_t Value::integer() const {
  const auto* truth = as<bool>();
  return truth ? (*truth ? 1 : 0) : *as<std::int64_t>();
}

double Value::number() const {
  const auto* real = as<double>();
  return real ? *real : static_cast<double>(integer());
}

bool truthy(const Value& value) {
  if (value.is_none() || value.is_undefined()) return false;
  if (value.is_number()) return value.number() != 0;
  if (const auto* text = value.text()) return !text->empty();
  if (const auto* items = value.sequence()) {
    return items->kind == Sequence::Kind::kGenerator || !items->items.empty();
  }
  if (const auto* dict = value.dict()) return dict->is_namespace || !dict->items.empty();
  return true;
}

bool equal(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    return a.is_integer() && b.is_integer() ? a.integer() == b.integer() : a.number() == b.number();
  }
  if (a.data.index() != b.data.index()) return false;
  if (a.is_none() || a.is_undefined()) return true;
  if (const auto* text = a.text()) return *text == *b.text();
  if (const auto* left = a.sequence()) {
    const auto* right = b.sequence();
    return left == right || (left->kind == right->kind && left->kind != Sequence::Kind::kGenerator &&
                             std::equal(left->items.begin(), left->items.end(), right->items.begin(),
                                        right->items.end(), equal));
  }
  if (const auto* left = a.dict()) {
    const auto* right = b.dict();
    if (left == right) return true;
    if (left->is_namespace || right->is_namespace || left->items.size() != right->items.size()) return false;
    return std::all_of(left->items.begin(), left->items.end(), [&](const auto& item) {
      const Value* other = right->find(item.first);
      return other && equal(item.second, *other);
    });
  }
  return false;
}

int order(const Value& a, const Value& b) {
  if (a.is_number() && b.is_number()) {
    if (a.is_integer() && b.is_integer()) return a.integer() < b.integer() ? -1 : a.integer() > b.integer();
    return a.number() < b.number() ? -1 : a.number() > b.number();
  }
  // Byte order of UTF-8 is the order of code points.
  if (a.text() && b.text()) return a.text()->compare(*b.text());
  const auto* left = a.sequence();
  const auto* right = b.sequence();
  if (left && right && left->kind == right->kind && left->kind < Sequence::Kind::kView) {
    for (std::size_t i = 0; i < left->items.size() && i < right->items.size(); ++i) {
      if (!equal(left->items[i], right->items[i])) return order(left->items[i], right->items[i]);
    }
    return left->items.size() < right->items.size() ? -1 : left->items.size() > right->items.size();
  }
  throw TemplateError("'<' not supported between " + type_name(a) + " and " + type_name(b));
}

bool contains(const Value& container, const Value& item) {
  if (const auto* text = container.text()) {
    if (!item.text()) throw TemplateError("'in <string>' requires a string, not " + type_name(item));
    return text->find(*item.text()) != std::string::npos;
  }
  if (const auto* dict = container.dict(); dict && !dict->is_namespace) return dict->find(item) != nullptr;
  const std::vector<Value> items = iterate(container);
  return std::any_of(items.begin(), items.end(), [&](const Value& one) { return equal(one, item); });
}

bool is_iterable(const Value& value) {
  const auto* dict = value.dict();
  return value.is_undefined() || value.text() || value.sequence() || (dict && !dict->is_namespace);
}

std::vector<Value> iterate(const Value& value) {
  if (value.is_undefined()) return {};
  if (auto* items = value.sequence()) {
    return items->kind == Sequence::Kind::kGenerator ? std::exchange(items->items, {}) : items->items;
  }
  std::vector<Value> out;
  if (const auto* dict = value.dict(); dict && !dict->is_namespace) {
    for (const auto& [key, item] : dict->items) out.push_back(key);
    return out;
  }
  if (const auto* text = value.text()) {
    for (std::size_t at = 0; at < text->size();) {
      const std::size_t size = utf8_length(std::string_view(*text).substr(at));
      out.emplace_back(text->substr(at, size));
      at += size;
    }
    return out;
  }
  throw TemplateError(type_name(value) + " is not iterable");
}

std::int64_t length(const Value& value) {
  if (value.is_undefined()) return 0;
  if (const auto* text = value.text()) {
    return std::count_if(text->begin(), text->end(),
                         [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
  }
  if (const auto* items = value.sequence(); items && items->kind != Sequence::Kind::kGenerator) {
    return static_cast<std::int64_t>(items->items.size());
  }
  if (const auto* dict = value.dict(); dict && !dict->is_namespace) {
    return static_cast<std::int64_t>(dict->items.size());
  }
  throw TemplateError(type_name(value) + " has no length");
}

std::string type_name(const Value& value) {
  if (value.is_none()) return "None";
  if (const auto* missing = value.as<Undefined>()) return "an undefined value (" + missing->what + ")";
  if (value.as<bool>()) return "a bool";
  if (value.as<std::int64_t>()) return "an int";
  if (value.as<double>()) return "a float";
  if (value.text()) return "a string";
  if (const auto* items = value.sequence()) {
    static constexpr const char* kNames[] = {"a list", "a tuple", "a dict view", "a generator"};
    return kNames[static_cast<int>(items->kind)];
  }
  if (const auto* dict = value.dict()) return dict->is_namespace ? "a namespace" : "a dict";
  return "a function";
}

}  // namespace hetcomp
