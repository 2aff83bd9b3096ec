#include "engine/json.h"

#include <charconv>
#include <cmath>

namespace fastrec::engine::json {
namespace {

constexpr int kMaxDepth = 32;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Value whole() {
    Value value = item(0);
    space();
    if (at_ != text_.size()) fail("text behind the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error(std::string("invalid JSON: ") + what + " at byte " + std::to_string(at_));
  }

  void space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }

  char next() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  bool take(char c) {
    space();
    if (next() != c) return false;
    ++at_;
    return true;
  }

  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) fail("an unknown word");
    at_ += expected.size();
  }

  Value item(int depth) {
    if (depth > kMaxDepth) fail("values too deep");
    space();
    switch (next()) {
      case '{':
        return object(depth);
      case '[':
        return list(depth);
      case '"':
        return string();
      case 't':
        word("true");
        return true;
      case 'f':
        word("false");
        return false;
      case 'n':
        word("null");
        return nullptr;
      default:
        return number();
    }
  }

  Value list(int depth) {
    List items;
    ++at_;
    if (take(']')) return items;
    do items.push_back(item(depth + 1));
    while (take(','));
    if (!take(']')) fail("a list without its end");
    return items;
  }

  Value object(int depth) {
    Object members;
    ++at_;
    if (take('}')) return members;
    do {
      space();
      if (next() != '"') fail("a member without a name");
      std::string name = string();
      for (const Member& member : members)
        if (member.first == name) fail("a name that comes twice");
      if (members.size() == kMaxMembers) fail("an object of too many members");
      if (!take(':')) fail("a name without a value");
      members.emplace_back(std::move(name), item(depth + 1));
    } while (take(','));
    if (!take('}')) fail("an object without its end");
    return members;
  }

  // Objects are searched from the front, and their names are few.
  static constexpr size_t kMaxMembers = 256;

  unsigned hexadecimal() {
    unsigned code = 0;
    const char* begin = text_.data() + at_;
    if (text_.size() - at_ < 4) fail("half an escape");
    const auto [end, error] = std::from_chars(begin, begin + 4, code, 16);
    if (error != std::errc() || end != begin + 4) fail("a wrong escape");
    at_ += 4;
    return code;
  }

  static void append_utf8(std::string& to, unsigned code) {
    if (code < 0x80) {
      to += static_cast<char>(code);
      return;
    }
    if (code < 0x800) {
      to += static_cast<char>(0xc0 | code >> 6);
    } else {
      if (code < 0x10000) {
        to += static_cast<char>(0xe0 | code >> 12);
      } else {
        to += static_cast<char>(0xf0 | code >> 18);
        to += static_cast<char>(0x80 | (code >> 12 & 0x3f));
      }
      to += static_cast<char>(0x80 | (code >> 6 & 0x3f));
    }
    to += static_cast<char>(0x80 | (code & 0x3f));
  }

  // The rest of a UTF-8 sequence that begins with `lead`; `value` ends with it already.
  void utf8_rest(unsigned char lead, std::string& value) {
    const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    unsigned code = lead & (0x3f >> more);
    if (lead < 0xc2 || lead > 0xf4 || text_.size() - at_ < static_cast<size_t>(more))
      fail("a wrong UTF-8 sequence");
    for (int i = 0; i < more; ++i) {
      const auto c = static_cast<unsigned char>(text_[at_++]);
      if (c >> 6 != 2) fail("a wrong UTF-8 sequence");
      code = code << 6 | (c & 0x3f);
      value += static_cast<char>(c);
    }
    constexpr unsigned kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (code < kLeast[more] || (code >= 0xd800 && code < 0xe000) || code > 0x10ffff)
      fail("a wrong UTF-8 sequence");
  }

  std::string string() {
    std::string value;
    ++at_;
    while (true) {
      if (at_ >= text_.size()) fail("a text without its end");
      const char c = text_[at_++];
      if (c == '"') return value;
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a text");
      if (c != '\\') {
        value += c;
        if (static_cast<unsigned char>(c) >= 0x80) utf8_rest(static_cast<unsigned char>(c), value);
        continue;
      }
      constexpr std::string_view kNames = "\"\\/bfnrt", kMeaning = "\"\\/\b\f\n\r\t";
      const char escaped = next();
      ++at_;
      if (const size_t known = kNames.find(escaped); escaped != '\0' && known != kNames.npos) {
        value += kMeaning[known];
        continue;
      }
      if (escaped != 'u') fail("an unknown escape");
      unsigned code = hexadecimal();
      if (code >= 0xd800 && code < 0xdc00) {
        word("\\u");
        const unsigned low = hexadecimal();
        if (low < 0xdc00 || low > 0xdfff) fail("half a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      } else if (code >= 0xdc00 && code < 0xe000) {
        fail("half a surrogate pair");
      }
      append_utf8(value, code);
    }
  }

  Value number() {
    const size_t begin = at_;
    bool whole = true;
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '.' || c == 'e' || c == 'E' || (c == '+' && at_ > begin))
        whole = false;
      else if (!(c >= '0' && c <= '9') && c != '-')
        break;
      ++at_;
    }
    const std::string_view digits = text_.substr(begin, at_ - begin);
    const char *first = digits.data(), *last = first + digits.size();
    const size_t sign = digits.starts_with('-');
    if (digits.size() <= sign || digits[sign] < '0' || digits[sign] > '9') fail("an unknown value");
    if (digits[sign] == '0' && digits.size() > sign + 1 && digits[sign + 1] >= '0' &&
        digits[sign + 1] <= '9')
      fail("a number that begins with 0");
    if (whole) {
      int64_t value = 0;
      const auto [end, error] = std::from_chars(first, last, value);
      if (error != std::errc() || end != last) fail("an integer beyond 64 bits");
      return value;
    }
    double value = 0;
    const auto [end, error] = std::from_chars(first, last, value);
    if (error != std::errc() || end != last || !std::isfinite(value) || digits.back() == '.')
      fail("a wrong number");
    return value;
  }

  std::string_view text_;
  size_t at_ = 0;
};

