"""Reading JSON that others wrote: annotations of COCO, labelme and class lists.

`read_json` takes UTF-8, UTF-16 and UTF-32, with or without a byte order mark. `NaN` and `Infinity`, which are no JSON
but which many tools write, are read; whoever uses the value refuses it.
"""

from __future__ import annotations

import json
from typing import Any

from .archives import MAX_TEXT_BYTES, Location, location_name, read_location


def read_json(location: Location) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read, is too large or nested too deep, or is no JSON; the message has line and column.
    """
    name = location_name(location)
    content = read_location(location, MAX_TEXT_BYTES)
    if not content.strip():
        raise ValueError(f"{name}: the file is empty; copy or download it again")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{name}: no valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); a comma too many or a "
            "truncated download are the usual causes"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no valid text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deep to be an annotation file; get it from its source again") from error
