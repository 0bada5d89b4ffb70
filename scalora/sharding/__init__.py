"""Who holds which rows of a matrix, and stacks of many layers' tensors."""

from scalora.sharding.dtensors import (
    SharedRows,
    class_under_sharding,
    everywhere,
    is_sharded,
    is_sharded_alone,
    layout,
    layouts,
    local,
    own_columns,
    own_rows,
    require_whole,
    rows_of,
    sharded_modules,
    why_not_sharded_so,
    why_not_understood,
)

__all__ = [
    "SharedRows",
    "class_under_sharding",
    "everywhere",
    "is_sharded",
    "is_sharded_alone",
    "layout",
    "layouts",
    "local",
    "own_columns",
    "own_rows",
    "require_whole",
    "rows_of",
    "sharded_modules",
    "why_not_sharded_so",
    "why_not_understood",
]
