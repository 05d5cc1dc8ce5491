// jinja2's filters, and tojson as transformers defines it.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <functional>
#include <map>

#include "template_calls.h"
#include "template_text.h"

namespace hetcomp {

namespace {

using Filter = std::function<Value(const Value&, const CallArguments&)>;

Value generator(std::vector<Value> items) {
  return Value::make_sequence(std::move(items), Sequence::Kind::kGenerator);
}

// "a.b.0" as map and selectattr take it.
Value attribute_path(Value value, const Value& path, const Value* otherwise) {
  std::vector<std::string> parts;
  if (path.text()) {
    parts = text::split(*path.text(), ".", -1, false);
  } else {
    parts = {to_text(path)};
  }
  for (const std::string& part : parts) {
    std::int64_t index = 0;
    const auto end = std::from_chars(part.data(), part.data() + part.size(), index);
    const bool is_index = !part.empty() && end.ec == std::errc() && end.ptr == part.data() + part.size();
    value = get_item(value, is_index ? Value(index) : Value(part));
    if (otherwise && value.is_undefined()) value = *otherwise;
  }
  return value;
}

CallArguments rest(const CallArguments& arguments, std::size_t from) {
  CallArguments out;
  for (std::size_t i = from; i < arguments.positional.size(); ++i)
    out.positional.push_back(arguments.positional[i]);
  out.named = arguments.named;
  return out;
}

std::string name_argument(const CallArguments& arguments, std::size_t index, const char* what) {
  const Value* name = arguments.find(index, "");
  if (!name || !name->text()) throw TemplateError(std::string("the name of a ") + what + " is missing");
  return *name->text();
}

Value map_filter(const Value& value, const CallArguments& arguments) {
  std::vector<Value> out;
  if (const Value* attribute = arguments.positional.empty() ? arguments.find(0, "attribute") : nullptr) {
    const Value* otherwise = arguments.find(1, "default");
    for (const Value& item : iterate(value)) out.push_back(attribute_path(item, *attribute, otherwise));
  } else {
    const std::string filter = name_argument(arguments, 0, "filter");
    const CallArguments inner = rest(arguments, 1);
    for (const Value& item : iterate(value)) out.push_back(apply_filter(filter, item, inner));
  }
  return generator(std::move(out));
}

Value select_filter(const Value& value, const CallArguments& arguments, bool by_attribute, bool keep) {
  const std::size_t test_at = by_attribute ? 1 : 0;
  const bool has_test = arguments.positional.size() > test_at;
  const CallArguments inner = has_test ? rest(arguments, test_at + 1) : CallArguments();
  std::vector<Value> out;
  for (const Value& item : iterate(value)) {
    const Value subject = by_attribute ? attribute_path(item, arguments.required(0, ""), nullptr) : item;
    const bool passes =
        has_test ? apply_test(name_argument(arguments, test_at, "test"), subject, inner) : truthy(subject);
    if (passes == keep) out.push_back(item);
  }
  return generator(std::move(out));
}

Value tojson_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(4, "tojson");
  JsonStyle style;
  style.ascii = arguments.flag(0, "ensure_ascii", false);
  const Value* indent = arguments.find(1, "indent");
  if (indent && !indent->is_none()) {
    style.indent = static_cast<int>(std::clamp<std::int64_t>(arguments.integer(1, "indent", 0), 0, 64));
    style.item_separator = ",";
  }
  const Value* separators = arguments.find(2, "separators");
  if (separators && !separators->is_none()) {
    const std::vector<Value> pair = iterate(*separators);
    if (pair.size() != 2) throw TemplateError("tojson's separators are not a pair");
    style.item_separator = to_text(pair[0]);
    style.key_separator = to_text(pair[1]);
  }
  style.sort_keys = arguments.flag(3, "sort_keys", false);
  return Value(to_json(value, style));
}

Value default_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(2, "default");
  const bool replace = value.is_undefined() || (arguments.flag(1, "boolean", false) && !truthy(value));
  if (!replace) return value;
  const Value* otherwise = arguments.find(0, "default_value");
  return otherwise ? *otherwise : Value("");
}

