// One sequence: its slot in the KV cache and the tokens in it.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "model.h"

namespace hetcomp {

// One thread at a time. Every method that computes throws Error; a failed step leaves the tokens before it.
class Session {
 public:
  explicit Session(std::shared_ptr<Model> model);  // throws Error if all slots are taken
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  Model& model() const { return *model_; }
  const std::vector<std::int32_t>& tokens() const { return tokens_; }
  std::int64_t length() const { return static_cast<std::int64_t>(tokens_.size()); }
  // Tokens that it can still get if no other sequence has any.
  // How often the sequence's tokens chose each expert; see ExpertCounts::json.
  std::string expert_statistics_json() const { return model_->expert_counts().json(slot_); }
  std::int64_t room() const { return model_->facts().longest() - length(); }

  // Where the model has recurrences, those that stay are computed once more with the next tokens, from the
  // last checkpoint among them on.
  void truncate(std::int64_t length);

  // The adapter of the tokens from here on; null: none, the model as it is. Where it is another than before,
  // the session forgets its tokens: their keys and values are the other's. Throws Error.
  void set_adapter(const char* name);

  // Truncates to the longest common prefix with `ids`, at most ids.size() - 1, and returns its length. Where
  // the model has recurrences: to the last checkpoint in it, unless all tokens are in that prefix.
  std::int64_t reuse(std::span<const std::int32_t> ids);

  // Appends ids. logits: [n, vocab].
  void forward(std::span<const std::int32_t> ids, float* logits);
  // Appends ids. logits: [vocab] of the last token, or null. phase: what the statistics count it as. best:
  // null, or where the most likely next token goes, -1 where the logits are not finite (Model::offers_best).
  // candidates: null, or asked first, before the tokens are the session's (StepRequest).
  // more: tokens that will follow; positions of the pool are claimed for them too, and kept until then.
  void prefill(std::span<const std::int32_t> ids, float* logits, Phase phase, std::int32_t* best = nullptr,
               const CandidateRequest* candidates = nullptr, std::int64_t more = 0);
  void prefill(std::span<const std::int32_t> ids, float* logits) { prefill(ids, logits, phase_of(ids)); }
  // Throws Error unless 1 <= n <= room() and every id is in the vocabulary. What the pool of positions has
  // left is another matter, which is decided when they are claimed.
  void check(std::span<const std::int32_t> ids) const;

  // One token for each session, all of one model and different. logits: [n, vocab].
  static void decode(Model& model, std::span<Session* const> sessions, std::span<const std::int32_t> ids,
                     float* logits);

 private:
  // One token after others is a decode step.
  Phase phase_of(std::span<const std::int32_t> ids) const {
    return ids.size() == 1 && length() > 0 ? Phase::kDecode : Phase::kPrefill;
  }
  class Growth;
  // What a step may be asked for; see StepRequest.
  struct Wanted {
    std::span<const std::int32_t> logit_rows = {};
    float* logits = nullptr;
    std::int32_t* best = nullptr;
    const CandidateRequest* candidates = nullptr;
  };
  // Runs ids as the tokens behind those that are computed.
  void compute(Phase phase, std::span<const std::int32_t> ids, const Wanted& wanted);
  void append(Phase phase, std::span<const std::int32_t> ids, const Wanted& wanted);
  // Computes the tokens that states do not hold.
  void catch_up();
  // Of the recurrences, in front of a step of a prompt: another prompt has to be computed from there on only.
  void keep_checkpoint();
  // A step that fails leaves states of which nobody knows what they hold.
  void begin_step() {
    if (model_->facts().recurrent) computed_ = 0;
  }
  // How many of the first `length` tokens, fewer than are computed, need not be computed again: all of them,
  // or of recurrences those that a checkpoint holds.
  std::int64_t held(std::int64_t length) const;

  std::shared_ptr<Model> model_;
  std::int32_t slot_;
  std::vector<std::int32_t> tokens_;
  std::int64_t computed_ = 0;  // tokens that states hold: the first ones, mostly all
  struct Checkpoint {
    std::int64_t length;
    std::vector<std::byte> state;
  };
  std::vector<Checkpoint> checkpoints_;  // by rising length, none beyond length()
  ResidentAdapters::Use adapter_;        // null: none
};

}  // namespace hetcomp
