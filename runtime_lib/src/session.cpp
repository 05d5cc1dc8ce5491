#include "session.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <string>

#include "status.h"

namespace hetcomp {
namespace {

// Of a sequence. Chats whose templates leave out what the model thought go on from a prompt that is the one
// before but for its end: two reach back to before its last step.
constexpr std::size_t kCheckpoints = 2;

void check_ids(const ModelFacts& model, std::span<const std::int32_t> ids) {
  for (std::size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < model.vocab) continue;
    throw Error(HETCOMP_INVALID_ARGUMENT, "Token id " + std::to_string(ids[i]) + " at position " +
                                              std::to_string(i) + " is outside the vocabulary (0 to " +
                                              std::to_string(model.vocab - 1) + ").");
  }
}

}  // namespace

Session::Session(std::shared_ptr<Model> model) : model_(std::move(model)), slot_(model_->take_slot()) {}

Session::~Session() { model_->give_back_slot(slot_); }

// Positions of the pool for `tokens` tokens of each session and `more` behind them, claimed before anything
// is computed. In the end the sessions hold those that they have filled and, if all went well, what keep()
// says.
class Session::Growth {
 public:
  Growth(std::span<Session* const> sessions, std::int64_t tokens, std::int64_t more) : sessions_(sessions) {
    std::vector<KvPool::Claim> claims;
    for (const Session* session : sessions)
      claims.push_back({session->slot_, session->length() + tokens + more});
    sessions.front()->model_->kv_pool().claim(claims);
  }
  ~Growth() {
    for (const Session* session : sessions_)
      session->model_->kv_pool().give_back(session->slot_, session->length() + more_);
  }
  Growth(const Growth&) = delete;
  Growth& operator=(const Growth&) = delete;

  void keep(std::int64_t more) { more_ = more; }

 private:
  std::span<Session* const> sessions_;
  std::int64_t more_ = 0;
};

void Session::truncate(std::int64_t length) {
  if (length < 0 || length > this->length()) {
    throw Error(HETCOMP_INVALID_ARGUMENT, "Cannot truncate a session of " + std::to_string(this->length()) +
                                              " tokens to " + std::to_string(length) + ".");
  }
  if (length < computed_) computed_ = model_->facts().recurrent ? 0 : length;
  std::erase_if(checkpoints_, [&](const Checkpoint& c) { return c.length > length; });
  tokens_.resize(static_cast<std::size_t>(length));
  model_->keep_positions(slot_, length);
}

std::int64_t Session::held(std::int64_t length) const {
  if (!model_->facts().recurrent) return length;
  std::int64_t held = 0;
  for (const Checkpoint& checkpoint : checkpoints_)
    if (checkpoint.length <= length) held = checkpoint.length;
  return held;
}

void Session::keep_checkpoint() {
  if (!model_->facts().recurrent || computed_ == 0) return;
  if (!checkpoints_.empty() && checkpoints_.back().length == computed_) return;
  if (checkpoints_.size() == kCheckpoints) checkpoints_.erase(checkpoints_.begin());
  checkpoints_.push_back({computed_, model_->recurrent_state(slot_)});
}

void Session::set_adapter(const char* name) {
  ResidentAdapters::Use adapter = name == nullptr ? nullptr : model_->use_adapter(name);
  if (adapter == adapter_) return;
  truncate(0);
  adapter_ = std::move(adapter);
}

std::int64_t Session::reuse(std::span<const std::int32_t> ids) {
  if (ids.empty())
    throw Error(HETCOMP_INVALID_ARGUMENT, "The prompt is empty: at least one token is needed.");
  const auto usable = ids.first(ids.size() - 1);
  const std::int64_t common = std::ranges::mismatch(tokens_, usable).in1 - tokens_.begin();
  truncate(common < computed_ ? held(common) : common);
  return length();
}

void Session::check(std::span<const std::int32_t> ids) const {
  if (ids.empty()) throw Error(HETCOMP_INVALID_ARGUMENT, "There are no tokens: at least one is needed.");
  check_ids(model_->facts(), ids);
  if (static_cast<std::int64_t>(ids.size()) <= room()) return;
  const std::string before =
      length() > 0 ? " after the " + std::to_string(length()) + " of this session" : "";
  const ModelFacts& model = model_->facts();
  const bool shared = model.kv_tokens < model.context;
  throw Error(HETCOMP_CONTEXT_FULL, std::to_string(ids.size()) + " tokens" + before +
                                        " do not fit into the " + (shared ? "KV cache of " : "context of ") +
                                        std::to_string(model.longest()) +
                                        " positions: shorten the input, or compile with a larger " +
                                        (shared ? "--kv-tokens." : "--context."));
}

