"""Ed25519 signatures: who vouches for an entry.

A checksum beside a file proves nothing about who wrote it. A signature covers the manifest of an entry (its key, its
factors, its notes, and the SHA-256 of every file) and so every byte that is ever loaded. Keys are text,
``ed25519:<64 hexadecimal digits>``; ``cryptography`` does the mathematics, and is needed only where signatures are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .errors import TrustError, one_line
from .records import Record, Signature

_PREFIX: Final = "ed25519:"
_MAX_FILE: Final = 1 << 16  # bytes that are read of a private key
_KEY: Final = re.compile(r"ed25519:[0-9a-f]{64}")
_FIELD: Final = 2**255 - 19
_EIGHTH: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
# The y of the eight points whose order divides 8. Under a key that is one of them, anybody can sign: a placeholder of
# zeros is such a key.
_LOW_ORDER: Final = {0, 1, _FIELD - 1, _EIGHTH, _FIELD - _EIGHTH}


@dataclass(frozen=True, order=True)
class PublicKey:
    """A key that signatures are checked with.

    Attributes:
        hex: its 32 bytes as 64 lower-case hexadecimal digits.
    """

    hex: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "hex", self.hex.lower())

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Return the key that ``ed25519:...`` names.

        Raises:
            TrustError: if the text is no such key, or one under which anybody can sign.
        """
        if not isinstance(text, str) or not _KEY.fullmatch(text.strip().lower()):
            raise TrustError(  # shows little: it may be a private key, by mistake
                f"expected a public key, ed25519: and 64 hexadecimal digits, got {one_line(repr(text), 30)}; "
                "compile-cache keygen prints one"
            )
        key = cls(text.strip().lower().removeprefix(_PREFIX))
        if (int.from_bytes(bytes.fromhex(key.hex), "little") & (2**255 - 1)) % _FIELD in _LOW_ORDER:
            raise TrustError(
                f"expected a public key that somebody holds the private half of, got {key.short}, "
                "under which anybody can sign; compile-cache keygen makes one"
            )
        return key

    @property
    def short(self) -> str:
        """The beginning of the key, for messages."""
        return f"{_PREFIX}{self.hex[:12]}"

    def verifies(self, record: Record, signature: Signature) -> bool:
        """Whether the signature is this key's, over this record."""
        crypto = _ed25519()
        try:
            key = crypto.Ed25519PublicKey.from_public_bytes(bytes.fromhex(self.hex))
            key.verify(bytes.fromhex(signature.value), record.signed_bytes())
        except Exception as error:  # InvalidSignature, or a ValueError where the bytes are no point of the curve
            if isinstance(error, ValueError) or type(error).__name__ == "InvalidSignature":
                return False
            raise
        return True

    def __str__(self) -> str:
        return f"{_PREFIX}{self.hex}"