void write_text(std::string& to, const std::string& text) {
  constexpr char kDigits[] = "0123456789abcdef";
  to += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      to += '\\';
      to += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      to += "\\u00";
      to += kDigits[c >> 4];
      to += kDigits[c & 15];
    } else {
      to += c;
    }
  }
  to += '"';
}

[[noreturn]] void wrong(const char* wanted) {
  throw Error(std::string("expected ") + wanted + " where another value stands");
}

}  // namespace

bool Value::flag() const {
  if (const bool* value = std::get_if<bool>(&value_)) return *value;
  wrong("true or false");
}

int64_t Value::integer() const {
  if (const int64_t* value = std::get_if<int64_t>(&value_)) return *value;
  wrong("an integer");
}

double Value::number() const {
  if (const double* value = std::get_if<double>(&value_)) return *value;
  if (const int64_t* value = std::get_if<int64_t>(&value_)) return static_cast<double>(*value);
  wrong("a number");
}

const std::string& Value::text() const {
  if (const std::string* value = std::get_if<std::string>(&value_)) return *value;
  wrong("a text");
}

const List& Value::list() const {
  if (const List* value = std::get_if<List>(&value_)) return *value;
  wrong("a list");
}

const Object& Value::object() const {
  if (const Object* value = std::get_if<Object>(&value_)) return *value;
  wrong("an object");
}

const Value* Value::find(std::string_view name) const {
  for (const Member& member : object())
    if (member.first == name) return &member.second;
  return nullptr;
}

const Value& Value::at(std::string_view name) const {
  if (const Value* found = find(name)) return *found;
  throw Error("a member is missing: " + std::string(name));
}

const Value& Value::operator[](size_t index) const {
  const List& items = list();
  if (index >= items.size()) throw Error("a list is too short");
  return items[index];
}

Value parse(std::string_view text) { return Parser(text).whole(); }

namespace {

void write_to(std::string& to, const Value& value);

struct Writer {
  std::string& to;

  void operator()(std::monostate) const { to += "null"; }
  void operator()(bool value) const { to += value ? "true" : "false"; }
  void operator()(int64_t value) const { to += std::to_string(value); }
  void operator()(double value) const {
    char digits[32];
    const auto [end, error] = std::to_chars(digits, digits + sizeof(digits), value);
    const std::string_view shown(digits, end - digits);
    to += shown;
    // Read back as a double.
    if (shown.find_first_of(".e") == shown.npos) to += ".0";
  }
  void operator()(const std::string& value) const { write_text(to, value); }
  void operator()(const List& value) const {
    to += '[';
    for (size_t i = 0; i < value.size(); ++i) {
      if (i) to += ',';
      write_to(to, value[i]);
    }
    to += ']';
  }
  void operator()(const Object& value) const {
    to += '{';
    for (size_t i = 0; i < value.size(); ++i) {
      if (i) to += ',';
      write_text(to, value[i].first);
      to += ':';
      write_to(to, value[i].second);
    }
    to += '}';
  }
};

void write_to(std::string& to, const Value& value) { value.visit(Writer{to}); }

}  // namespace

std::string write(const Value& value) {
  std::string to;
  write_to(to, value);
  return to;
}

}  // namespace fastrec::engine::json
