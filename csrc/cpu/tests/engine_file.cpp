// JSON, SHA-256, programs as JSON, and engine files that are damaged or from elsewhere.
#include "engine/file.h"
#include "engine_file_samples.h"
#include "engine_samples.h"

namespace fastrec::tests {
namespace {

// A reader's error about a text, "" where it takes it.
std::string json_error(std::string_view text) {
  try {
    json::parse(text);
    return "";
  } catch (const json::Error& error) {
    return error.what();
  }
}

// Why a file is refused; "" where it is opened.
std::string refusal(const std::string& content, Keep keep = Keep::copied) {
  const TemporaryFile file(content);
  try {
    open_file(file.path(), keep);
    return "";
  } catch (const FileError& error) {
    return error.what();
  } catch (const Refused& error) {
    return std::string("refused: ") + error.what();
  }
}

bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

std::vector<float> scores(Engine& engine) {
  const std::vector<int64_t> ids{1, 2, 3, 4, 5, 6}, few{6, 0, 3, 2};
  const int64_t sizes[] = {2, 3}, candidates[] = {2, 2};
  const Array inputs[] = {
      {reinterpret_cast<const std::byte*>(ids.data()), Dtype::i64, 2, sizes},
      {reinterpret_cast<const std::byte*>(few.data()), Dtype::i64, 2, candidates}};
  SpecSizes found = unknown_sizes();
  CHECK(engine.inputs().admits(inputs, found));
  std::vector<float> made(4);
  engine.run(inputs, found, made.data(), 1);
  return made;
}

}  // namespace

TEST(json_survives_a_round_trip) {
  for (const char* text :
       {"null", "true", "false", "0", "-7", "9223372036854775807", "-9223372036854775808", "0.5",
        "1e+300", "-0.0", "[]", "{}", "\"\"", R"("\"\\\u0001")", R"([1,[2,{"a":[null,"b"]}]])"})
    CHECK(json::write(json::parse(text)) == text);
  // Integers stay integers, and other numbers doubles.
  CHECK(json::parse("3").is_integer());
  CHECK(!json::parse(json::write(3.0)).is_integer());
  CHECK(json::parse(json::write(0.1)).number() == 0.1);
  CHECK(json::parse(R"("\ud83d\ude00")").text() == "\xf0\x9f\x98\x80");
  CHECK(json::parse(" [ 1 , 2 ] ").list().size() == 2);
}

TEST(hostile_json_is_refused_with_the_byte) {
  for (const char* text : {"",
                           " ",
                           "nul",
                           "truth",
                           "[1,]",
                           "[1",
                           "{\"a\" 1}",
                           "{\"a\":1,}",
                           "{1:2}",
                           "{\"a\":1,\"a\":2}",
                           "01",
                           "-",
                           "+1",
                           "1.",
                           ".5",
                           "1e",
                           "1e999",
                           "9223372036854775808",
                           "NaN",
                           "Infinity",
                           "'a'",
                           "\"a",
                           "\"\n\"",
                           "\"\\x\"",
                           "\"\\u12\"",
                           "\"\\ud800\"",
                           "\"\\udc00\"",
                           "\"\xff\"",
                           "\"\xc0\x80\"",
                           "\"\xed\xa0\x80\"",
                           "\"\xf4\x90\x80\x80\"",
                           "\"\xe2\x82\"",
                           "1 2",
                           "--1"})
    CHECK(has(json_error(text), "at byte"));
  CHECK(has(json_error(std::string(100'000, '[')), "too deep"));
  CHECK(json_error(std::string(32, '[') + std::string(32, ']')).empty());
  const char zeros[] = "[1\0]";
  CHECK(!json_error(std::string_view(zeros, 4)).empty());
  std::string many = "{";
  for (int i = 0; i < 300; ++i) many += (i ? ",\"" : "\"") + std::to_string(i) + "\":0";
  CHECK(has(json_error(many + "}"), "too many members"));
}

TEST(sha256_gives_the_known_digests_however_it_is_computed) {
  const auto digest = [](const std::string& text) {
    const auto* data = reinterpret_cast<const std::byte*>(text.data());
    CHECK(sha256(data, text.size()) == sha256_scalar(data, text.size()));
    return hexadecimal(sha256(data, text.size()));
  };
  CHECK(digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
        "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  CHECK(digest(std::string(1'000'000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  for (size_t bytes = 0; bytes < 300; ++bytes) digest(std::string(bytes, static_cast<char>(bytes)));
}

TEST(programs_survive_a_round_trip) {
  for (const auto& [name, sample] : samples()) {
    std::snprintf(setting, sizeof(setting), "%s", name.c_str());
    const std::string text = json::write(write_program(sample.program));
    const Program again = read_program(json::parse(text), sample.program.constants);
    CHECK(json::write(write_program(again)) == text);
    check(again, kSampleLimits);
  }
}

TEST(files_are_opened_and_score_mapped_and_copied) {
  const TemporaryFile file(engine_file(small_ranker()));
  const OpenedFile mapped = open_file(file.path(), Keep::mapped);
  const OpenedFile copied = open_file(file.path(), Keep::copied);
  const std::vector<float> expected = scores(*mapped.engine);
  CHECK(expected[0] != expected[1]);
  CHECK(scores(*copied.engine) == expected);
  CHECK(mapped.header == copied.header);
}

TEST(a_copied_engine_survives_its_file) {
  const std::string content = engine_file(small_ranker());
  TemporaryFile file(content);
  const OpenedFile opened = open_file(file.path(), Keep::copied);
  const std::vector<float> before = scores(*opened.engine);
  file.write(std::string(content.size(), '\x7f'));
  CHECK(scores(*opened.engine) == before);
  file.write("");
  CHECK(scores(*opened.engine) == before);
}

TEST(truncated_files_are_refused_at_every_length) {
  const std::string content = engine_file(small_ranker());
  for (size_t bytes = 0; bytes < content.size(); ++bytes) {
    std::snprintf(setting, sizeof(setting), "%zu bytes", bytes);
    const std::string why = refusal(content.substr(0, bytes));
    CHECK(has(why, bytes == 0 ? "truncated" : "is truncated"));
  }
  CHECK(has(refusal(content + "x"), "altered"));
}

TEST(a_flipped_bit_of_any_byte_is_refused) {
  const std::string content = engine_file(small_ranker());
  for (size_t at = 0; at < content.size(); ++at) {
    std::snprintf(setting, sizeof(setting), "byte %zu", at);
    std::string changed = content;
    changed[at] = static_cast<char>(changed[at] ^ (1 << at % 8));
    CHECK(!refusal(changed).empty());
  }
}

TEST(files_from_elsewhere_are_refused_with_what_to_do) {
  const std::string content = engine_file(small_ranker());
  CHECK(has(refusal("GGUF" + content), "is not an engine artifact"));
  std::string old = content;
  old[8] = 1;
  CHECK(has(refusal(old), "version 1, this reads 2: compile the model again and save the engine"));
  try {
    open_file("/nonexistent/engine", Keep::mapped);
    CHECK(false);
  } catch (const FileError& error) {
    CHECK(has(error.what(), "No such file"));
  }
  try {
    open_file("/tmp", Keep::mapped);
    CHECK(false);
  } catch (const FileError& error) {
    CHECK(has(error.what(), "no regular file"));
  }
}

TEST(headers_with_right_checksums_are_checked) {
  const FileParts parts = small_ranker();
  const auto with = [&](const char* name, json::Value value) {
    FileParts changed = parts;
    json::Object header = parts.header.object();
    for (auto& [known, held] : header)
      if (known == name) held = value;
    changed.header = std::move(header);
    return refusal(engine_file(changed));
  };
  CHECK(has(with("requires", "avx9000"), "refused: "));
  CHECK(has(with("backend", "onnxruntime"), "another backend"));
  CHECK(has(with("threads", 0), "number of threads"));
  CHECK(has(with("program", json::Object{}), "a member is missing"));
  const std::string sections = sections_of(parts);
  const auto sized = [&](const char* rows) {
    json::Object header = parts.header.object();
    header.emplace_back("sections", json::parse(rows));
    return refusal(put_together(json::write(header), sections));
  };
  for (const char* rows :
       {"[]", R"([{"begin":64,"bytes":1,"sha256":""}])", R"([{"begin":-64,"bytes":1,"sha256":""}])",
        R"([{"begin":0,"bytes":-1,"sha256":""}])",
        R"([{"begin":0,"bytes":9223372036854775807,"sha256":""}])",
        R"([{"begin":0,"bytes":1000000,"sha256":""}])"})
    CHECK(!sized(rows).empty());
  std::string changed = engine_file(parts);
  changed.back() = 'x';
  CHECK(has(refusal(changed), "the checksum of a section differs"));
}

TEST(weights_that_steps_share_are_packed_a_few_times_at_most) {
  // 20 layers on one weight of 1 MB, each with the bias that begins `shift` numbers further on.
  const auto layers = [](int64_t shift) {
    ModelMaker m({"B", "L"});
    const View item = m.input("item", {B, L}, 7), none;
    const View weight = m.floats({512, 512}), biases = m.floats({600});
    View x = m.arena(Dtype::f32, {B, L, 512});
    m.step("gather", {item, m.floats({7, 512}), none, x});
    for (int64_t layer = 0; layer < 20; ++layer) {
      View bias = biases;
      bias.offset = layer * shift;
      bias.sizes = {512};
      const View y = m.arena(Dtype::f32, {B, L, 512});
      m.step("linear", {x, weight, bias, y}, {{"activation", "none"}});
      x = y;
    }
    return refusal(engine_file(m.made(x)));
  };
  CHECK(layers(0).empty());
  CHECK(has(layers(1), "weights that few steps share"));
}

}  // namespace fastrec::tests
