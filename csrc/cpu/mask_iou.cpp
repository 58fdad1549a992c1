// Intersection over union of upsampled masks with one target, without the upsampled masks.
//
// Two bilinear interpolations in a row are one linear map of rows and one of columns, with at most
// four taps each (three where the first enlarges: two neighbours share one). Both maps, the target
// as bits and its column sums are made once for a call and serve every mask.
//
// An interpolated value lies between its taps. So for each mask the logits become bits, above the
// threshold or not; for output rows with the same taps, those rows' bits are ANDed and ORed; and a
// word of 64 output columns whose taps are all above, or all not, needs no interpolation: its share
// is the number of columns, or of target bits in a summed table. Of the other words, only the
// vectors that a contour crosses are computed: taps of rows first, in LANES low-resolution columns
// at a time, then taps of columns, which a shuffle finds in one vector if LANES outputs reach no
// farther than LANES logits.
//
// Memory, for K masks of hw logits of s bytes: Khws, once; the rest stays in cache.
#include "../mask_iou.h"

#include <cstring>

#include "../parallel.h"
#include "integers.h"
#include "vector.h"

namespace vfmk::mask_iou::cpu::VFMK_ISA {
namespace {

constexpr int64_t WORD = 64;
constexpr int TAPS = 4;

// Where output `position` of one interpolation reads: as PyTorch computes it, in fp32.
struct Source {
  int64_t low, high;
  float share;  // of high

  Source(int64_t position, int64_t from, int64_t to) {
    const float ratio = static_cast<float>(from) / static_cast<float>(to);
    const float at = ratio * (static_cast<float>(position) + 0.5f) - 0.5f;
    const float inside = at < 0 ? 0 : at;
    low = minimum(static_cast<int64_t>(inside), from - 1);
    high = minimum(low + 1, from - 1);
    share = minimum_float(inside - static_cast<float>(low), 1);
  }
  static float minimum_float(float a, float b) { return a < b ? a : b; }
};

// The taps of one output row or column in low resolution, in ascending order; unused ones weigh
// nothing and repeat the last.
struct Taps {
  int32_t position[TAPS];
  float weight[TAPS];

  Taps(int64_t output, int64_t outputs, int64_t cut, int64_t image_size, int64_t low) {
    int count = 0;
    const Source last(output, cut, outputs);
    for (int upper = 0; upper < 2; ++upper) {
      const Source first(upper ? last.high : last.low, low, image_size);
      const float share = upper ? last.share : 1 - last.share;
      add(first.low, share * (1 - first.share), count);
      add(first.high, share * first.share, count);
    }
    for (int t = count; t < TAPS; ++t) position[t] = position[count - 1], weight[t] = 0;
  }

 private:
  void add(int64_t at, float share, int& count) {
    for (int t = 0; t < count; ++t) {
      if (position[t] == at) {
        weight[t] += share;
        return;
      }
    }
    position[count] = static_cast<int32_t>(at);
    weight[count++] = share;
  }
};

// Low-resolution columns first ... last, and where their bits lie in a row of words.
struct Range {
  int64_t first, last;
  uint64_t mask;  // of last - first + 1 bits; 0 if those do not fit into one word

  Range(int64_t first, int64_t last)
      : first(first),
        last(last),
        mask(last - first < WORD ? ~uint64_t{0} >> (WORD - 1 - (last - first)) : 0) {}

  // The bits, from bit 0 on; a row has a word more than it needs.
  uint64_t bits(const uint64_t* row) const {
    const int64_t word = first / WORD, shift = first % WORD;
    return (row[word] >> shift | (row[word + 1] << 1) << (WORD - 1 - shift)) & mask;
  }
  bool none(const uint64_t* any) const { return mask != 0 && bits(any) == 0; }
  bool every(const uint64_t* all) const { return mask != 0 && bits(all) == mask; }
};

// LANES output columns.
struct Columns {
  Lane offset[TAPS];  // of each tap from `first`
  Vec weight[TAPS];
  Range range;
  bool near;  // every offset is below LANES
};

// Eight bytes of 0 or 1 as eight bits: the product brings byte n to bit 56 + n.
inline uint64_t pack(const uint8_t* bytes) {
  uint64_t eight;
  std::memcpy(&eight, bytes, sizeof eight);
  return eight * 0x0102040810204080 >> 56;
}

struct Tables {
  Taps* rows;        // [height]
  Columns* columns;  // [words * WORD / LANES]
  Range* ranges;     // [words]
  uint64_t* target;  // [height][words]
  int32_t* sums;     // [height + 1][words]: target bits of the rows above
  int64_t words, low_words, low_rows, bytes, target_bits;
  int taps;

