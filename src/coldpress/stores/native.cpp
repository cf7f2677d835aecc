// Attention of one query per head over stored pairs, some of them codes: what attend/native.py compiles and calls.
//
// Made for one kind of pairs at a time, by -D: NUMBER (0 float32, 1 bfloat16, 2 float16), KEY_BITS and VALUE_BITS
// (8, 4, 2), KEY_CHANNELS and VALUE_CHANNELS. Codes are RotatedBits' (stores/rotated.py): queries for them are rotated.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
constexpr int64_t kTile = 16;  // rows that are multiplied, or added up, together
constexpr int64_t kPairs = 512;  // of a task: their codes and weights stay in the processor's own memory

#if NUMBER == 0
using Number = float;
inline float number(Number x) { return x; }
#elif NUMBER == 1
using Number = uint16_t;
inline float number(Number x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float found;
  std::memcpy(&found, &bits, sizeof(found));
  return found;
}
#else
using Number = _Float16;
inline float number(Number x) { return static_cast<float>(x); }
#endif

// Codes of a row, and channels with those that fill up its last byte.
constexpr int kKeyBytes = (KEY_CHANNELS * KEY_BITS + 7) / 8, kKeyCodes = kKeyBytes * (8 / KEY_BITS);
constexpr int kValueBytes = (VALUE_CHANNELS * VALUE_BITS + 7) / 8, kValueCodes = kValueBytes * (8 / VALUE_BITS);
#if VALUE_BITS == 8
using Step = float;
#else
using Step = _Float16;
#endif
constexpr int kSteps = 2 * sizeof(Step);  // of a value: its step and least number
constexpr int kWidest = std::max({KEY_CHANNELS, VALUE_CHANNELS, kKeyCodes, kValueCodes});

// e^x to the last bits of float32, 0 where x is below -87, and NaN of NaN: in loops that a compiler makes vectors of.
inline float exponential(float x) {
  const float whole = std::nearbyint(x * 1.44269504f);
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(x < -87.0f ? 0.0f : whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? 0.0f : sum * power;
}

// The codes of a row; of channels that share a byte the first of all bytes come first, then the second.
template <int kBits, int kBytes, int kFlip = 0>
inline void unpack(const uint8_t* __restrict row, float* __restrict codes) {
  constexpr int kMost = (1 << kBits) - 1;
  for (int b = 0; b < kBytes; ++b) {
    const int byte = row[b] ^ kFlip;
    for (int i = 0; i < 8 / kBits; ++i) codes[i * kBytes + b] = (byte >> (i * kBits)) & kMost;
  }
}

// Products of one query with the rows of a tile.
template <int kChannels>
inline void products(const float* __restrict query, const float (*__restrict rows)[kWidest], float* __restrict found) {
  float sums[kTile] = {};
  for (int d = 0; d < kChannels; ++d)
    for (int r = 0; r < kTile; ++r) sums[r] += query[d] * rows[r][d];
  for (int r = 0; r < kTile; ++r) found[r] = sums[r];
}

// Numbers that begin where a vector register's worth does: loops over them add up in the same order in every call.
class Floats {
 public:
  explicit Floats(int64_t n) : lines_((n + 15) / 16) {}
  float* data() { return lines_.empty() ? nullptr : lines_[0].numbers; }
  float& operator[](int64_t i) { return lines_[i / 16].numbers[i % 16]; }

 private:
  struct alignas(64) Line {
    float numbers[16] = {};
  };
  std::vector<Line> lines_;
};

struct Task {
  int64_t segment, first, n;
  bool is_coded;
};

}  // namespace

