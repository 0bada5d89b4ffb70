"""Rows of a matrix that one or several processes hold; stacks of many layers' tensors."""

from scalora.sharding.rows import (
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
    why_layout_unsupported,
    why_sharding_unsupported,
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
    "why_layout_unsupported",
    "why_sharding_unsupported",
]