Value join_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(2, "join");
  const std::string separator = arguments.text(0, "d", "");
  const Value* attribute = arguments.find(1, "attribute");
  std::string out;
  bool first = true;
  for (const Value& item : iterate(value)) {
    if (!std::exchange(first, false)) out += separator;
    out += to_text(attribute ? attribute_path(item, *attribute, nullptr) : item);
  }
  return Value(std::move(out));
}

Value first_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(0, "first");
  auto* items = value.sequence();
  if (items && items->kind == Sequence::Kind::kGenerator && !items->items.empty()) {
    Value head = items->items.front();
    items->items.erase(items->items.begin());
    return head;
  }
  const std::vector<Value> all = iterate(value);
  return all.empty() ? Value::undefined("there is no first item in an empty sequence") : all.front();
}

Value last_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(0, "last");
  const auto* items = value.sequence();
  if (items && items->kind == Sequence::Kind::kGenerator) throw TemplateError("a generator has no last item");
  const std::vector<Value> all = iterate(value);
  return all.empty() ? Value::undefined("there is no last item in an empty sequence") : all.back();
}

Value reverse_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(0, "reverse");
  std::vector<Value> items = iterate(value);
  std::reverse(items.begin(), items.end());
  if (!value.text()) return generator(std::move(items));
  std::string out;
  for (const Value& item : items) out += *item.text();
  return Value(std::move(out));
}

Value indent_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(3, "indent");
  const Value* width = arguments.find(0, "width");
  const std::string margin =
      width && width->text()
          ? *width->text()
          : std::string(
                static_cast<std::size_t>(std::clamp<std::int64_t>(arguments.integer(0, "width", 4), 0, 4096)),
                ' ');
  const bool blank = arguments.flag(2, "blank", false);
  std::string out;
  const std::vector<std::string> lines = text::split_lines(to_text(value) + "\n", false);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += "\n" + (blank || !lines[i].empty() ? margin : "");
    out += lines[i];
  }
  return Value(arguments.flag(1, "first", false) ? margin + out : out);
}

// What jinja2 sorts and compares by: text without regard to case unless asked.
Value sort_key(const Value& value, bool case_sensitive) {
  return value.text() && !case_sensitive ? Value(text::lower(*value.text())) : value;
}

void sort_values(std::vector<Value>* items, bool reverse, const std::function<Value(const Value&)>& key) {
  std::stable_sort(items->begin(), items->end(), [&](const Value& a, const Value& b) {
    return reverse ? order(key(b), key(a)) < 0 : order(key(a), key(b)) < 0;
  });
}

Value sort_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(3, "sort");
  std::vector<Value> items = iterate(value);
  const bool case_sensitive = arguments.flag(1, "case_sensitive", false);
  const Value* attribute = arguments.find(2, "attribute");
  sort_values(&items, arguments.flag(0, "reverse", false), [&](const Value& item) {
    return sort_key(attribute ? attribute_path(item, *attribute, nullptr) : item, case_sensitive);
  });
  return Value::make_sequence(std::move(items));
}

Value dictsort_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(3, "dictsort");
  const auto* dict = value.dict();
  if (!dict || dict->is_namespace) throw TemplateError("dictsort takes a dict, not " + type_name(value));
  const bool case_sensitive = arguments.flag(0, "case_sensitive", false);
  const std::size_t by = arguments.text(1, "by", "key") == "value" ? 1 : 0;
  std::vector<Value> items;
  for (const auto& [key, item] : dict->items) {
    items.push_back(Value::make_sequence({key, item}, Sequence::Kind::kTuple));
  }
  sort_values(&items, arguments.flag(2, "reverse", false),
              [&](const Value& item) { return sort_key(item.sequence()->items[by], case_sensitive); });
  return Value::make_sequence(std::move(items));
}

