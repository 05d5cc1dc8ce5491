#include "generation.h"

#include <algorithm>

#include "status.h"

namespace hetcomp {

Generation::Generation(Session& session, std::span<const std::int32_t> prompt, const GenerateParams& params)
    : session_(session),
      params_(params),
      pending_(prompt.begin(), prompt.end()),
      sampler_(params.sampling, params.seed),
      stops_(params.stop),
      greedy_(sampler_.greedy() && session.model().offers_best()),
      logits_(greedy_ ? 0 : static_cast<std::size_t>(session.model().facts().vocab) * sizeof(float),
              "the logits") {
  if (params.max_new_tokens < 0)
    throw Error(HETCOMP_INVALID_ARGUMENT, "The number of new tokens must be 0 or larger.");
  session.check(prompt);
  if (!params.stop.empty()) session.model().require_tokenizer();
  if (session.model().tokenizer() != nullptr) decoder_.emplace(*session.model().tokenizer());
}

bool Generation::advance() {
  const auto limit = static_cast<std::size_t>(session_.model().facts().max_tokens);
  const std::size_t n = std::min(limit, pending_.size() - fed_);
  const bool last = fed_ + n == pending_.size();
  const bool wanted = last && params_.max_new_tokens > 0;
  float* const logits = wanted && !greedy_ ? reinterpret_cast<float*>(logits_.data()) : nullptr;
  const std::span<const std::int32_t> ids = std::span(pending_).subspan(fed_, n);
  chosen_.reset();
  const CandidateRequest request{sampler_.inverse_temperature(),
                                 [&](const Candidates& found) { return choose(found, ids); }};
  const bool sampled = logits != nullptr && session_.model().offers_candidates();
  session_.prefill(ids, logits, generated_ > 0 ? Phase::kDecode : Phase::kPrefill,
                   wanted && greedy_ ? &best_ : nullptr, sampled ? &request : nullptr,
                   static_cast<std::int64_t>(pending_.size() - fed_ - n));
  fed_ += n;
  return last;
}

// The step's own tokens are not yet the session's.
bool Generation::choose(const Candidates& candidates, std::span<const std::int32_t> step_ids) {
  std::vector<std::int32_t> seen;
  if (params_.sampling.repetition_penalty != 1) {
    seen = session_.tokens();
    seen.insert(seen.end(), step_ids.begin(), step_ids.end());
  }
  chosen_ = sampler_.sample(candidates, seen);
  return chosen_.has_value();
}

std::int32_t Generation::next_id() {
  if (greedy_) return Sampler::checked(best_);
  if (chosen_) return *chosen_;
  const std::span logits(reinterpret_cast<float*>(logits_.data()),
                         static_cast<std::size_t>(session_.model().facts().vocab));
  return sampler_.sample(logits, session_.tokens());
}

hetcomp_finish Generation::finish_of(std::int32_t id) const {
  if (!params_.ignore_eos && session_.model().is_eos(id)) return HETCOMP_FINISH_EOS;
  if (stops_.matched()) return HETCOMP_FINISH_STOP;
  if (generated_ >= params_.max_new_tokens) return HETCOMP_FINISH_LENGTH;
  if (session_.room() == 0) return HETCOMP_FINISH_CONTEXT;
  return HETCOMP_FINISH_NONE;
}

void Generation::add_text() {
  if (!decoder_) return;
  token_.text = stops_.feed(decoder_->feed(token_.id));
  token_.finish = finish_of(token_.id);
  if (token_.finish == HETCOMP_FINISH_NONE || stops_.matched()) return;
  // The last token also carries what was held back; that may still complete a stop string.
  token_.text += stops_.feed(decoder_->flush());
  token_.text += stops_.flush();
}

const GeneratedToken& Generation::next() {
  token_.id = -1;
  token_.text.clear();
  if (token_.finish != HETCOMP_FINISH_NONE || !advance()) return token_;
  if (params_.max_new_tokens == 0) {
    token_.finish = HETCOMP_FINISH_LENGTH;
    return token_;
  }
  token_.id = next_id();
  ++generated_;
  token_.finish = finish_of(token_.id);
  add_text();
  pending_.assign(1, token_.id);
  fed_ = 0;
  return token_;
}

}  // namespace hetcomp
