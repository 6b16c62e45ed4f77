"""A cache for compiled artifacts: a key made of plain facts names files in a local directory.

A :class:`CacheKey` holds everything that an artifact depends on; a :class:`ShapeBucket` says which sizes it serves;
:func:`environment_factors` gives the facts of this machine; a :class:`CompileCache` stores the files.

>>> import tempfile
>>> from compile_cache import CacheKey, CompileCache, Range, ShapeBucket
>>> bucket = ShapeBucket({"height": Range(16, 512, 8), "batch": Range.exactly(2)})
>>> bucket.reject({"height": 20, "batch": 2})
'height: 20 is not a multiple of 8'
>>> key = CacheKey({"model": "tiny", "shapes": bucket.to_json(), "environment": {"torch": "2.13.0"}})
>>> def build(directory):
...     _ = (directory / "code.so").write_bytes(b"machine code")
...     return {"seconds": 12.5}
>>> with tempfile.TemporaryDirectory() as location:
...     cache = CompileCache(location)
...     entry = cache.get_or_build(key, build)      # builds and stores
...     again = cache.get_or_build(key, build)      # finds it
...     again.read("code.so"), again.notes["seconds"], cache.verify().ok
(b'machine code', 12.5, True)
>>> other = CacheKey({**key.factors, "environment": {"torch": "2.12.1"}})
>>> [str(difference) for difference in key.diff(other)]
['environment.torch: 2.13.0 here, 2.12.1 there']

Importing this package imports no torch, initialises no device and compiles nothing.
"""

from .buckets import Range, ShapeBucket
from .bundle import BundleReport
from .cache import CompileCache
from .entry import Entry, Nearest, VerifyReport
from .environment import environment_factors
from .errors import (
    BuildFailed,
    BundleError,
    CacheLocationError,
    CacheWriteError,
    CompileCacheError,
    DamagedEntry,
    DamagedEntryWarning,
    PermissionsWarning,
    RemoteError,
    RemoteWarning,
    TrustError,
    UnstableFactor,
    UntrustedEntryWarning,
)
from .failures import Failure
from .keys import ABSENT, JSON, CacheKey, FactorDifference
from .limits import Limits, PruneReport, Removal
from .records import BlobRef
from .remote import Remote
from .signing import PublicKey, SigningKey, public_keys
from .sizes import SDXL_TRAINING_SIZES, ShapeBuckets, SizeBucket
from .stats import CacheStats

__all__ = [
    "ABSENT",
    "JSON",
    "SDXL_TRAINING_SIZES",
    "BlobRef",
    "BuildFailed",
    "BundleError",
    "BundleReport",
    "CacheKey",
    "CacheLocationError",
    "CacheStats",
    "CacheWriteError",
    "CompileCache",
    "CompileCacheError",
    "DamagedEntry",
    "DamagedEntryWarning",
    "Entry",
    "FactorDifference",
    "Failure",
    "Limits",
    "Nearest",
    "PermissionsWarning",
    "PruneReport",
    "PublicKey",
    "Range",
    "Remote",
    "RemoteError",
    "RemoteWarning",
    "Removal",
    "ShapeBucket",
    "ShapeBuckets",
    "SigningKey",
    "SizeBucket",
    "TrustError",
    "UnstableFactor",
    "UntrustedEntryWarning",
    "VerifyReport",
    "environment_factors",
    "public_keys",
]
