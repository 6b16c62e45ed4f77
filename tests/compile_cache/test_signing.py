"""Keys: how they are kept, which are refused, and that no private half is ever shown."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compile_cache import CompileCache, PublicKey, SigningKey, TrustError, public_keys
from compile_cache.records import Signature, encode_record
from tests.entries import one_line, read_record, record_of, signer, untrusted

pytest.importorskip("cryptography")
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa, x25519

MINE, THEIRS = signer(1), signer(2)

# ---- private keys ----------------------------------------------------------------------------------------------------


def test_a_key_is_saved_for_its_owner_only_and_comes_back(tmp_path):
    made = SigningKey.generate()
    assert made.public != SigningKey.generate().public
    umask = os.umask(0)
    try:
        made.save(tmp_path / "key")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert SigningKey.load(tmp_path / "key").public == made.public
    assert (tmp_path / "key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    (tmp_path / "key").chmod(0o400)
    assert SigningKey.load(str(tmp_path / "key")).public == made.public


def test_a_key_is_never_overwritten(tmp_path):
    MINE.save(tmp_path / "key")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for taken in ("key", "link"):
        with pytest.raises(TrustError, match="which exists"):
            THEIRS.save(tmp_path / taken)
    assert SigningKey.load(tmp_path / "key").public == MINE.public and not (tmp_path / "elsewhere").exists()
    for bad in (tmp_path / "no/such/directory", "a\0b"):
        with pytest.raises(TrustError, match="expected to write a key") as caught:
            THEIRS.save(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o666])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    MINE.save(tmp_path / "key")
    (tmp_path / "key").chmod(mode)
    with pytest.raises(TrustError, match=f"only its owner can read, got mode {mode:o}; chmod 600") as caught:
        SigningKey.load(tmp_path / "key")
    one_line(caught.value)


def private_text(private: Any, password: bytes | None = None) -> bytes:
    encryption = forms.BestAvailableEncryption(password) if password else forms.NoEncryption()
    return private.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, encryption)


NO_KEYS: dict[str, Callable[[], bytes]] = {
    "rsa": lambda: private_text(rsa.generate_private_key(65537, 2048)),
    "p-256": lambda: private_text(ec.generate_private_key(ec.SECP256R1())),
    "ed448": lambda: private_text(ed448.Ed448PrivateKey.generate()),
    "x25519": lambda: private_text(x25519.X25519PrivateKey.generate()),
    "encrypted": lambda: private_text(MINE._private, b"password"),
    "public": lambda: MINE._private.public_key().public_bytes(
        forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
    ),
    "der": lambda: MINE._private.private_bytes(forms.Encoding.DER, forms.PrivateFormat.PKCS8, forms.NoEncryption()),
    "half": lambda: private_text(MINE._private)[:60],
    "garbage": lambda: bytes(range(256)),
    "empty": lambda: b"",
}


@pytest.mark.parametrize("kind", NO_KEYS)
def test_other_kinds_of_keys_are_refused(tmp_path, kind):
    path = tmp_path / "key"
    path.write_bytes(NO_KEYS[kind]())
    path.chmod(0o600)
    with pytest.raises(TrustError, match="expected") as caught:
        SigningKey.load(path)
    one_line(caught.value)


def test_a_key_file_that_is_none(tmp_path):
    for bad in (tmp_path / "missing", tmp_path, "a\0b"):
        with pytest.raises(TrustError, match="expected a signing key") as caught:
            SigningKey.load(bad)
        assert "\n" not in str(caught.value)


def test_nothing_shows_the_private_half(tmp_path):
    private = bytes([1]) * 32
    cache = CompileCache(tmp_path, trust=MINE.public, sign_with=MINE)
    shown = " ".join([repr(MINE), str(MINE), f"{MINE}", repr([MINE]), str(vars(MINE)), repr(cache), str(vars(cache))])
    assert MINE.public.short in shown
    assert private.hex() not in shown and repr(private)[2:-1] not in shown and "AQEBAQEB" not in shown
    with pytest.raises(TypeError):
        pickle.dumps(MINE)


# ---- public keys -----------------------------------------------------------------------------------------------------


def test_public_keys_of_texts_files_and_keys(tmp_path):
    mine, theirs = MINE.public, THEIRS.public
    assert PublicKey.parse(str(mine)) == mine == PublicKey.parse(f"  {str(mine).upper()}\n")
    assert mine == PublicKey(mine.hex.upper()) and hash(mine) == hash(PublicKey(mine.hex.upper()))
    (tmp_path / "keys").write_text(f"# who builds\r\n{mine}\r\n\n   \n  # {theirs}\n  {str(mine).upper()}  \n")
    assert public_keys(tmp_path / "keys") == {mine}
    assert public_keys(str(mine)) == public_keys(mine) == public_keys([PublicKey(mine.hex.upper())]) == {mine}
    assert public_keys([tmp_path / "keys", str(theirs), theirs]) == {mine, theirs}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519:",
        "ed25519:" + "0" * 63,
        "ed25519:" + "2" * 65,
        "ed25519:" + "g" * 64,
        "ed25519:" + "\uff11" * 64,
        "ed448:" + "2" * 64,
        "2" * 64,
        f"{MINE.public} # mine",
        f"{MINE.public}\n{THEIRS.public}",
        private_text(MINE._private).decode(),
        3,
        None,
        b"ed25519:" + b"2" * 64,
    ],
)
def test_texts_that_are_no_public_key(text):
    for parse in (PublicKey.parse, lambda item: public_keys([item])):
        with pytest.raises(TrustError, match="expected a public key") as caught:
            parse(text)
        assert "MC4CAQ" not in one_line(caught.value)  # a private key, given by mistake


def test_an_empty_set_of_keys_is_refused(tmp_path):
    (tmp_path / "keys").write_text("# none yet\n\n")
    for none in ([], (), set(), tmp_path / "keys", [tmp_path / "keys"]):
        with pytest.raises(TrustError, match="at least one public key, got none"):
            CompileCache(tmp_path / "cache", trust=none)


@pytest.mark.parametrize("data", [None, b"\xff\xfe", b"ed25519:12\n", b"-----BEGIN PRIVATE KEY-----\n"])
def test_files_without_public_keys(tmp_path, data):
    if data is not None:
        (tmp_path / "keys").write_bytes(data)
    with pytest.raises(TrustError, match="expected") as caught:
        public_keys(tmp_path / "keys")
    one_line(caught.value)
    with pytest.raises(TrustError, match="expected a file of public keys"):
        public_keys(Path("a\0b"))


FIELD = 2**255 - 19
EIGHTH = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
LOW_ORDER = sorted(
    (number | sign).to_bytes(32, "little").hex()
    for number in (0, 1, FIELD - 1, EIGHTH, FIELD - EIGHTH, FIELD, FIELD + 1)
    for sign in (0, 1 << 255)
)


@pytest.mark.parametrize("hexadecimal", LOW_ORDER)
def test_keys_under_which_anybody_can_sign_are_refused(tmp_path, hexadecimal):
    for trust in (f"ed25519:{hexadecimal}", PublicKey(hexadecimal), [MINE.public, f"ed25519:{hexadecimal.upper()}"]):
        with pytest.raises(TrustError, match="under which anybody can sign") as caught:
            CompileCache(tmp_path, trust=trust)
        one_line(caught.value)


def test_the_all_zero_key_really_accepts_what_nobody_signed(unsigned):
    record, zero = read_record(unsigned), PublicKey("0" * 64)
    identity = Signature(zero.hex, "01" + "00" * 63)  # R is the neutral point, S is 0
    assert any(zero.verifies(replace(record, notes={"n": n}), identity) for n in range(100))
    signed = record.with_signature(identity)  # as one more signature it harms nobody
    record_of(unsigned).write_bytes(encode_record(signed))
    assert "ed25519:000000000000" in untrusted(CompileCache(unsigned, trust=MINE.public))
