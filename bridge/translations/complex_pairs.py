from typing import Any


def lower_complex(program: Any, table: Any) -> Any:
    return program
