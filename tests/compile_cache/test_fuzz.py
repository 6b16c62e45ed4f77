"""1,000 mutated files of every kind: each one that matters is detected, nothing wrong is handed out, and all heals."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import warnings
import zipfile
from collections import Counter

import pytest

from compile_cache import (
    BundleError,
    CacheKey,
    CompileCache,
    DamagedEntry,
    DamagedEntryWarning,
    SigningKey,
    UntrustedEntryWarning,
)
from compile_cache.records import decode_record, encode_record
from tests.entries import builder, contents, one_line, record_of

SEED = 20240607
CASES = {
    "record": 200,
    "signed record": 150,
    "blob": 250,
    "pin": 30,
    "used": 30,
    "lock": 30,
    "tag": 30,
    "tmp": 30,
    "bundle": 250,
}
HARMLESS = {"pin", "used", "lock", "tag", "tmp"}  # whatever they hold, it is never handed out


def key(name):
    return CacheKey({"name": name, "environment": {"torch": "2.13.0"}})


FILES = {  # key name -> its files; two entries share a blob, two blobs have one size
    "a": {"one": b"1" * 90, "deep/two": bytes(range(256))},
    "b": {"one": b"shared" * 9, "two": b"2" * 90},
    "c": {"one": b"shared" * 9, "empty": b""},
    "signed1": {"one": b"3" * 500},
    "signed2": {"one": b"4" * 40, "two": b"shared" * 9},
}


def writes(name):
    return builder(FILES[name], of=name)


def flipped(data, rng):
    spot = rng.randrange(len(data))
    return data[:spot] + bytes([data[spot] ^ 1 << rng.randrange(8)]) + data[spot + 1 :]


def overwritten(data, rng):
    spot = rng.randrange(len(data))
    noise = rng.randbytes(rng.randint(1, 20))
    return (data[:spot] + noise + data[spot + len(noise) :])[: len(data)]


def zeroed(data, rng):
    start = rng.choice([0, rng.randrange(len(data))])
    end = rng.randint(start + 1, len(data))
    return data[:start] + bytes(end - start) + data[end:]


CHANGES = {
    "flip": flipped,
    "overwrite": overwritten,
    "zero": zeroed,
    "truncate": lambda data, rng: data[: rng.randrange(len(data))],
    "extend": lambda data, rng: (
        data + rng.choice([b"\0", b"\n", b" ", rng.randbytes(rng.randint(1, 500)), data or b"x"])
    ),
    "delete": lambda data, rng: None,
    "swap": None,  # with another file of its kind
}


def mutated(data, rng, other):
    """Return how the bytes of a file change, and other bytes than it has (None: the file is gone)."""
    while True:
        kind = rng.choice(list(CHANGES))
        if not data and kind in ("flip", "overwrite", "zero", "truncate"):
            continue
        new = other if kind == "swap" else CHANGES[kind](data, rng)
        if new != data:
            return kind, new


class Filled:
    """A filled cache, and its files in memory, to put them back after a case."""

    def __init__(self, location):
        self.location, self.signer = location, SigningKey.generate()
        for name in FILES:
            cache = CompileCache(location, sign_with=self.signer if name.startswith("signed") else None)
            cache.get_or_build(key(name), writes(name))
            assert cache.get(key(name))
            cache.pin(key(name))
        for name in ("build-1-dead", "build-2-dead"):
            (location / "v1/tmp" / name).mkdir()
            (location / "v1/tmp" / name / "half").write_bytes(name.encode())
        self.files = {path: path.read_bytes() for path in sorted(location.rglob("*")) if path.is_file()}
        self.records = {name: record_of(location, key(name)) for name in FILES}
        self.needs = {name: {path, *self.blobs(path)} for name, path in self.records.items()}
        signed = {path for name, path in self.records.items() if name.startswith("signed")}
        under = {kind: location / "v1" / folder for kind, folder in PLACES.items()}
        self.kinds = {kind: [path for path in self.files if root in path.parents] for kind, root in under.items()}
        self.kinds["record"] = [path for path in self.records.values() if path not in signed]
        self.kinds |= {"signed record": sorted(signed), "tag": [location / "CACHEDIR.TAG"]}

    def blobs(self, record):
        found = json.loads(self.files[record])["files"].values()
        return {self.location / f"v1/blobs/{ref['sha256'][:2]}/{ref['sha256']}" for ref in found}

    def put_back(self, paths):
        for path in paths:
            if not path.exists() or path.read_bytes() != self.files[path]:
                path.write_bytes(self.files[path])
        shutil.rmtree(self.location / "v1/damaged", ignore_errors=True)


PLACES = {"blob": "blobs", "pin": "pins", "used": "used", "lock": "locks", "tmp": "tmp"}


pytestmark = pytest.mark.filterwarnings("error", "ignore::compile_cache.UntrustedEntryWarning")


@pytest.fixture
def filled(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here is about a loss of power
    caplog.set_level(logging.ERROR, "compile_cache")
    return Filled(tmp_path / "cache")


def got(cache, name):
    """What ``get`` gives, and the categories of its warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        entry = cache.get(key(name))
    return entry, [item.category for item in told]


