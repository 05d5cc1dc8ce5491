#include "run_options.h"

#include <CLI/CLI.hpp>
#include <charconv>
#include <filesystem>
#include <iostream>
#include <map>
#include <string_view>

#include "hetcomp/hetcomp.h"

namespace hetcomp::cli {
namespace {

const std::map<std::string, std::int32_t> kWeights{
    {"auto", HETCOMP_WEIGHTS_AUTO}, {"mmap", HETCOMP_WEIGHTS_MMAP}, {"ram", HETCOMP_WEIGHTS_RAM}};

// "1,2,3"; spaces are allowed.
std::vector<std::int32_t> parse_ids(const std::string& text) {
  std::vector<std::int32_t> ids;
  std::string_view rest = text;
  for (bool more = true; more;) {
    const std::size_t comma = rest.find(',');
    std::string_view part = rest.substr(0, comma);
    more = comma != std::string_view::npos;
    rest.remove_prefix(more ? comma + 1 : rest.size());
    while (part.starts_with(' ')) part.remove_prefix(1);
    while (part.ends_with(' ')) part.remove_suffix(1);
    std::int32_t id = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), id);
    if (error != std::errc() || end != part.data() + part.size())
      throw CLI::ValidationError("--ids",
                                 "'" + std::string(part) + "' is not a token id; give whole numbers: 1,2,3");
    ids.push_back(id);
  }
  return ids;
}

// "name=path"; without a name the file's.
std::pair<std::string, std::string> parse_adapter(const std::string& text) {
  const std::size_t equals = text.find('=');
  std::string path = equals == std::string::npos ? text : text.substr(equals + 1);
  std::string name =
      equals == std::string::npos ? std::filesystem::path(path).stem().string() : text.substr(0, equals);
  if (name.empty() || path.empty()) throw CLI::ValidationError("--adapter", "'" + text + "' is no NAME=FILE");
  return {std::move(name), std::move(path)};
}

void add_options(CLI::App& app, RunOptions* options, std::string* ids) {
  app.add_option("artifact", options->artifact, "Folder of a compiled model")
      ->required()
      ->type_name("MODEL.hetc");
  auto* input = app.add_option_group("input", "What to continue");
  input->add_option("--ids", *ids, "Token ids: 1,2,3")->type_name("IDS");
  input->add_option("--prompt", options->prompt, "Text")->type_name("TEXT");
  input->add_flag("--chat", options->chat, "Talk, one line a turn, until end of input");
  input->require_option(1);

  app.add_option("-n", options->max_new_tokens, "Tokens to generate")->capture_default_str()->type_name("N");
  app.add_option("--temperature", options->temperature, "0: greedy")->capture_default_str()->type_name("T");
  app.add_option("--top-k", options->top_k, "0: off")->capture_default_str()->type_name("K");
  app.add_option("--top-p", options->top_p, "1: off")->capture_default_str()->type_name("P");
  app.add_option("--min-p", options->min_p, "0: off")->capture_default_str()->type_name("P");
  app.add_option("--repetition-penalty", options->repetition_penalty, "1: off")
      ->capture_default_str()
      ->type_name("X");
  app.add_option("--seed", options->seed, "Seed of the sampler")->capture_default_str()->type_name("SEED");
  app.add_option("--stop", options->stop, "End before this text; may be repeated")
      ->type_name("TEXT")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_option_function<std::vector<std::string>>(
         "--adapter",
         [options](const std::vector<std::string>& all) {
           for (const std::string& text : all) options->adapters.push_back(parse_adapter(text));
         },
         "A packed adapter (hetcomp adapter pack); may be repeated, the last one answers")
      ->type_name("NAME=FILE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  app.add_flag("--ignore-eos", options->ignore_eos, "Go on after end-of-sequence tokens");

  app.add_option("--threads", options->threads, "0: the physical cores of this process")
      ->capture_default_str()
      ->type_name("N");
  app.add_option("--isa", options->isa, "Instruction set: avx2, avx512 (default: the best here)")
      ->type_name("ISA");
  app.add_option_function<std::string>(
         "--weights", [options](const std::string& where) { options->weights = kWeights.at(where); },
         "auto, mmap, or ram (2 MB pages)")
      ->check(CLI::IsMember({"auto", "mmap", "ram"}))
      ->type_name("WHERE");
  app.add_option("--gpu", options->gpus,
                 "Numbers of the GPUs, for models compiled for some: 2,3 (default: 0,1)")
      ->delimiter(',')
      ->type_name("N");
  app.add_flag("--no-verify{false}", options->verify_weights, "Do not compare the weights with their hashes");
  app.add_flag("--print-ids", options->print_ids, "Print token ids instead of text");
  app.add_flag("--stats", options->stats, "Print figures to stderr at the end");
  app.add_flag("--numa-report", options->numa_report,
               "Print to stderr on which NUMA node every weight should lie and where its pages are");
  app.set_version_flag("--version", hetcomp_version());
}

}  // namespace

std::optional<int> parse(int argc, char** argv, RunOptions* options) {
  CLI::App app("Generates text with a model that hetcomp compiled.", "hetcomp-run");
  std::string ids;
  add_options(app, options, &ids);
  try {
    app.parse(argc, argv);
    if (app.count_all() > 0 && app.get_option_group("input")->count("--ids") > 0)
      options->ids = parse_ids(ids);
  } catch (const CLI::Success& asked) {
    return app.exit(asked);
  } catch (const CLI::ParseError& error) {
    std::cerr << "hetcomp-run: " << error.what() << " (--help shows the options)\n";
    return 2;
  }
  return std::nullopt;
}

}  // namespace hetcomp::cli
