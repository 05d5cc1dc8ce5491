// hetcomp-run: generates text with a compiled model. Exit codes: 0, 1 (refused or failed, with one sentence
// on stderr), 2 (command line), 130 (Ctrl-C).
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "handles.h"
#include "run_options.h"

namespace hetcomp::cli {
namespace {

constexpr int kInterruptedExit = 130;

volatile std::sig_atomic_t interrupted = 0;

// Without SA_RESTART, so that a read of the terminal ends too.
void catch_interrupt() {
  struct sigaction action{};
  action.sa_handler = [](int) { interrupted = 1; };
  sigaction(SIGINT, &action, nullptr);
}

void write_out(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0)
    throw Failure("Cannot write to the standard output.");
}

ModelPtr load(const RunOptions& options) {
  hetcomp_load_options load;
  hetcomp_load_options_init(&load);
  load.threads = options.threads;
  load.weights = options.weights;
  load.verify_weights = options.verify_weights ? 1 : 0;
  load.isa = options.isa.empty() ? nullptr : options.isa.c_str();
  load.n_gpus = static_cast<std::int32_t>(options.gpus.size());
  load.gpus = options.gpus.data();
  hetcomp_model* model = nullptr;
  check(hetcomp_load(options.artifact.c_str(), &load, &model));
  return ModelPtr(model);
}

GenerationPtr start(hetcomp_session* session, const std::vector<std::int32_t>& ids,
                    const RunOptions& options) {
  hetcomp_generate_params params;
  hetcomp_generate_params_init(&params);
  params.max_new_tokens = options.max_new_tokens;
  params.temperature = options.temperature;
  params.top_k = options.top_k;
  params.top_p = options.top_p;
  params.min_p = options.min_p;
  params.repetition_penalty = options.repetition_penalty;
  params.seed = options.seed;
  params.ignore_eos = options.ignore_eos ? 1 : 0;
  std::vector<const char*> stops;
  for (const std::string& stop : options.stop) stops.push_back(stop.c_str());
  params.stop = stops.data();
  params.n_stop = static_cast<std::int32_t>(stops.size());
  hetcomp_generation* generation = nullptr;
  check(hetcomp_generation_start(session, ids.data(), static_cast<std::int64_t>(ids.size()), &params,
                                 &generation));
  return GenerationPtr(generation);
}

// Prints as tokens come, until the last or Ctrl-C, and returns the text.
std::string stream(hetcomp_generation* generation, const RunOptions& options) {
  std::string whole;
  bool first = true;
  for (hetcomp_token token{}; token.finish == HETCOMP_FINISH_NONE && !interrupted;) {
    check(hetcomp_generation_next(generation, &token));
    if (token.id < 0) continue;
    const std::string text(token.text, token.text_length);
    whole += text;
    write_out(options.print_ids ? (first ? "" : ",") + std::to_string(token.id) : text);
    first = false;
  }
  write_out("\n");
  return whole;
}

void load_adapters(hetcomp_model* model, const RunOptions& options) {
  for (const auto& [name, path] : options.adapters)
    check(hetcomp_adapter_load(model, path.c_str(), name.c_str()));
}

SessionPtr new_session(hetcomp_model* model, const RunOptions& options) {
  hetcomp_session* created = nullptr;
  check(hetcomp_session_create(model, &created));
  SessionPtr session(created);
  if (!options.adapters.empty())
    check(hetcomp_session_set_adapter(created, options.adapters.back().first.c_str()));
  return session;
}

void complete(hetcomp_model* model, const RunOptions& options) {
  const SessionPtr session = new_session(model, options);
  const std::vector<std::int32_t> ids = options.prompt ? tokenize(model, *options.prompt, true) : options.ids;
  stream(start(session.get(), ids, options).get(), options);
}

// A line of the terminal may be no UTF-8; what JSON cannot carry becomes U+FFFD.
std::string dump(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

// One turn: only the tokens that the KV cache does not hold yet are computed.
std::string reply(hetcomp_model* model, hetcomp_session* session, const nlohmann::json& messages,
                  const RunOptions& options) {
  const nlohmann::json context{{"messages", messages}, {"add_generation_prompt", true}};
  std::vector<std::int32_t> ids = tokenize(model, chat_render(model, dump(context)), false);
  std::int64_t kept = 0;
  check(hetcomp_session_reuse(session, ids.data(), static_cast<std::int64_t>(ids.size()), &kept));
  ids.erase(ids.begin(), ids.begin() + kept);
  return stream(start(session, ids, options).get(), options);
}

void chat(hetcomp_model* model, const RunOptions& options) {
  const SessionPtr session = new_session(model, options);
  const bool terminal = isatty(STDIN_FILENO) != 0;
  nlohmann::json messages = nlohmann::json::array();
  std::string line;
  for (;;) {
    if (terminal) write_out("> ");
    if (!std::getline(std::cin, line)) {
      if (terminal) write_out("\n");
      return;
    }
    if (line.empty()) continue;
    messages.push_back({{"role", "user"}, {"content", line}});
    messages.push_back({{"role", "assistant"}, {"content", reply(model, session.get(), messages, options)}});
    if (!interrupted) continue;
    if (!terminal) return;
    interrupted = 0;  // Ctrl-C ended the answer, not the conversation
  }
}

nlohmann::ordered_json statistics(const hetcomp_model* model) {
  char* json = nullptr;
  check(hetcomp_model_stats(model, &json));
  const Buffer<char> owner(json);
  return nlohmann::ordered_json::parse(json);
}

void print_notes(const hetcomp_model* model) {
  const nlohmann::ordered_json figures = statistics(model);
  for (const auto& note : figures["notes"])
    std::cerr << "hetcomp-run: note: " << note.get<std::string>() << '\n';
}

void print_numa_report(const hetcomp_model* model) {
  char* json = nullptr;
  check(hetcomp_model_numa_report(model, &json));
  const Buffer<char> owner(json);
  std::cerr << "weight\tbytes\tnode\tmachine node\tpages on it\telsewhere\tabsent\n";
  for (const auto& weight : nlohmann::ordered_json::parse(json)) {
    const auto& machine = weight["machine_node"];
    std::cerr << weight["weight"].get<std::string>() << '\t' << weight["bytes"] << '\t' << weight["node"]
              << '\t' << (machine.is_null() ? "any" : machine.dump()) << '\t' << weight["on_node"] << '\t'
              << weight["elsewhere"] << '\t' << weight["absent"] << '\n';
  }
}

int run(int argc, char** argv) {
  RunOptions options;
  if (const auto code = parse(argc, argv, &options)) return *code;
  const ModelPtr model = load(options);
  print_notes(model.get());
  load_adapters(model.get(), options);
  catch_interrupt();
  options.chat ? chat(model.get(), options) : complete(model.get(), options);
  if (options.numa_report) print_numa_report(model.get());
  if (options.stats) std::cerr << statistics(model.get()).dump(2) << '\n';
  return interrupted ? kInterruptedExit : 0;
}

}  // namespace
}  // namespace hetcomp::cli

int main(int argc, char** argv) {
  try {
    return hetcomp::cli::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "hetcomp-run: " << error.what() << '\n';
    return 1;
  }
}