  Tables(const Problem& problem, void* workspace) {
    words = ceil_div(problem.width, WORD);
    low_words = ceil_div(problem.low_width, WORD);
    char* memory = static_cast<char*>(workspace);
    const auto take = [&](int64_t size) {
      char* const taken = memory;
      memory += round_up(size, 64);
      return taken;
    };
    columns = reinterpret_cast<Columns*>(take(words * (WORD / LANES) * sizeof(Columns)));
    rows = reinterpret_cast<Taps*>(take(problem.height * sizeof(Taps)));
    ranges = reinterpret_cast<Range*>(take(words * sizeof(Range)));
    target = reinterpret_cast<uint64_t*>(take(problem.height * words * sizeof(uint64_t)));
    sums = reinterpret_cast<int32_t*>(take((problem.height + 1) * words * sizeof(int32_t)));
    bytes = memory - static_cast<char*>(workspace);
  }

  void fill(const Problem& problem, const uint8_t* mask) {
    taps = 3;
    for (int64_t y = 0; y < problem.height; ++y) {
      rows[y] =
          Taps(y, problem.height, problem.input_height, problem.image_size, problem.low_height);
      if (rows[y].weight[3] != 0) taps = 4;
    }
    low_rows = rows[problem.height - 1].position[TAPS - 1] + 1;
    for (int64_t v = 0; v < words * (WORD / LANES); ++v) fill_columns(problem, v);
    for (int64_t w = 0; w < words; ++w) sums[w] = 0;
    for (int64_t y = 0; y < problem.height; ++y) {
      for (int64_t w = 0; w < words; ++w) {
        uint64_t bits = 0;
        const int64_t count = minimum(problem.width - w * WORD, WORD);
        const uint8_t* from = mask + y * problem.width + w * WORD;
        int64_t n = 0;
        for (; n + 8 <= count; n += 8) bits |= pack(from + n) << n;
        for (; n < count; ++n) bits |= static_cast<uint64_t>(from[n]) << n;
        target[y * words + w] = bits;
        sums[(y + 1) * words + w] = sums[y * words + w] + __builtin_popcountll(bits);
      }
    }
    target_bits = 0;
    for (int64_t w = 0; w < words; ++w) target_bits += sums[problem.height * words + w];
  }

 private:
  void fill_columns(const Problem& problem, int64_t v) {
    Columns& to = columns[v];
    int32_t first = INT32_MAX, last = 0;
    for (int t = 0; t < TAPS; ++t) to.offset[t] = Lane{}, to.weight[t] = Vec{};
    for (int lane = 0; lane < LANES; ++lane) {  // beyond the width: the last column again
      const Taps column(minimum(v * LANES + lane, problem.width - 1), problem.width,
                        problem.input_width, problem.image_size, problem.low_width);
      for (int t = 0; t < TAPS; ++t) {
        to.offset[t][lane] = column.position[t];
        to.weight[t][lane] = column.weight[t];
        if (column.position[t] < first) first = column.position[t];
        if (column.position[t] > last) last = column.position[t];
      }
      if (column.weight[3] != 0) taps = 4;
    }
    for (int t = 0; t < TAPS; ++t) to.offset[t] -= first;
    to.range = Range(first, last);
    to.near = last - first < LANES;
    Range& word = ranges[v / (WORD / LANES)];
    word = Range(v % (WORD / LANES) == 0 ? first : word.first, last);
  }
};

// One bit a lane.
inline uint64_t bits_of(Lane mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask);
#else
  uint64_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= static_cast<uint64_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

// Bits of the logits above the threshold.
template <typename Format>
void find_above(const Problem& problem, const Tables& tables,
                const typename Format::Element* logits, uint64_t* above) {
  const int64_t words = tables.low_words;
  for (int64_t row = 0; row < tables.low_rows; ++row) {
    for (int64_t w = 0; w < words; ++w) {
      uint64_t bits = 0;
      for (int64_t n = 0; n < WORD; n += LANES) {
        const int64_t rest = problem.low_width - w * WORD - n;
        if (rest <= 0) break;
        const Lane mask = load<Format>(logits + w * WORD + n, rest) > problem.threshold;
        const uint64_t valid = rest >= LANES ? ~uint64_t{0} : (uint64_t{1} << rest) - 1;
        bits |= (bits_of(mask) & valid) << n;
      }
      above[w] = bits;
    }
    logits += problem.row_stride;
    above += words;
  }
}

// What of a word is known from its taps' bits, and which of its vectors must be computed.
struct Word {
  uint64_t ones = 0, unknown = 0;

