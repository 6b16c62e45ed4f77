"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, with the same ending.

    When the block ends well the file takes the place of `path`; when it does not, it is removed and `path` stays as it
    was. A link stays and what it names is replaced; a folder that is not there is made; what is no file (a device, a
    pipe) is written to itself.

    Raises:
        OSError: from making the folder or the exchange.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "new" / "figures.json"
    >>> with whole_file(place) as part:
    ...     _ = part.write_text("{}")
    ...     place.exists()
    False
    >>> place.read_text(), [path.name for path in place.parent.iterdir()]
    ('{}', ['figures.json'])
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        yield path
        return
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
