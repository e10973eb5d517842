// Selection of the nodes that the backward pass keeps: those of largest gradient mass, such that the others
// carry at most `tolerance` of their sample's. A histogram of the masses over quarter octaves finds the
// threshold without sorting: the top bits of a positive float64 are its exponent and quarter octave. A task
// takes a sample. A node whose elements would all be below `least` has no gradient.
//
//   macros of symbols.h
//   BINS        bins of a sample's histogram, from 2^-256 on
//   first_node  first node of each sample, and the number of all. [S + 1]
//   weight      of a sample: zero, and it has no gradient; NaN, and it keeps every node, so that it reaches
//               all gradients that the sample takes part in. [S]
//   bin         quarter octave of each node, −1 for mass zero. int16. [N]
//   kept        numbers of the kept nodes, ascending; the first `total` are. [N]

#include <cmath>
#include <vector>

#include "gradient_mass.h"
#include "threads.h"

namespace {

constexpr long long first_bin = 4 * (1023 - 256);  // of 2^-256

int bin_of(double mass) {
  if (!(mass > 0.0)) return -1;
  std::uint64_t bits;
  std::memcpy(&bits, &mass, sizeof bits);
  const long long octave = static_cast<long long>(bits >> 50) - first_bin;
  return octave < 0 ? 0 : octave < BINS ? static_cast<int>(octave) : BINS - 1;
}

}  // namespace

extern "C" void select_nodes(long long threads, const double* scores, const double* occupancy,
                             const std::int64_t* first_node, const double* weight, double tolerance,
                             double least, std::int16_t* bin, std::int64_t* kept, std::int64_t* total,
                             long long sample_count) {
  // A sample's kept nodes stand where its nodes would until all are known.
  std::vector<std::int64_t> counts(sample_count);
  std::int64_t* const count_of = counts.data();
  for_each_task(threads, sample_count, [=](long long s) {
    const std::int64_t first = first_node[s], last = first_node[s + 1];
    const bool is_live = weight[s] != 0.0, keeps_all = std::isnan(weight[s]);
    int threshold = -1;
    if (is_live && !keeps_all) {
      std::vector<double> histogram(BINS, 0.0);
      for (std::int64_t n = first; n < last; n += width) {
        const std::int64_t count = last - n < width ? last - n : width;
        double masses[width];
        store(masses, mass_of(scores + n * SYMBOLS, occupancy + n * SYMBOLS, count));
        for (std::int64_t i = 0; i < count; ++i) {
          const int b = bin_of(masses[i]);
          bin[n + i] = static_cast<std::int16_t>(b);
          if (b >= 0) histogram[b] += masses[i];
        }
      }
      double whole = 0.0, skipped = 0.0;
      for (double mass : histogram) whole += mass;
      for (threshold = 0; threshold < BINS; ++threshold) {
        skipped += histogram[threshold];
        if (!(skipped <= tolerance * whole)) break;
      }
      const int least_bin = bin_of(least / std::abs(weight[s]));
      if (threshold < least_bin) threshold = least_bin;
    }
    std::int64_t* next = kept + first;
    for (std::int64_t n = first; is_live && n < last; ++n) {
      if (keeps_all || bin[n] >= threshold) *next++ = n;
    }
    count_of[s] = next - (kept + first);
  });
  std::int64_t* next = kept;
  for (long long s = 0; s < sample_count; ++s) {
    std::memmove(next, kept + first_node[s], counts[s] * sizeof *next);
    next += counts[s];
  }
  *total = next - kept;
}