  Word(const Columns* columns, const uint64_t* all, const uint64_t* any) {
    for (int64_t n = 0; n < WORD / LANES; ++n) {
      const Range& range = columns[n].range;
      if (range.none(any)) continue;
      if (range.every(all)) {
        ones |= (~uint64_t{0} >> (WORD - LANES)) << (n * LANES);
      } else {
        unknown |= uint64_t{1} << n;
      }
    }
  }
};

// The bits of a word of an output row: of each unknown vector, rows first, then columns.
template <typename Format, int COUNT>
uint64_t interpolate(const Problem& problem, const Word& word, const Columns* vectors,
                     const Taps& row, const typename Format::Element* logits) {
  uint64_t bits = word.ones;
#pragma GCC unroll 4
  for (int64_t n = 0; n < WORD / LANES; ++n) {
    if ((word.unknown >> n & 1) == 0) continue;
    const Columns& columns = vectors[n];
    const auto* from = logits + columns.range.first;
    Vec value = {};
    if (columns.near) {
      Vec mixed = {};
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t) {
        mixed += row.weight[t] * load<Format>(from + row.position[t] * problem.row_stride,
                                              problem.low_width - columns.range.first);
      }
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t) {
        value += columns.weight[t] * __builtin_shuffle(mixed, columns.offset[t]);
      }
    } else {
      for (int t = 0; t < COUNT; ++t) {
        for (int lane = 0; lane < LANES; ++lane) {
          const auto* column = from + columns.offset[t][lane];
          for (int r = 0; r < COUNT; ++r) {
            const float logit = load<Format>(column + row.position[r] * problem.row_stride, 1)[0];
            value[lane] += columns.weight[t][lane] * row.weight[r] * logit;
          }
        }
      }
    }
    bits |= bits_of(value > problem.threshold) << (n * LANES);
  }
  return bits;
}

bool same_rows(const Taps& a, const Taps& b) {
  for (int t = 0; t < TAPS; ++t) {
    if (a.position[t] != b.position[t]) return false;
  }
  return true;
}

template <typename Format, int COUNT>
float iou_of(const Problem& problem, const Tables& tables, const typename Format::Element* logits,
             void* memory) {
  // Per thread: bits of the logits | of one group of rows, all and any.
  const int64_t low_words = tables.low_words;
  uint64_t* above = static_cast<uint64_t*>(memory);
  uint64_t* all = above + tables.low_rows * low_words;
  uint64_t* any = all + low_words + 1;
  find_above<Format>(problem, tables, logits, above);

  int64_t area = 0, intersection = 0;
  for (int64_t top = 0, bottom; top < problem.height; top = bottom) {
    const Taps& group = tables.rows[top];
    for (bottom = top + 1; bottom < problem.height; ++bottom) {
      if (!same_rows(group, tables.rows[bottom])) break;
    }
    uint64_t nothing = 0;
    for (int64_t w = 0; w < low_words; ++w) {
      all[w] = any[w] = above[group.position[0] * low_words + w];
      for (int t = 1; t < COUNT; ++t) {
        all[w] &= above[group.position[t] * low_words + w];
        any[w] |= above[group.position[t] * low_words + w];
      }
      nothing |= any[w];
    }
    if (nothing == 0) continue;
    for (int64_t w = 0; w < tables.words; ++w) {
      if (tables.ranges[w].none(any)) continue;
      const int64_t columns = minimum(problem.width - w * WORD, WORD);
      if (tables.ranges[w].every(all)) {
        area += (bottom - top) * columns;
        intersection +=
            tables.sums[bottom * tables.words + w] - tables.sums[top * tables.words + w];
        continue;
      }
      const uint64_t valid = ~uint64_t{0} >> (WORD - columns);
      const Columns* vectors = tables.columns + w * (WORD / LANES);
      const Word word(vectors, all, any);
      for (int64_t y = top; y < bottom; ++y) {
        const uint64_t bits =
            valid & interpolate<Format, COUNT>(problem, word, vectors, tables.rows[y], logits);
        area += __builtin_popcountll(bits);
        intersection += __builtin_popcountll(bits & tables.target[y * tables.words + w]);
      }
    }
  }
  const int64_t either = area + tables.target_bits - intersection;
  return either == 0 ? 0 : static_cast<float>(static_cast<double>(intersection) / either);
}

template <typename Format>
void forward_masks(const Problem& problem, const Arguments& arguments) {
  Tables tables(problem, arguments.workspace);
  tables.fill(problem, arguments.target);
  const auto* logits = static_cast<const typename Format::Element*>(arguments.logits);
  const auto run = tables.taps == 3 ? iou_of<Format, 3> : iou_of<Format, 4>;
  const auto body = [&](int64_t begin, int64_t end) {
    const int64_t bits = (tables.low_rows + 2) * tables.low_words + 2;
    float* memory = thread_scratch(2 * bits);
    for (int64_t k = begin; k < end; ++k) {
      arguments.iou[k] = run(problem, tables, logits + k * problem.mask_stride, memory);
    }
  };
  parallel_for(problem.masks, 1, body);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) { return Tables(problem, nullptr).bytes; }

void forward(const Problem& problem, const Arguments& arguments) {
  with_format(problem.dtype,
              [&](auto format) { forward_masks<decltype(format)>(problem, arguments); });
}

}  // namespace vfmk::mask_iou::cpu::VFMK_ISA
