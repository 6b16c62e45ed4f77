"""Trust: nothing is loaded that no trusted key signed.

The other side is somebody who can write into the directory of the cache, or who hands over a file.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compile_cache import (
    BundleError,
    CacheKey,
    CompileCache,
    DamagedEntry,
    DamagedEntryWarning,
    Remote,
    RemoteWarning,
    TrustError,
    UntrustedEntryWarning,
)
from compile_cache.records import Record, Signature, encode_record
from tests.entries import (
    EVIL,
    FILES,
    KEY,
    OTHER,
    blob_of,
    build,
    builder,
    contents,
    never,
    one_line,
    read_record,
    record_of,
    signer,
    snapshot,
    untrusted,
)

MINE, THEIRS = signer(1), signer(2)
Change = Callable[[Record], Record]
LEAVE = ("v1/locks/", "v1/damaged/")  # what a look-up may leave


def rewrite(location: Path, change: Change) -> None:
    """Change what the record of KEY says, with a checksum that fits."""
    record = change(read_record(location))
    path = record_of(location, CacheKey(record.factors))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_record(record))


# ---- what a cache with trust hands out -------------------------------------------------------------------------------


def test_what_a_trusted_key_signed_is_loaded(signed):
    for trust in (MINE.public, str(MINE.public).upper(), [THEIRS.public, MINE.public], None):
        cache = CompileCache(signed, trust=trust)
        entry = cache.get_or_build(KEY, never)
        assert contents(entry) == FILES and entry.signed_by == (str(MINE.public),)
        assert cache.find(KEY.digest) == entry == next(cache.entries()) == cache.nearest(OTHER)[0].entry
        assert "present" in cache.explain(KEY) and cache.verify().ok


def flipped(record: Record, bit: int) -> Record:
    (signature,) = record.signatures
    value = bytearray(bytes.fromhex(signature.value))
    value[bit // 8] ^= 1 << bit % 8
    return replace(record, signatures=(Signature(signature.key, value.hex()),))


def larger(record: Record) -> Record:
    """S + L in place of S: the same equation holds, so a careless check accepts it."""
    (signature,) = record.signatures
    order = 2**252 + 27742317777372353535851937790883648493
    number = int.from_bytes(bytes.fromhex(signature.value[64:]), "little") + order
    return replace(
        record, signatures=(Signature(signature.key, signature.value[:64] + number.to_bytes(32, "little").hex()),)
    )


def transplanted(record: Record) -> Record:
    (signature,) = MINE.sign(replace(record, notes={"another": "record"})).signatures
    return replace(record, signatures=(signature,))


def renamed(record: Record) -> Record:
    """The signature of MINE, under the name of another key."""
    return replace(record, signatures=tuple(Signature(THEIRS.public.hex, old.value) for old in record.signatures))


def swapped(record: Record) -> Record:
    names = sorted(record.files)
    return replace(record, files=dict(zip(names, (record.files[name] for name in reversed(names)), strict=True)))


# what is done to the record, and what the warning has to say
CHANGES: dict[str, tuple[Change, str]] = {
    "unsigned": (lambda record: replace(record, signatures=()), f"not signed by a trusted key ({MINE.public.short})"),
    "another key": (
        lambda record: THEIRS.sign(replace(record, signatures=())),
        f"signed by {THEIRS.public.short}, not",
    ),
    "renamed": (renamed, f"signed by {THEIRS.public.short}, not by a trusted key ({MINE.public.short})"),
    "transplanted": (transplanted, f"its signature by {MINE.public.short} does not match"),
    "notes": (lambda record: replace(record, notes={"seconds": 12.25}), f"{MINE.public.short} does not match"),
    "notes as int": (lambda record: replace(record, notes={"seconds": 12}), f"{MINE.public.short} does not match"),
    "created": (lambda record: replace(record, created="2020-01-01T00:00:00+00:00"), MINE.public.short),
    "file name": (lambda record: replace(record, files={"x": record.files["code.so"]}), MINE.public.short),
    "file left out": (lambda record: replace(record, files={"code.so": record.files["code.so"]}), MINE.public.short),
    "files swapped": (swapped, MINE.public.short),
    "S + L": (larger, f"its signature by {MINE.public.short} does not match"),
    "zeros": (lambda r: replace(r, signatures=(Signature(MINE.public.hex, "00" * 64),)), MINE.public.short),
    "wrong, and another": (lambda record: THEIRS.sign(flipped(record, 9)), f"{MINE.public.short} does not match"),
    "two others": (lambda record: signer(3).sign(THEIRS.sign(replace(record, signatures=()))), THEIRS.public.short),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_no_trusted_key_signed_is_never_loaded(signed, name):
    change, text = CHANGES[name]
    rewrite(signed, change)
    before = snapshot(signed, *LEAVE, "v1/used/")
    assert CompileCache(signed).get(KEY) is not None  # nothing but the signature is wrong
    cache = CompileCache(signed, trust=MINE.public)
    assert text in untrusted(cache) and cache.stats.misses_by_reason["untrusted"] == 1
    with pytest.raises(TrustError, match=r"signed|signature") as caught:
        cache.find(KEY.digest)
    one_line(caught.value)
    with pytest.warns(UntrustedEntryWarning):
        assert list(cache.entries()) == []
    assert cache.nearest(KEY) == cache.nearest(OTHER) == []
    assert "untrusted" in one_line(cache.explain(KEY)) and KEY.short not in cache.explain(OTHER)
    with pytest.warns(UntrustedEntryWarning), pytest.raises(TrustError):
        cache.get_or_build(KEY, never)
    report = cache.verify(repair=False)
    assert not report.ok and [path for path, _ in report.untrusted] == [
        record_of(signed).relative_to(signed).as_posix()
    ]
    assert report.entries == 0 and not report.damaged
    assert snapshot(signed, *LEAVE, "v1/used/") == before


def test_a_signature_over_other_factors(signed):
    before = read_record(signed)
    rewrite(signed, lambda record: replace(record, digest=OTHER.digest, factors=OTHER.factors))
    assert read_record(signed, OTHER).signatures == before.signatures
    assert "does not match" in untrusted(CompileCache(signed, trust=MINE.public), OTHER)
    assert CompileCache(signed, trust=MINE.public).get(KEY) is not None


@pytest.mark.parametrize("bit", [*range(0, 512, 41), 255, 256, 508, 511])
def test_a_flipped_bit_of_a_signature(signed, bit):
    rewrite(signed, lambda record: flipped(record, bit))
    assert f"its signature by {MINE.public.short} does not match" in untrusted(CompileCache(signed, trust=MINE.public))


def test_one_trusted_signature_of_two_is_enough(signed):
    rewrite(signed, lambda record: replace(THEIRS.sign(record)))
    for trust in (MINE.public, THEIRS.public):
        assert len(CompileCache(signed, trust=trust).get(KEY).signed_by) == 2
    both = [MINE.public, THEIRS.public]
    rewrite(
        signed,
        lambda record: replace(
            record, signatures=(replace(record.signatures[0], value="00" * 64), record.signatures[1])
        ),
    )
    assert CompileCache(signed, trust=both).get(KEY) is not None


def test_many_trusted_keys_are_not_all_named(unsigned):
    text = untrusted(CompileCache(unsigned, trust=[signer(number).public for number in range(1, 9)]))
    assert text.count("ed25519:") == 3 and "and 5 more" in text


def test_a_cache_with_trust_needs_a_key_to_store(unsigned, tmp_path):
    cache = CompileCache(tmp_path / "new", trust=MINE.public)
    entry = CompileCache(unsigned).get(KEY)
    for refused in (
        lambda: cache.get_or_build(KEY, never),
        lambda: cache.link(OTHER, entry),
        lambda: cache.link(KEY, entry),
        cache.require_writable,
    ):
        with pytest.raises(TrustError, match="expected a signing key") as caught:
            refused()
        one_line(caught.value)
    assert "CACHEDIR.TAG" in os.listdir(cache.location) and not list(cache.digests())


def test_what_is_built_with_a_key_is_signed_and_loaded(tmp_path):
    cache = CompileCache(tmp_path, trust=[MINE.public, THEIRS.public], sign_with=MINE)
    entry = cache.get_or_build(KEY, build)
    assert entry.signed_by == (str(MINE.public),)
    cache.link(OTHER, entry)
    for wanted in (KEY, OTHER):
        assert CompileCache(tmp_path, trust=MINE.public).get_or_build(wanted, never).read("code.so") == FILES["code.so"]
        assert CompileCache(tmp_path, trust=MINE.public).verify().entries == 2


def test_what_is_not_trusted_is_built_again_and_signed(unsigned):
    cache = CompileCache(unsigned, trust=MINE.public, sign_with=MINE)
    built = []
    with pytest.warns(UntrustedEntryWarning):
        cache.get_or_build(KEY, lambda directory: built.append(1) or build(directory))
    assert built == [1] and cache.get_or_build(KEY, never).signed_by == (str(MINE.public),)


def test_a_key_that_is_not_trusted_here_is_refused_at_once(tmp_path):
    with pytest.raises(TrustError, match=f"got {THEIRS.public.short}") as caught:
        CompileCache(tmp_path / "cache", trust=MINE.public, sign_with=THEIRS)
    one_line(caught.value)
    assert not (tmp_path / "cache").exists()
    assert CompileCache(tmp_path / "cache", sign_with=THEIRS).get_or_build(KEY, build).signed_by  # without trust: fine


def test_link_signs_nothing_that_is_not_trusted(signed, tmp_path):
    mixed = CompileCache(signed)
    planted = mixed.get_or_build(OTHER, builder({"code.so": EVIL}))
    cache = CompileCache(signed, trust=MINE.public, sign_with=MINE)
    with pytest.raises(TrustError):
        cache.link(CacheKey({"n": 3}), planted)
    assert cache.link(CacheKey({"n": 4}), cache.get(KEY)).signed_by


def test_export_signs_nothing_that_is_not_trusted(signed, tmp_path):
    CompileCache(signed).get_or_build(OTHER, builder({"code.so": EVIL}))
    with pytest.raises(TrustError, match=OTHER.short):
        CompileCache(signed, trust=MINE.public).export_bundle(tmp_path / "bundle", sign_with=THEIRS)
    assert not (tmp_path / "bundle").exists()


# ---- from elsewhere --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signer", [None, THEIRS])
def test_import_refuses_what_is_not_trusted(unsigned, tmp_path, signer):
    CompileCache(unsigned).export_bundle(tmp_path / "bundle", sign_with=signer)
    cache = CompileCache(tmp_path / "cache", trust=MINE.public)
    with pytest.raises(BundleError, match=r"not signed by a trusted|not by a trusted") as caught:
        cache.import_bundle(tmp_path / "bundle")
    assert MINE.public.short in one_line(caught.value) and not cache.location.exists()


@pytest.mark.parametrize("name", ["unsigned", "another key", "transplanted", "notes", "S + L"])
def test_a_remote_gives_nothing_that_is_not_trusted(signed, tmp_path, name):
    rewrite(signed, CHANGES[name][0])
    url = signed.as_uri()
    cache = CompileCache(tmp_path / "here", trust=MINE.public, remote=Remote(url, retry_after=0))
    for ask in (lambda: cache.get(KEY), lambda: cache.pull(), lambda: cache.pull([KEY.digest])):
        with pytest.warns(RemoteWarning, match=r"signed|signature") as caught:
            assert not ask()
        assert len(caught) == 1 and one_line(caught[0].message)
    with pytest.warns(RemoteWarning), pytest.raises(TrustError):
        cache.get_or_build(KEY, never)
    assert not list(cache.digests()) and not list((cache.location / "v1/blobs").rglob("*"))
    assert not os.listdir(cache.location / "v1/tmp")


def test_a_remote_heals_what_is_not_trusted_here(signed, unsigned):
    cache = CompileCache(unsigned, trust=MINE.public, remote=signed.as_uri())
    with pytest.warns(UntrustedEntryWarning):
        entry = cache.get(KEY)
    assert entry.signed_by == (str(MINE.public),) and CompileCache(unsigned, trust=MINE.public).get(KEY) == entry


# ---- signing in place ------------------------------------------------------------------------------------------------


def test_sign_adds_a_signature_and_changes_nothing_else(signed):
    before, record = snapshot(signed, *LEAVE), json.loads(record_of(signed).read_bytes())
    cache = CompileCache(signed)
    assert cache.sign(THEIRS) == 1 and cache.sign(THEIRS) == 0 and cache.sign(MINE) == 0
    after, changed = snapshot(signed, *LEAVE), json.loads(record_of(signed).read_bytes())
    name = record_of(signed).relative_to(signed).as_posix()
    assert set(after) == set(before) and {path for path in after if after[path] != before[path]} == {name}
    assert set(changed["signatures"]) == {MINE.public.hex, THEIRS.public.hex}
    assert changed["signatures"][MINE.public.hex] == record["signatures"][MINE.public.hex]
    for body in (record, changed):
        del body["signatures"], body["checksum"]
    assert changed == record
    for trust in (MINE.public, THEIRS.public):
        assert CompileCache(signed, trust=trust).get(KEY) is not None


def test_sign_replaces_a_signature_of_the_same_key_that_does_not_match(signed):
    rewrite(signed, CHANGES["notes"][0])
    untrusted(CompileCache(signed, trust=MINE.public))
    assert CompileCache(signed).sign(MINE) == 1
    assert CompileCache(signed, trust=MINE.public).get(KEY).notes == {"seconds": 12.25}


def test_sign_checks_every_byte_first(unsigned):
    blob_of(unsigned).write_bytes(EVIL)
    before = snapshot(unsigned, *LEAVE)
    with pytest.raises(DamagedEntry, match=KEY.short) as caught:
        CompileCache(unsigned).sign(MINE)
    one_line(caught.value)
    assert snapshot(unsigned, *LEAVE) == before


@pytest.mark.parametrize(
    "digest", ["../../../evil", "", "x", KEY.short, OTHER.digest, KEY.digest.upper(), "a\nb", "\0"]
)
def test_sign_of_something_that_is_no_entry(unsigned, digest):
    with pytest.raises(DamagedEntry, match="expected") as caught:
        CompileCache(unsigned).sign(MINE, [digest])
    one_line(caught.value)
    assert not list(unsigned.parent.glob("evil*")) and not list((unsigned / "v1").glob("*.lock"))


def test_a_copied_cache_keeps_its_signatures(signed, tmp_path):
    shutil.copytree(signed, tmp_path / "copy")
    shutil.rmtree(signed)
    entry = CompileCache(tmp_path / "copy", trust=MINE.public, read_only=True).get(KEY)
    assert entry.read("code.so") == FILES["code.so"]


def test_a_blob_that_is_replaced_under_a_signed_record(signed):
    data = b"bytes of which no test has a private copy yet"
    CompileCache(signed, sign_with=MINE).get_or_build(OTHER, builder({"code.so": data}))
    cache = CompileCache(signed, trust=MINE.public)
    entry = cache.get(OTHER)
    blob_of(signed, data).write_bytes(bytes(len(data)))
    for load in (lambda: entry.read("code.so"), lambda: entry.path):
        with pytest.raises(DamagedEntry, match=r"code\.so"):
            load()
    with pytest.warns(DamagedEntryWarning, match="other bytes than its SHA-256 says"):
        assert cache.get(OTHER) is None