class SigningKey:
    """A private Ed25519 key. Whoever holds it decides what trusting processes load: keep it out of images."""

    def __init__(self, private: Any) -> None:
        self._private = private

    @classmethod
    def generate(cls) -> SigningKey:
        """Return a new key from the system's random numbers."""
        return cls(_ed25519().Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SigningKey:
        """Return the key that :meth:`save` wrote, or any unencrypted Ed25519 key in PEM.

        Raises:
            TrustError: if the file cannot be read, holds no such key, or can be read by other users.
        """
        crypto = _ed25519()
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(_MAX_FILE)
        except (OSError, ValueError) as error:
            got = one_line(getattr(error, "strerror", error))
            raise TrustError(f"expected a signing key at {path}, got {got}; make one with keygen") from error
        if mode & 0o077:
            got = f"{mode & 0o777:o}"
            raise TrustError(f"expected a signing key that only its owner can read, got mode {got}; chmod 600 {path}")
        try:
            private = load_pem_private_key(data, password=None)
        except Exception as error:
            got = one_line(error, 80)
            raise TrustError(f"expected a private key in PEM at {path}, got {got}; give another file") from error
        if not isinstance(private, crypto.Ed25519PrivateKey):
            raise TrustError(f"expected an Ed25519 key at {path}, got {type(private).__name__}; make one with keygen")
        return cls(private)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the key as PEM (PKCS 8), readable by its owner only.

        Raises:
            TrustError: if the file exists (a key that is overwritten is lost) or cannot be written.
        """
        _ed25519()
        from cryptography.hazmat.primitives import serialization as forms

        data = self._private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(data)
        except FileExistsError as error:
            raise TrustError(f"expected a new file for the key, got {path}, which exists; give another name") from error
        except (OSError, ValueError) as error:
            got = one_line(getattr(error, "strerror", error))
            raise TrustError(f"expected to write a key to {path}, got {got}; give another name") from error

    @classmethod
    def from_private_bytes(cls, raw: bytes) -> SigningKey:
        """The key that :meth:`private_bytes` gave."""
        return cls(_ed25519().Ed25519PrivateKey.from_private_bytes(raw))

    def private_bytes(self) -> bytes:
        """The secret itself, 32 bytes: for a pipe to a process of one's own. It is never pickled along."""
        raw: bytes = self._private.private_bytes_raw()
        return raw

    @property
    def public(self) -> PublicKey:
        """The key that its signatures are checked with."""
        return PublicKey(self._private.public_key().public_bytes_raw().hex())

    def sign(self, record: Record) -> Record:
        """Return the record with this key's signature."""
        value = self._private.sign(record.signed_bytes()).hex()
        return record.with_signature(Signature(self.public.hex, value))

    def __repr__(self) -> str:
        return f"SigningKey({self.public.short})"  # nothing of the private half


Keys = str | PublicKey | os.PathLike[str] | Iterable["str | PublicKey | os.PathLike[str]"]


def public_keys(trust: Keys) -> frozenset[PublicKey]:
    """Return a set of keys from one or several of: a :class:`PublicKey`, its text, the path of a file of such texts.

    A file holds one key per line; empty lines and those that begin with ``#`` are left out.

    Raises:
        TrustError: if something is no key, a file cannot be read, or no key is named at all (an empty set would refuse
            everything, which is hardly what was meant).
    """
    several = [trust] if isinstance(trust, str | PublicKey | os.PathLike) else list(trust)
    found: set[PublicKey] = set()
    for item in several:
        if isinstance(item, os.PathLike):
            found.update(_keys_of_file(Path(item)))
        else:
            found.add(PublicKey.parse(str(item) if isinstance(item, PublicKey) else item))
    if not found:
        raise TrustError("trust: expected at least one public key, got none; leave trust out to load unsigned entries")
    _ed25519()  # told now, not at the first request
    return frozenset(found)


def refusal(record: Record, trust: frozenset[PublicKey]) -> str | None:
    """Return None if a trusted key signed the record, otherwise why it may not be loaded, in one line."""
    trusted = {key.hex: key for key in trust}
    own = [signature for signature in record.signatures if signature.key in trusted]
    if any(trusted[signature.key].verifies(record, signature) for signature in own):
        return None
    if own:
        return f"its signature by {trusted[own[0].key].short} does not match its manifest"
    if record.signatures:
        signers = ", ".join(PublicKey(signature.key).short for signature in record.signatures[:3])
        return f"it is signed by {signers}, not by a trusted key ({_some(trust)})"
    return f"it is not signed by a trusted key ({_some(trust)})"


def _some(keys: Iterable[PublicKey]) -> str:
    shown = sorted(keys)
    return ", ".join(key.short for key in shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _keys_of_file(path: Path) -> list[PublicKey]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        got = one_line(error, 120)
        raise TrustError(f"expected a file of public keys at {path}, got {got}; give its path") from error
    return [PublicKey.parse(line) for line in map(str.strip, lines) if line and not line.startswith("#")]


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise TrustError(
            "expected the package cryptography, which signatures need, got none; pip install cryptography"
        ) from error
    return ed25519