Value unique_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(2, "unique");
  const bool case_sensitive = arguments.flag(0, "case_sensitive", false);
  const Value* attribute = arguments.find(1, "attribute");
  std::vector<Value> seen;
  std::vector<Value> out;
  for (const Value& item : iterate(value)) {
    Value key = sort_key(attribute ? attribute_path(item, *attribute, nullptr) : item, case_sensitive);
    if (std::any_of(seen.begin(), seen.end(), [&](const Value& old) { return equal(old, key); })) continue;
    seen.push_back(std::move(key));
    out.push_back(item);
  }
  return generator(std::move(out));
}

Value extreme_filter(const Value& value, const CallArguments& arguments, bool largest) {
  arguments.at_most(1, "min/max");
  const bool case_sensitive = arguments.flag(0, "case_sensitive", false);
  const std::vector<Value> items = iterate(value);
  if (items.empty()) return Value::undefined("there is no smallest or largest item in an empty sequence");
  const Value* best = &items[0];
  for (const Value& item : items) {
    const int compared = order(sort_key(item, case_sensitive), sort_key(*best, case_sensitive));
    if (largest ? compared > 0 : compared < 0) best = &item;
  }
  return *best;
}

Value items_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(0, "items");
  if (value.is_undefined()) return generator({});
  const auto* dict = value.dict();
  if (!dict || dict->is_namespace)
    throw TemplateError("the filter items takes a dict, not " + type_name(value));
  return generator(iterate(call_method(value, "items", {})));
}

Value float_filter(const Value& value, const CallArguments& arguments) {
  if (value.is_number()) return Value(value.number());
  if (value.text()) {
    const std::string trimmed = text::strip(*value.text(), std::nullopt, text::Side::kBoth);
    double parsed = 0;
    const auto end = std::from_chars(trimmed.data(), trimmed.data() + trimmed.size(), parsed);
    if (!trimmed.empty() && end.ec == std::errc() && end.ptr == trimmed.data() + trimmed.size())
      return Value(parsed);
  }
  const Value* otherwise = arguments.find(0, "default");
  return otherwise ? *otherwise : Value(0.0);
}

Value int_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(2, "int");
  if (value.is_integer()) return Value(value.integer());
  if (value.text()) {
    std::string trimmed = text::strip(*value.text(), std::nullopt, text::Side::kBoth);
    if (trimmed.starts_with('+')) trimmed.erase(0, 1);
    const auto base = static_cast<int>(std::clamp<std::int64_t>(arguments.integer(1, "base", 10), 2, 36));
    std::int64_t parsed = 0;
    const auto end = std::from_chars(trimmed.data(), trimmed.data() + trimmed.size(), parsed, base);
    if (!trimmed.empty() && end.ec == std::errc() && end.ptr == trimmed.data() + trimmed.size())
      return Value(parsed);
  }
  const Value* given = arguments.find(0, "default");
  Value otherwise = given ? *given : Value(std::int64_t{0});
  const Value real = float_filter(value, {{Value()}, {}});
  if (!real.as<double>() || !std::isfinite(real.number()) || std::fabs(real.number()) >= 9.2e18)
    return otherwise;
  return Value(static_cast<std::int64_t>(real.number()));
}

Value sum_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(2, "sum");
  const Value* attribute = arguments.find(0, "attribute");
  const Value* start = arguments.find(1, "start");
  if (start && !start->is_number()) throw TemplateError("sum starts with a number, not " + type_name(*start));
  bool whole = !start || start->is_integer();
  double real = start ? start->number() : 0;
  std::int64_t integer = start && whole ? start->integer() : 0;
  for (const Value& item : iterate(value)) {
    const Value term = attribute && !attribute->is_none() ? attribute_path(item, *attribute, nullptr) : item;
    if (!term.is_number()) throw TemplateError("sum takes numbers, not " + type_name(term));
    whole = whole && term.is_integer();
    if (whole && __builtin_add_overflow(integer, term.integer(), &integer))
      throw TemplateError("sum is too large");
    real += term.number();
  }
  return whole ? Value(integer) : Value(real);
}

