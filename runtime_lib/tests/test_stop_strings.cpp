#include <gtest/gtest.h>

#include "status.h"
#include "stop_strings.h"

namespace hetcomp {
namespace {

// Feeds one character at a time and returns all that came out, flushed if no stop string ended the text.
std::string run(const std::vector<std::string>& stops, const std::string& text, std::size_t piece) {
  StopStrings filter(stops);
  std::string out;
  for (std::size_t i = 0; i < text.size(); i += piece) out += filter.feed(text.substr(i, piece));
  return out + filter.flush();
}

TEST(StopStrings, EndsBeforeTheFirstMatchHoweverTheTextArrives) {
  const std::string text = "one two\nUser: three\n\nfour";
  for (std::size_t piece = 1; piece <= text.size(); ++piece) {
    EXPECT_EQ(run({"\nUser:"}, text, piece), "one two");
    EXPECT_EQ(run({"four", "\n\n"}, text, piece), "one two\nUser: three");
    EXPECT_EQ(run({"five"}, text, piece), text);
    EXPECT_EQ(run({}, text, piece), text);
    EXPECT_EQ(run({"four "}, text, piece), text);  // its beginning ends the text
  }
}

TEST(StopStrings, HoldsBackOnlyWhatCouldStillMatch) {
  StopStrings filter({"abac"});
  EXPECT_EQ(filter.feed("xab"), "x");
  EXPECT_EQ(filter.feed("ab"), "ab");  // "abab": the second "ab" may begin the stop string
  EXPECT_EQ(filter.feed("q"), "abq");
  EXPECT_FALSE(filter.matched());
  EXPECT_EQ(filter.feed("abac and more"), "");
  EXPECT_TRUE(filter.matched());
  EXPECT_EQ(filter.feed("more"), "");
  EXPECT_EQ(filter.flush(), "");
}

TEST(StopStrings, RefusesAnEmptyOne) { EXPECT_THROW(StopStrings({"a", ""}), Error); }

}  // namespace
}  // namespace hetcomp