void Session::compute(Phase phase, std::span<const std::int32_t> ids, const Wanted& wanted) {
  const std::int64_t first = computed_;
  std::vector<std::int32_t> positions(ids.size());
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(first));
  const std::vector<std::int32_t> slots(ids.size(), slot_);
  const std::vector<const Adapter*> adapters(adapter_ ? ids.size() : 0, adapter_.get());
  if (phase == Phase::kPrefill) keep_checkpoint();
  begin_step();
  model_->run({phase, ids, positions, slots, wanted.logit_rows, wanted.logits, wanted.best, wanted.candidates,
               adapters});
  computed_ = first + static_cast<std::int64_t>(ids.size());
}

void Session::append(Phase phase, std::span<const std::int32_t> ids, const Wanted& wanted) {
  tokens_.reserve(tokens_.size() + ids.size());
  compute(phase, ids, wanted);
  tokens_.insert(tokens_.end(), ids.begin(), ids.end());
}

void Session::catch_up() {
  if (computed_ < length() && !checkpoints_.empty() && computed_ < checkpoints_.back().length) {
    model_->set_recurrent_state(slot_, checkpoints_.back().state);
    computed_ = checkpoints_.back().length;
  }
  const auto largest = static_cast<std::size_t>(model_->facts().max_tokens);
  while (computed_ < length()) {
    const auto rest = std::span(tokens_).subspan(static_cast<std::size_t>(computed_));
    compute(Phase::kPrefill, rest.first(std::min(largest, rest.size())), {});
  }
}

void Session::forward(std::span<const std::int32_t> ids, float* logits) {
  check(ids);
  Session* const self = this;
  const Growth growth({&self, 1}, static_cast<std::int64_t>(ids.size()), 0);
  const ModelFacts& model = model_->facts();
  const Phase phase = phase_of(ids);
  catch_up();
  const auto largest = static_cast<std::size_t>(std::min(model.max_tokens, model.max_logit_rows));
  std::vector<std::int32_t> rows(std::min(largest, ids.size()));
  std::iota(rows.begin(), rows.end(), 0);
  while (!ids.empty()) {
    const std::size_t n = std::min(largest, ids.size());
    append(phase, ids.first(n), {.logit_rows = std::span(rows).first(n), .logits = logits});
    ids = ids.subspan(n);
    logits += n * static_cast<std::size_t>(model.vocab);
  }
}

void Session::prefill(std::span<const std::int32_t> ids, float* logits, Phase phase, std::int32_t* best,
                      const CandidateRequest* candidates, std::int64_t more) {
  check(ids);
  Session* const self = this;
  Growth growth({&self, 1}, static_cast<std::int64_t>(ids.size()), more);
  catch_up();
  const auto largest = static_cast<std::size_t>(model_->facts().max_tokens);
  while (!ids.empty()) {
    const std::size_t n = std::min(largest, ids.size());
    const std::int32_t last = static_cast<std::int32_t>(n) - 1;
    const bool wanted = n == ids.size() && (logits != nullptr || best != nullptr);
    append(phase, ids.first(n), wanted ? Wanted{{&last, 1}, logits, best, candidates} : Wanted{});
    ids = ids.subspan(n);
  }
  growth.keep(more);
}

void Session::decode(Model& model, std::span<Session* const> sessions, std::span<const std::int32_t> ids,
                     float* logits) {
  if (sessions.empty())
    throw Error(HETCOMP_INVALID_ARGUMENT, "There are no sessions: at least one is needed.");
  check_ids(model.facts(), ids);
  const std::set<const Session*> different(sessions.begin(), sessions.end());
  if (different.size() != sessions.size())
    throw Error(HETCOMP_INVALID_ARGUMENT, "A session is given twice in one decode step.");
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    if (&sessions[i]->model() != &model)
      throw Error(HETCOMP_INVALID_ARGUMENT, "Session " + std::to_string(i) + " belongs to another model.");
    sessions[i]->check(ids.subspan(i, 1));
  }
  const Growth growth(sessions, 1, 0);
  for (Session* session : sessions) session->catch_up();
  const auto largest =
      static_cast<std::size_t>(std::min(model.facts().max_tokens, model.facts().max_logit_rows));
  for (std::size_t at = 0; at < sessions.size(); at += largest) {
    const std::size_t n = std::min(largest, sessions.size() - at);
    std::vector<std::int32_t> positions;
    std::vector<std::int32_t> slots;
    std::vector<std::int32_t> rows(n);
    std::vector<const Adapter*> adapters;
    std::iota(rows.begin(), rows.end(), 0);
    for (Session* session : sessions.subspan(at, n)) {
      positions.push_back(static_cast<std::int32_t>(session->length()));
      slots.push_back(session->slot_);
      adapters.push_back(session->adapter_.get());
      session->tokens_.reserve(session->tokens_.size() + 1);
      session->begin_step();
    }
    float* out = logits + at * static_cast<std::size_t>(model.facts().vocab);
    model.run({Phase::kDecode, ids.subspan(at, n), positions, slots, rows, out, nullptr, nullptr, adapters});
    for (std::size_t i = 0; i < n; ++i) {
      Session& session = *sessions[at + i];
      session.tokens_.push_back(ids[at + i]);
      session.computed_ = session.length();
    }
  }
}

}  // namespace hetcomp
