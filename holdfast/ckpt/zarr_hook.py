"""How plain zarr-python learns of bfloat16: through the one kind of entry point that it loads before it reads an array.

zarr-python 3.1 collects `zarr.data_type` entry points and never loads them; `zarr.buffer` ones it loads on the first read. So
holdfast offers zarr its own buffer class back under that heading, and registers the data types on the way.
"""

from __future__ import annotations

import logging

from zarr.buffer.cpu import Buffer

try:
    import holdfast.ckpt.dtypes  # noqa: F401
except Exception:  # whatever changes in zarr, holdfast must not be what keeps others from using it
    logging.getLogger(__name__).warning("bfloat16 and float8 could not be registered with zarr", exc_info=True)

__all__ = ["Buffer"]
