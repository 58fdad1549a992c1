// Where the elements of an activation [batch, channel, row, column] are. Plain data, no torch.
#pragma once

#include <cstdint>

namespace vfmk {

struct Strides {  // in elements
  int64_t batch, channel, row, column;
};

}  // namespace vfmk
