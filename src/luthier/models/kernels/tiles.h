/* Products by what the processor has: `begin_products`, `product`, `end_products`. */
#ifdef __AMX_BF16__
#include "units.h"
#else
#include "lanes.h"
#endif
