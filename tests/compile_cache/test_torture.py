"""Writers that are killed at any moment, over all that writes: nothing that was stored is lost, damaged or wrong.

Run as a program, this file is the process whose children are killed: it forks often, so it has one thread only.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from compile_cache import CacheKey, CompileCache, SigningKey
from tests.entries import ROOT, builder, contents

KILLS = 200
NAMES = {"replace", "unlink", "link"}  # calls that change what a name means
CALLS = NAMES | {"open", "write", "flush", "fsync", "close", "chmod", "mkdir", "rmdir", "flock"}
BUNDLE = {"b1", "b2", "b3"}
WEIGHTS = {
    "build": 5,
    "share": 3,
    "link": 3,
    "replace": 2,
    "sign": 3,
    "prune": 4,
    "limit": 4,
    "clean": 1,
    "import": 3,
    "use": 2,
}


def key(name):
    return CacheKey({"name": str(name)})


def content(name):
    """The files of a content, by its name."""
    noise = random.Random(str(name))
    return {file: noise.randbytes(size) for file, size in (("code.so", 30_000), ("deep/er/data", 700), ("flag", 1))}


def writes(name):
    return builder(content(name), content=str(name))


class Torture:
    """A cache, what it has to hold (key name -> content name), and children that change it and are killed."""

    def __init__(self, location, seed):
        self.location, self.random = Path(location), random.Random(seed)
        self.held, self.named = {}, 0
        self.calls = mmap.mmap(-1, 8)  # shared with the children: how many points they passed
        self.points, self.seconds = Counter(), Counter()  # of one whole operation, by kind
        self.report = Counter()
        self.signer = SigningKey.generate()
        self.bundle = self.location.with_name("bundle.zip")
        source = self.cache(self.location.with_name("source"))
        for name in sorted(BUNDLE):
            source.get_or_build(key(name), writes("b1" if name == "b3" else name))
        source.export_bundle(self.bundle)

    def cache(self, location=None, **options):
        return CompileCache(location or self.location, **options)

    # ---- children ----------------------------------------------------------------------------------------------------

    def child(self, action, nth=0, calls=()):
        """Fork a child that runs the action, and kills itself after the nth of these calls on its way."""
        self.calls[:8] = bytes(8)
        if pid := os.fork():
            return pid
        try:
            sys.setprofile(self.killer(nth, calls) if calls else None)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def killer(self, nth, calls):
        def returned(frame, event, function):
            counts = event == "c_return" and function.__name__ in calls and not isinstance(function.__self__, str)
            if counts and self.count() == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        return returned

    def count(self):
        number = int.from_bytes(self.calls[:8], "little") + 1
        self.calls[:8] = number.to_bytes(8, "little")
        return number

    def killed(self, kind, action, nth=0):
        """Run the action in a child and kill it, after a call or a time; False if it was faster."""
        how = "call" if nth else self.random.choice(["call", "name", "moment"])
        if how != "moment":
            calls = NAMES if how == "name" else CALLS
            pid = self.child(action, nth or self.random.randint(1, self.points[kind, how] or 10), calls)
        else:
            pid = self.child(action)
            time.sleep(self.random.uniform(0, self.seconds[kind] or 0.02))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            self.report["kills"] += 1
            self.report[f"by {how}"] += 1
            self.report[kind] += 1
        else:
            assert os.waitstatus_to_exitcode(status) == 0, kind
        return os.WIFSIGNALED(status)

    def whole(self, kind, action):
        how, begun = self.random.choice(["call", "name"]), time.perf_counter()
        pid = self.child(action, calls=NAMES if how == "name" else CALLS)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, kind
        self.seconds[kind] = time.perf_counter() - begun
        self.points[kind, how] = int.from_bytes(self.calls[:8], "little")

    # ---- checks ------------------------------------------------------------------------------------------------------

    def check(self, may_be, removable=frozenset()):
        """Every entry is there with the right bytes; ``may_be``: key name -> contents (or None) that are right too."""
        cache = self.cache()
        report = cache.verify()
        self.report["damaged"] += len(report.damaged) + len(report.untrusted)
        seen = {}
        for name in {**self.held, **may_be}:
            right = {self.held.get(name), *may_be.get(name, ())}
            entry = cache.get(key(name))
            if entry is None:
                self.report["lost"] += name not in removable and None not in right
                continue
            found = contents(entry)
            seen[name] = next((item for item in right if item is not None and content(item) == found), None)
            self.report["wrong"] += seen[name] is None
            if name not in self.held:
                self.report["committed before the kill"] += 1
        return seen

    # ---- what is killed ----------------------------------------------------------------------------------------------

    def operation(self, kind):
        """Return (what to run, what it may leave, what it leaves when it is whole, which entries it may remove)."""
        self.named += 1
        new, some, other = f"k{self.named}", *self.random.sample(sorted(self.held), 2)
        total = self.cache().prune(dry_run=True).bytes
        if kind == "build":
            return lambda: self.cache().get_or_build(key(new), writes(new)), {new: new}, ()
        if kind == "share":  # another key whose build gives the bytes of an entry
            twin = self.held[some]
            return lambda: self.cache().get_or_build(key(new), writes(twin)), {new: twin}, ()
        if kind in ("link", "replace"):
            target = new if kind == "link" else other

            def link():
                cache = self.cache()
                cache.link(key(target), cache.get(key(some)))

            return link, {target: self.held[some]}, ()
        if kind == "sign":
            return lambda: self.cache().sign(self.signer), {}, ()
        if kind == "prune":
            limit = int(total * 0.6)
            return lambda: self.cache().prune(max_bytes=limit), {}, self.over(limit)
        if kind == "limit":
            limit = min(total, 150_000)
            gone = self.over(limit - 2 * 35_000)

            def limited():
                cache = self.cache(max_bytes=limit)
                if cache.get_or_build(key(new), writes(new)) and not cache.stats.builds:
                    cache.prune()  # killed after the commit, before the removal: a hit looks at no limit

            return limited, {new: new}, gone
        if kind == "clean":
            return lambda: self.cache().clean(), {}, set(self.held)
        if kind == "import":
            leaves = {"b1": "b1", "b2": "b2", "b3": "b1", **{name: self.held[name] for name in BUNDLE & set(self.held)}}
            return lambda: self.cache().import_bundle(self.bundle), leaves, ()  # what is there already stays

        def use():
            cache = self.cache()
            for name in (some, other):
                assert cache.get(key(name)).hits >= 0
            cache.pin(key(some))
            cache.unpin(key(some))

        return use, {}, ()

    def over(self, limit):
        going = {gone.digest for gone in self.cache().prune(max_bytes=max(limit, 1), dry_run=True).removed}
        return {name for name in self.held if key(name).digest in going}

    def step(self, kind, nth=0):
        """Kill an operation, look at what it left, and do it again as a whole; False if it was not killed."""
        for name in ("first1", "first2") if len(self.held) < 2 else ():
            self.cache().get_or_build(key(name), writes(self.held.setdefault(name, name)))
        action, leaves, removable = self.operation(kind)
        killed = self.killed(kind, action, nth)
        if killed:
            seen = self.check({name: (item, self.held.get(name)) for name, item in leaves.items()}, removable)
            self.held = {name: item for name, item in self.held.items() if name in seen or name not in removable}
        self.whole(kind, action)
        self.held.update(leaves)
        seen = self.check({}, self.held if removable else ())  # now it may remove others: they were used since
        self.report["not done"] += len(set(leaves) - set(seen))
        self.held = {name: item for name, item in self.held.items() if name in seen}
        if len(os.listdir(self.location / "v1/tmp")) > 25:
            self.clear()  # as a day later
        return killed

    def run(self, kills):
        """Kill operations of all kinds at random, and two of them after each of their calls."""
        for kind in ("limit", "replace"):
            nth = 1
            while self.step(kind, nth):
                nth += 1
        self.report["after each call"] = self.report.pop("kills")
        for kind in ("limit", "replace", "by call"):
            del self.report[kind]
        while self.report["kills"] < kills:
            self.step(*self.random.choices(list(WEIGHTS), list(WEIGHTS.values())))

    def clear(self):
        real, time.time = time.time, lambda: real() + 7 * 86_400
        self.cache().prune()
        time.time = real

    def finish(self):
        """All leftovers can be cleared, and what was signed can be trusted."""
        self.cache().sign(self.signer)
        cache = self.cache(trust=self.signer.public)
        self.clear()
        report = cache.verify()
        self.report["leftovers"] = len(os.listdir(self.location / "v1/tmp")) + len(report.orphan_blobs)
        self.report["damaged"] += not report.ok
        self.report["lost"] += report.entries < len(self.held)


def test_killed_at_random_points(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "cache"), "20240607"]
    begun = time.monotonic()
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    print(report, f"{time.monotonic() - begun:.1f} s")
    assert report["kills"] == KILLS
    for name in ("damaged", "lost", "wrong", "not done", "leftovers"):
        assert report[name] == 0, report
    assert all(report[kind] for kind in (*WEIGHTS, "by call", "by name", "by moment")), report
    assert 0 < report["committed before the kill"] < KILLS < report["after each call"] + KILLS


if __name__ == "__main__":
    warnings.simplefilter("error")
    torture = Torture(sys.argv[1], int(sys.argv[2]))
    torture.run(KILLS)
    torture.finish()
    names = ("damaged", "lost", "wrong", "not done", "leftovers")
    print(json.dumps({**dict.fromkeys(names, 0), **torture.report}))