Value abs_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(0, "abs");
  if (!value.is_number()) throw TemplateError("abs takes a number, not " + type_name(value));
  if (!value.is_integer()) return Value(std::fabs(value.number()));
  if (value.integer() == INT64_MIN) throw TemplateError("abs is too large");
  return Value(value.integer() < 0 ? -value.integer() : value.integer());
}

Filter text_filter(std::string (*function)(std::string_view)) {
  return [function](const Value& value, const CallArguments& arguments) {
    arguments.at_most(0, "a filter on text");
    return Value(function(to_text(value)));
  };
}

Value replace_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(3, "replace");
  return Value(text::replace(to_text(value), to_text(arguments.required(0, "old")),
                             to_text(arguments.required(1, "new")), arguments.integer(2, "count", -1)));
}

Value trim_filter(const Value& value, const CallArguments& arguments) {
  arguments.at_most(1, "trim");
  std::optional<std::string> characters;
  if (const Value* given = arguments.find(0, "chars"); given && !given->is_none())
    characters = to_text(*given);
  return Value(text::strip(to_text(value), characters, text::Side::kBoth));
}

const std::map<std::string, Filter>& filters() {
  static const std::map<std::string, Filter> table = [] {
    std::map<std::string, Filter> all{
        {"abs", abs_filter},
        {"default", default_filter},
        {"dictsort", dictsort_filter},
        {"first", first_filter},
        {"float", float_filter},
        {"indent", indent_filter},
        {"int", int_filter},
        {"items", items_filter},
        {"join", join_filter},
        {"last", last_filter},
        {"map", map_filter},
        {"replace", replace_filter},
        {"reverse", reverse_filter},
        {"sort", sort_filter},
        {"sum", sum_filter},
        {"tojson", tojson_filter},
        {"trim", trim_filter},
        {"unique", unique_filter},
        {"capitalize", text_filter(text::capitalize)},
        {"lower", text_filter(text::lower)},
        {"title", text_filter(text::filter_title)},
        {"upper", text_filter(text::upper)},
    };
    all["attr"] = [](const Value& value, const CallArguments& a) {
      return get_attribute(value, a.text(0, "name", ""));
    };
    all["length"] = [](const Value& value, const CallArguments&) { return Value(length(value)); };
    all["list"] = [](const Value& value, const CallArguments&) {
      return Value::make_sequence(iterate(value));
    };
    all["max"] = [](const Value& value, const CallArguments& a) { return extreme_filter(value, a, true); };
    all["min"] = [](const Value& value, const CallArguments& a) { return extreme_filter(value, a, false); };
    all["safe"] = [](const Value& value, const CallArguments&) { return Value(to_text(value)); };
    all["string"] = all["safe"];
    all["select"] = [](const Value& value, const CallArguments& a) {
      return select_filter(value, a, false, true);
    };
    all["reject"] = [](const Value& value, const CallArguments& a) {
      return select_filter(value, a, false, false);
    };
    all["selectattr"] = [](const Value& value, const CallArguments& a) {
      return select_filter(value, a, true, true);
    };
    all["rejectattr"] = [](const Value& value, const CallArguments& a) {
      return select_filter(value, a, true, false);
    };
    all["count"] = all["length"];
    all["d"] = all["default"];
    return all;
  }();
  return table;
}

}  // namespace

Value apply_filter(const std::string& name, const Value& value, const CallArguments& arguments) {
  const auto found = filters().find(name);
  if (found == filters().end()) throw TemplateError("there is no filter '" + name + "'");
  return found->second(value, arguments);
}

}  // namespace hetcomp