def assert_right(entry, name):
    assert contents(entry) == FILES[name] and entry.notes == {"of": name}


def mutate(filled, kind, rng):
    """Mutate a file (or swap it with another one); return the paths that changed and how."""
    path = rng.choice(filled.kinds[kind])
    data = filled.files[path]
    others = [other for other in filled.kinds[kind] if filled.files[other] != data]
    swap = rng.choice(others) if others else path
    how, new = mutated(data, rng, filled.files[swap])
    if how == "swap":
        swap.write_bytes(data)
    path.unlink() if new is None else path.write_bytes(new)
    return {path, swap} if how == "swap" else {path}, how


def test_every_mutation_is_detected_and_heals(filled):
    rng, counts = random.Random(SEED), Counter()
    for kind in (kind for kind, number in CASES.items() if kind != "bundle" for _ in range(number)):
        held = {name: got(CompileCache(filled.location), name)[0] for name in FILES}
        changed, how = mutate(filled, kind, rng)
        case = kind, how, sorted(path.name for path in changed)
        hit = set() if kind in HARMLESS else {name for name, needs in filled.needs.items() if needs & changed}
        counts[kind] += 1
        counts[how] += 1
        for name, entry in held.items():  # an entry from before
            try:
                assert_right(entry, name)
            except DamagedEntry:
                assert kind == "blob" and name in hit, case
        del held, entry
        gone = how == "delete" and "record" in kind  # that is no damage: the entry is not there
        report = CompileCache(filled.location).verify()
        assert report.ok == (not hit or gone), case
        assert CompileCache(filled.location, trust=filled.signer.public).verify().damaged == report.damaged, case
        assert len(report.damaged) >= (0 if gone else len(hit)), case
        cache = CompileCache(filled.location)
        for name in sorted(FILES, key=lambda name: (name in hit, name)):
            entry, told = got(cache, name)
            assert (entry is None) == (name in hit), case
            assert told == ([DamagedEntryWarning] if name in hit and not gone else []), case
            counts["warned"] += len(told)
            if entry is not None:
                assert_right(entry, name)
        counts["detected"] += bool(hit) and (gone or not report.ok)
        for name in FILES:  # which heals
            assert_right(cache.get_or_build(key(name), writes(name)), name)
        assert CompileCache(filled.location).verify().ok, case
        filled.put_back(changed | {path for name in hit for path in filled.needs[name]})
    print(dict(counts))
    matters = sum(number for kind, number in CASES.items() if kind not in HARMLESS and kind != "bundle")
    assert sum(CASES.values()) == 1000 and counts["detected"] == matters and all(counts[how] for how in CHANGES)


