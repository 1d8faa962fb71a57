// Every Metal header is this one: what a kernel text may include is a matter of the lint and of Apple's compiler.
#pragma once

#include "atomics.h"
#include "checks.h"
#include "math.h"
#include "scalars.h"
#include "simdgroup.h"
#include "simdgroup_matrix.h"
#include "sync.h"
#include "vectors.h"

#include "keywords.h"
