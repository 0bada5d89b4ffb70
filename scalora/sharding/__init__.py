"""Rows of a matrix that one or several processes hold."""

from scalora.sharding.rows import (
    class_under_sharding,
    everywhere,
    gradients,
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
    stack,
    why_layout_unsupported,
    why_sharding_unsupported,
)

__all__ = [
    "class_under_sharding",
    "everywhere",
    "gradients",
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
    "stack",
    "why_layout_unsupported",
    "why_sharding_unsupported",
]