def test_forged_records_are_not_loaded_where_signatures_count(filled):
    rng = random.Random(SEED)
    for case in range(50):  # whoever can write there can make the checksums right; a signature they cannot make
        name = rng.choice(["signed1", "signed2"])
        path = filled.records[name]
        record = decode_record(filled.files[path], key(name).digest)
        record.notes["of"] = f"forged {case}"
        path.write_bytes(encode_record(record))
        cache = CompileCache(filled.location, trust=filled.signer.public, sign_with=filled.signer)
        assert len(cache.verify().untrusted) == 1 + sum(not other.startswith("signed") for other in FILES)
        assert got(cache, name) == (None, [UntrustedEntryWarning])
        assert_right(cache.get_or_build(key(name), writes(name)), name)
        path.write_bytes(filled.files[path])


def bundle_outcome(cache, bundle):
    """Import a bundle: "refused", leaving nothing, or "stored", with the right bytes."""
    try:
        report = cache.import_bundle(bundle)
    except BundleError as error:
        assert one_line(error).startswith("expected")
        left = [path for path in cache.location.rglob("*") if path.is_file() or path.parent.name == "tmp"]
        assert [path.name for path in left if "locks" not in path.parts] in ([], ["CACHEDIR.TAG"])
        return "refused"
    assert cache.verify().ok and not os.listdir(cache.location / "v1/tmp")
    for name in FILES:
        if key(name).digest in report.entries:
            assert_right(cache.get(key(name)), name)
    assert len(list(cache.digests())) == len(report.entries)
    return "stored"


def forged(bundle, rng):
    """A bundle with other bytes in one file, packed as it should be."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(bundle)) as source, zipfile.ZipFile(new, "w") as target:
        chosen = rng.choice([info.filename for info in source.infolist() if info.file_size])
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info, flipped(data, rng) if info.filename == chosen else data)
    return new.getvalue()


def test_a_mutated_bundle_is_refused_or_stored_right(filled, tmp_path):
    rng, counts = random.Random(SEED), Counter()
    bundle, other, trust = tmp_path / "bundle", tmp_path / "other", filled.signer.public
    source = CompileCache(filled.location, sign_with=filled.signer)
    source.export_bundle(bundle, sign_with=filled.signer)
    source.export_bundle(other, [key("a").digest, key("c").digest], sign_with=filled.signer)
    whole, swap = bundle.read_bytes(), other.read_bytes()
    for case in range(CASES["bundle"]):
        how, new = ("forge", forged(whole, rng)) if case % 5 == 0 else mutated(whole, rng, swap)
        bundle.unlink(missing_ok=True)
        if new is not None:
            bundle.write_bytes(new)
        cache = CompileCache(tmp_path / f"imported{case}", trust=trust if case % 2 else None)
        outcome = bundle_outcome(cache, bundle)
        counts[f"{how} {outcome}"] += 1
        assert outcome == {"swap": "stored", "delete": "refused", "forge": "refused"}.get(how, outcome)
        assert len(list(cache.digests())) == {"refused": 0, "stored": 2 if how == "swap" else len(FILES)}[outcome]
        shutil.rmtree(cache.location, ignore_errors=True)
    print(dict(counts))
    assert counts.total() == CASES["bundle"] and counts["flip refused"] > 0 and counts["delete refused"] > 0


@pytest.mark.parametrize("find", [bytes.find, bytes.rfind], ids=["a record", "a blob"])
@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 93])
def test_a_bundle_that_says_another_compression(filled, tmp_path, method, find):
    bundle = tmp_path / "bundle"
    CompileCache(filled.location).export_bundle(bundle)
    data = bundle.read_bytes()
    place = find(data, b"PK\1\2") + 10  # in the directory of the file
    assert data[place : place + 2] == b"\x08\x00"
    bundle.write_bytes(data[:place] + method.to_bytes(2, "little") + data[place + 2 :])
    assert bundle_outcome(CompileCache(tmp_path / "new"), bundle) == "refused"


def test_a_bundle_with_offsets_before_its_start(filled, tmp_path):
    bundle = tmp_path / "bundle"
    CompileCache(filled.location).export_bundle(bundle)
    data = bytearray(bundle.read_bytes())
    data[-6:-2] = (int.from_bytes(data[-6:-2], "little") + 9).to_bytes(4, "little")  # where the directory begins
    bundle.write_bytes(data)
    assert bundle_outcome(CompileCache(tmp_path / "new"), bundle) == "refused"