// Where not said otherwise, arrays have one number for each of n_segments.
extern "C" void attend(
    int64_t n_segments, int64_t group, int64_t n_threads,
    const float* queries, const float* rotated,  // [n_segments, group, KEY_CHANNELS], scaled
    const Number* keys, const Number* values, const int64_t* exact_start, const int64_t* n_exact,
    const uint8_t* key_codes, const _Float16* key_step, const _Float16* key_least, const uint8_t* value_rows,
    const int64_t* codes_start, const int64_t* n_codes, const int64_t* n_front,
    const float* const* bias,  // null, or of each segment null or a bias of each pair in the order of the text
    float softcap,             // 0: none
    const float* sinks,        // null, or [n_segments, group]
    float* of_codes, float* of_exact) {  // [n_segments, group, VALUE_CHANNELS], which add up; the first is rotated
  std::vector<Task> tasks;
  for (int64_t s = 0; s < n_segments; ++s)
    for (const bool is_coded : {true, false}) {
      const int64_t n = is_coded ? n_codes[s] : n_exact[s];
      for (int64_t i = 0; i < n; i += kPairs) tasks.push_back({s, i, std::min(kPairs, n - i), is_coded});
    }
  const int64_t n_tasks = static_cast<int64_t>(tasks.size()), n_heads = n_segments * group;

  // Queries with channels in the order that codes are unpacked in, and their sums.
  Floats own(n_heads * kKeyCodes), total(n_heads);
  for (int64_t h = 0; h < n_heads; ++h)
    for (int d = 0; d < KEY_CHANNELS; ++d) {
      constexpr int per_byte = 8 / KEY_BITS;
      own[h * kKeyCodes + d % per_byte * kKeyBytes + d / per_byte] = rotated[h * KEY_CHANNELS + d];
      total[h] += rotated[h * KEY_CHANNELS + d];
    }

  // Of each task and head of the group: the largest logit, the sum of weights, and the weighted sum of values.
  Floats most(n_tasks * group), mass(n_tasks * group), leasts(n_tasks * group), sums(n_tasks * group * kWidest);
#pragma omp parallel num_threads(n_threads)
  {
    Floats weights(group * kPairs);
    alignas(64) float tile[kTile][kWidest] = {};  // rows of keys or values as numbers
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < n_tasks; ++t) {
      const Task task = tasks[t];
      const int64_t s = task.segment, start = task.first + (task.is_coded ? codes_start[s] : exact_start[s]);
      for (int64_t j = 0; j < task.n; j += kTile) {
        const int64_t n = std::min(kTile, task.n - j);
        float found[kTile];
        std::fill(tile[n], tile[kTile], 0.0f);  // the last tile may have fewer rows
        for (int64_t r = 0; r < n; ++r) {
          const int64_t at = start + j + r;
          if (task.is_coded) unpack<KEY_BITS, kKeyBytes, KEY_BITS == 8 ? 128 : 0>(key_codes + at * kKeyBytes, tile[r]);
          else
            for (int d = 0; d < KEY_CHANNELS; ++d) tile[r][d] = number(keys[at * KEY_CHANNELS + d]);
        }
        for (int64_t g = 0; g < group; ++g) {
          const int64_t h = s * group + g;
          if (task.is_coded) products<kKeyCodes>(&own[h * kKeyCodes], tile, found);
          else products<KEY_CHANNELS>(queries + h * KEY_CHANNELS, tile, found);
          for (int64_t r = 0; r < n; ++r) {
            const int64_t at = start + j + r;
            if (task.is_coded)
              found[r] = found[r] * static_cast<float>(key_step[at]) + total[h] * static_cast<float>(key_least[at]);
            weights[g * kPairs + j + r] = found[r];
          }
        }
      }
      for (int64_t g = 0; g < group; ++g) {
        float* __restrict weight = &weights[g * kPairs];
        if (softcap > 0)
          for (int64_t j = 0; j < task.n; ++j) weight[j] = std::tanh(weight[j] / softcap) * softcap;
        if (bias != nullptr && bias[s] != nullptr)
          for (int64_t j = 0; j < task.n; ++j) {
            const int64_t i = task.first + j, before = n_front[s];
            weight[j] += bias[s][task.is_coded ? before + i : i < before ? i : i + n_codes[s]];
          }
        float largest = kNone, sum = 0;
        for (int64_t j = 0; j < task.n; ++j) largest = weight[j] > largest ? weight[j] : largest;
        if (largest == kNone) std::fill(weight, weight + task.n, 0.0f);
        else
          for (int64_t j = 0; j < task.n; ++j) {
            weight[j] = exponential(weight[j] - largest);
            sum += weight[j];
          }
        most[t * group + g] = largest;
        mass[t * group + g] = sum;
      }
      for (int64_t j = 0; j < task.n; j += kTile) {
        const int64_t n = std::min(kTile, task.n - j);
        std::fill(tile[n], tile[kTile], 0.0f);
        float step[kTile] = {}, least[kTile] = {};
        for (int64_t r = 0; r < n; ++r) {
          const int64_t at = start + j + r;
          if (task.is_coded) {
            const uint8_t* stored = value_rows + at * (kValueBytes + kSteps);
            Step steps[2];
            std::memcpy(steps, stored + kValueBytes, sizeof(steps));
            step[r] = static_cast<float>(steps[0]), least[r] = static_cast<float>(steps[1]);
            unpack<VALUE_BITS, kValueBytes>(stored, tile[r]);
          } else {
            step[r] = 1.0f;
            for (int d = 0; d < VALUE_CHANNELS; ++d) tile[r][d] = number(values[at * VALUE_CHANNELS + d]);
          }
        }
        for (int64_t g = 0; g < group; ++g) {
          float own_step[kTile] = {};
          for (int64_t r = 0; r < n; ++r) {
            own_step[r] = weights[g * kPairs + j + r] * step[r];
            leasts[t * group + g] += weights[g * kPairs + j + r] * least[r];
          }
          float* __restrict sum = &sums[(t * group + g) * kWidest];
          for (int d = 0; d < kWidest; ++d)
            for (int r = 0; r < kTile; ++r) sum[d] += own_step[r] * tile[r][d];
        }
      }
    }
  }

  Floats largest(n_heads), all(n_heads);
  for (int64_t h = 0; h < n_heads; ++h) largest[h] = sinks != nullptr ? sinks[h] : kNone;
  for (int64_t t = 0; t < n_tasks; ++t)
    for (int64_t g = 0; g < group; ++g) {
      float& own_largest = largest[tasks[t].segment * group + g];
      own_largest = std::max(own_largest, most[t * group + g]);
    }
  if (sinks != nullptr)
    for (int64_t h = 0; h < n_heads; ++h) all[h] = exponential(sinks[h] - largest[h]);
  std::fill(of_codes, of_codes + n_heads * VALUE_CHANNELS, 0.0f);
  std::fill(of_exact, of_exact + n_heads * VALUE_CHANNELS, 0.0f);
  for (int64_t t = 0; t < n_tasks; ++t)
    for (int64_t g = 0; g < group; ++g) {
      const int64_t h = tasks[t].segment * group + g, own_task = t * group + g;
      if (most[own_task] == kNone) continue;
      const float scale = exponential(most[own_task] - largest[h]);
      all[h] += mass[own_task] * scale;
      const float* __restrict sum = &sums[own_task * kWidest];
      constexpr int per_byte = 8 / VALUE_BITS;
      if (tasks[t].is_coded)
        for (int d = 0; d < VALUE_CHANNELS; ++d) {
          const float codes = sum[d % per_byte * kValueBytes + d / per_byte];
          of_codes[h * VALUE_CHANNELS + d] += (codes + leasts[own_task]) * scale;
        }
      else
        for (int d = 0; d < VALUE_CHANNELS; ++d) of_exact[h * VALUE_CHANNELS + d] += sum[d] * scale;
    }
  for (int64_t h = 0; h < n_heads; ++h)
    for (int d = 0; d < VALUE_CHANNELS; ++d) {
      of_codes[h * VALUE_CHANNELS + d] /= all[h];
      of_exact[h * VALUE_CHANNELS + d] /= all[h];
    }
}
