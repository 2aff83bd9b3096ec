// The GELU of the epilogue is every op's.
#pragma once

#include "gelu.h"
