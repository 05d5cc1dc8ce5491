// str(), repr() and json.dumps() of template values.
#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "template_value.h"
#include "utf8.h"

namespace hetcomp {

namespace {

// Python's repr(float): shortest digits that read back the same; exponent form below 1e-4 and from 1e16.
std::string float_text(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  const double size = std::fabs(value);
  const bool exponent = size != 0 && (size < 1e-4 || size >= 1e16);
  std::array<char, 64> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                                 exponent ? std::chars_format::scientific : std::chars_format::fixed);
  std::string text(buffer.data(), end.ptr);
  return exponent || text.find('.') != std::string::npos ? text : text + ".0";
}

bool printable(char32_t code) {
  if (code == ' ') return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(code))) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS:
      return false;
    default:
      return true;
  }
}

void append_hex(const char* format, unsigned code, std::string* out) {
  std::array<char, 16> buffer;
  std::snprintf(buffer.data(), buffer.size(), format, code);
  out->append(buffer.data());
}

std::string text_repr(const std::string& text) {
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string out(1, quote);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = utf8_length(std::string_view(text).substr(at));
    const std::string_view character = std::string_view(text).substr(at, size);
    const char32_t code = utf8_code_point(character);
    at += size;
    if (code == static_cast<unsigned char>(quote) || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code == '\n') {
      out += "\\n";
    } else if (code == '\r') {
      out += "\\r";
    } else if (code == '\t') {
      out += "\\t";
    } else if (printable(code)) {
      out += character;
    } else {
      append_hex(code < 0x100     ? "\\x%02x"
                 : code < 0x10000 ? "\\u%04x"
                                  : "\\U%08x",
                 static_cast<unsigned>(code), &out);
    }
  }
  return out + quote;
}

std::string sequence_repr(const Sequence& sequence) {
  if (sequence.kind == Sequence::Kind::kGenerator) throw TemplateError("a generator is printed; add | list");
  std::string out;
  for (const Value& item : sequence.items) out += (out.empty() ? "" : ", ") + to_repr(item);
  if (sequence.kind == Sequence::Kind::kTuple) return "(" + out + (sequence.items.size() == 1 ? ",)" : ")");
  if (sequence.kind == Sequence::Kind::kView) throw TemplateError("a view of a dict is printed; add | list");
  return "[" + out + "]";
}

std::string dict_repr(const Dict& dict) {
  if (dict.is_namespace) throw TemplateError("a namespace is printed");
  std::string out;
  for (const auto& [key, value] : dict.items) {
    out += (out.empty() ? "" : ", ") + to_repr(key) + ": " + to_repr(value);
  }
  return "{" + out + "}";
}

void append_json_text(const std::string& text, bool ascii, std::string* out) {
  *out += '"';
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t size = utf8_length(std::string_view(text).substr(at));
    const char32_t code = utf8_code_point(std::string_view(text).substr(at, size));
    if (code == '"' || code == '\\') {
      *out += '\\';
      *out += static_cast<char>(code);
    } else if (code < 0x20) {
      static constexpr std::string_view kNamed = "\b\f\n\r\t";
      const std::size_t named = kNamed.find(static_cast<char>(code));
      if (named != std::string_view::npos) {
        *out += '\\';
        *out += "bfnrt"[named];
      } else {
        append_hex("\\u%04x", static_cast<unsigned>(code), out);
      }
    } else if (ascii && code > 0xFFFF) {
      append_hex("\\u%04x", static_cast<unsigned>(0xD800 + ((code - 0x10000) >> 10)), out);
      append_hex("\\u%04x", static_cast<unsigned>(0xDC00 + ((code - 0x10000) & 0x3FF)), out);
    } else if (ascii && code >= 0x7F) {
      append_hex("\\u%04x", static_cast<unsigned>(code), out);
    } else {
      out->append(text, at, size);
    }
    at += size;
  }
  *out += '"';
}

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, std::string* out) : style_(style), out_(out) {}

  void write(const Value& value, int level) {
    if (level > 200) throw TemplateError("a value is nested more than 200 levels deep");
    if (value.is_none()) {
      *out_ += "null";
    } else if (const auto* truth = value.as<bool>()) {
      *out_ += *truth ? "true" : "false";
    } else if (const auto* whole = value.as<std::int64_t>()) {
      *out_ += std::to_string(*whole);
    } else if (const auto* real = value.as<double>()) {
      *out_ += std::isnan(*real)   ? "NaN"
               : std::isinf(*real) ? (*real < 0 ? "-Infinity" : "Infinity")
                                   : float_text(*real);
    } else if (const auto* text = value.text()) {
      append_json_text(*text, style_.ascii, out_);
    } else if (const auto* items = value.sequence(); items && items->kind < Sequence::Kind::kView) {
      write_list(items->items, level);
    } else if (const auto* dict = value.dict(); dict && !dict->is_namespace) {
      write_dict(dict->items, level);
    } else {
      throw TemplateError(type_name(value) + " cannot be written as JSON");
    }
  }

 private:
  void write_list(const std::vector<Value>& items, int level) {
    *out_ += '[';
    for (std::size_t i = 0; i < items.size(); ++i) {
      separate(i, level + 1);
      write(items[i], level + 1);
    }
    close(items.empty(), level, ']');
  }

  void write_dict(std::vector<std::pair<Value, Value>> items, int level) {
    if (style_.sort_keys) {
      std::stable_sort(items.begin(), items.end(),
                       [](const auto& a, const auto& b) { return order(a.first, b.first) < 0; });
    }
    *out_ += '{';
    for (std::size_t i = 0; i < items.size(); ++i) {
      separate(i, level + 1);
      append_json_text(key_text(items[i].first), style_.ascii, out_);
      *out_ += style_.key_separator;
      write(items[i].second, level + 1);
    }
    close(items.empty(), level, '}');
  }

  static std::string key_text(const Value& key) {
    if (key.text()) return *key.text();
    if (const auto* truth = key.as<bool>()) return *truth ? "true" : "false";
    if (key.is_none()) return "null";
    if (key.is_number()) return to_text(key);
    throw TemplateError("a key of JSON cannot be " + type_name(key));
  }

  void separate(std::size_t index, int level) {
    if (index > 0) *out_ += style_.item_separator;
    new_line(level);
  }

  void close(bool empty, int level, char bracket) {
    if (!empty) new_line(level);
    *out_ += bracket;
  }

  void new_line(int level) {
    if (style_.indent >= 0) *out_ += "\n" + std::string(static_cast<std::size_t>(style_.indent * level), ' ');
  }

  const JsonStyle& style_;
  std::string* out_;
};

}  // namespace

std::string to_repr(const Value& value) {
  if (value.is_none()) return "None";
  if (value.is_undefined()) return "Undefined";
  if (const auto* truth = value.as<bool>()) return *truth ? "True" : "False";
  if (const auto* whole = value.as<std::int64_t>()) return std::to_string(*whole);
  if (const auto* real = value.as<double>()) return float_text(*real);
  if (const auto* text = value.text()) return text_repr(*text);
  if (const auto* items = value.sequence()) return sequence_repr(*items);
  if (const auto* dict = value.dict()) return dict_repr(*dict);
  throw TemplateError("a function is printed");
}

std::string to_text(const Value& value) {
  if (value.is_undefined()) return {};
  const auto* text = value.text();
  return text ? *text : to_repr(value);
}

std::string to_json(const Value& value, const JsonStyle& style) {
  std::string out;
  JsonWriter(style, &out).write(value, 0);
  return out;
}

}  // namespace hetcomp
