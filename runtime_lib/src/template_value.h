// Values of the chat template evaluator: what Python's would be, as far as templates can tell.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace hetcomp {

// The template refuses the conversation, or did something that Python or jinja2 refuse.
struct TemplateError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Value;
struct TemplateNode;
struct Frame;

// A list, or something else that is iterated; Python tells them apart in truth, length, indexing and
// printing.
struct Sequence {
  enum class Kind {
    kList,
    kTuple,
    kView,       // dict.keys() and its like: sized, not indexable
    kGenerator,  // map, select, ...: always true, no length, used up by iterating
  };
  Kind kind = Kind::kList;
  std::vector<Value> items;
  int depth = 1;  // levels of containers, this one included
};

struct Dict {
  // In order of insertion; templates' dictionaries are small, so lookup is linear.
  std::vector<std::pair<Value, Value>> items;
  bool is_namespace = false;
  int depth = 1;
  const Value* find(const Value& key) const;
  // Throws TemplateError where containers would nest too deeply.
  void set(const Value& key, Value value);
};

struct Undefined {
  std::string what;  // "'name' is undefined"
};
struct None {};

// The variable `loop`.
struct Loop {
  std::vector<Value> items;
  std::size_t index = 0;
  std::shared_ptr<Value> changed;  // last argument of loop.changed()
  int depth = 1;
};

struct Macro {
  const TemplateNode* node;
  Frame* closure;
};

struct Builtin {
  std::string name;
};

struct Method {
  std::shared_ptr<Value> object;
  std::string name;
};

class Value {
 public:
  using Data = std::variant<None, Undefined, bool, std::int64_t, double, std::shared_ptr<const std::string>,
                            std::shared_ptr<Sequence>, std::shared_ptr<Dict>, std::shared_ptr<Loop>, Macro,
                            Builtin, Method>;
  Value() : data(None{}) {}
  explicit Value(bool value) : data(value) {}
  explicit Value(std::int64_t value) : data(value) {}
  explicit Value(double value) : data(value) {}
  explicit Value(std::string text) : data(std::make_shared<const std::string>(std::move(text))) {}
  explicit Value(const char* text) : Value(std::string(text)) {}
  explicit Value(Data any) : data(std::move(any)) {}
  static Value undefined(std::string what) { return Value(Data(Undefined{std::move(what)})); }
  // Both throw TemplateError beyond 300 levels of nesting: printing, comparing and freeing a value recurse.
  static Value make_sequence(std::vector<Value> items, Sequence::Kind kind = Sequence::Kind::kList);
  static Value make_dict(std::vector<std::pair<Value, Value>> items = {});
  // Throws TemplateError beyond 200 levels of nesting or for integers above 64 bits.
  static Value from_json(const nlohmann::ordered_json& json, int depth = 0);

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&data);
  }
  const std::string* text() const;
  Sequence* sequence() const;
  Dict* dict() const;
  bool is_undefined() const { return as<Undefined>() != nullptr; }
  bool is_none() const { return as<None>() != nullptr; }
  // bool counts as a number in Python
  bool is_number() const { return as<bool>() || as<std::int64_t>() || as<double>(); }
  bool is_integer() const { return as<bool>() || as<std::int64_t>(); }
  std::int64_t integer() const;  // requires is_integer
  double number() const;         // requires is_number

  Data data;
};

bool truthy(const Value& value);
bool equal(const Value& a, const Value& b);
// <0, 0, >0; throws TemplateError if Python cannot order the two.
int order(const Value& a, const Value& b);
// Python's `item in container`.
bool contains(const Value& container, const Value& item);
// What a for loop sees. Uses up a generator. Throws TemplateError if not iterable.
std::vector<Value> iterate(const Value& value);
bool is_iterable(const Value& value);
std::int64_t length(const Value& value);

std::string type_name(const Value& value);
std::string to_text(const Value& value);  // str()
std::string to_repr(const Value& value);  // repr()

struct JsonStyle {
  bool ascii = false;
  int indent = -1;  // -1: one line
  std::string item_separator = ", ";
  std::string key_separator = ": ";
  bool sort_keys = false;
};
std::string to_json(const Value& value, const JsonStyle& style);

}  // namespace hetcomp
