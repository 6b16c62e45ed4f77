"""What is measured, in the order of its value: what a cut run leaves is the most that its minutes could buy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from benchmarks.gpu.journal import Case
from benchmarks.gpu.setting import TOPOLOGIES, Setting


@dataclass(frozen=True)
class Stage:
    """A kind of measurement.

    Attributes:
        name: on the command line and in records.
        about: one line.
        limit_s: seconds after which a case of it is given up, at full size.
        dry_limit_s: the same for a dry run.
        process: cases that share one run one after another in one process. A process ends with its last case; what
            can spoil one, and what only a new one shows, has another than the steps.
        gpu_only: it needs CUDA.
        beside: it runs at low priority beside the processes from this one on.
    """

    name: str
    about: str
    limit_s: float
    dry_limit_s: float = 90.0
    process: str = "steps"
    gpu_only: bool = False
    beside: str = ""


STAGES: Final = (
    Stage("ceilings", "Speeds of a large matmul and of a large copy.", 20),
    Stage("build", "The models, with random weights, in place on the device.", 60),
    Stage("load", "A variant from its cache: seconds to load it, and to run each size once.", 60),
    Stage("steps", "One UNet call inside of a request, in turns; errors are against eager in the same dtype.", 60),
    Stage("truth", "How far a step is from the same weights in float32.", 45),
    Stage("requests", "Seconds of whole requests: the UNet's part, and with the VAE.", 120),
    Stage("freezes", "How long another thread of the process stands still during a step.", 30),
    Stage("profile", "Where the time of a step goes.", 40),
    Stage("huge", "A size where memory is short: single steps, and the VAE.", 90),
    Stage("second", "In a second process: every size from the caches, nothing compiled.", 90, process="second"),
    Stage("graphs", "A step in a CUDA graph.", 40, process="second", gpu_only=True),
    Stage("memory", "A request that finds no memory, and the one after it.", 60, process="second", gpu_only=True),
    Stage("native", "Regions compiled on this machine, beside the carried ones.", 240, 240, "native", beside="rivals"),
    Stage("attention", "PyTorch's attention kernels at the shapes of SDXL.", 20, process="rivals"),
    Stage("repeated", "diffusers' `compile_repeated_blocks` on the patched UNet, one size.", 90, 200, "rivals"),
)
BY_NAME: Final = {stage.name: stage for stage in STAGES}


@dataclass(frozen=True)
class Task:
    """One case of a stage.

    Attributes:
        stage, case: which.
        tree: the sources that run it; "" for this checkout's.
    """

    stage: Stage
    case: Case
    tree: str = ""

    @property
    def process(self) -> str:
        """Neighbours that share it run in one process."""
        return self.tree or self.stage.process

    def limit_s(self, tiny: bool) -> float:
        """Seconds that it may take."""
        return self.stage.dry_limit_s if tiny else self.stage.limit_s


def programme(setting: Setting) -> list[Task]:
    """Every case of a run, in order; those of one process are neighbours."""
    own = [Task(BY_NAME[name], case) for name, case in _cases(setting.of_tree(""))]
    others = [
        Task(BY_NAME[name], {**case, "tree": tree}, tree)
        for tree in setting.trees
        for name, case in _cases_of_tree(setting.of_tree(tree))
    ]
    first = next((number for number, task in enumerate(own) if task.stage.process != "steps"), len(own))
    return own[:first] + others + own[first:]


def chosen(setting: Setting, names: str | None) -> list[Task]:
    """The cases of the stages in a comma list; None: all.

    Raises:
        ValueError: there is no stage of a name; the message is one line.
    """
    tasks = programme(setting)
    if names is None:
        return tasks
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in BY_NAME] or ([] if wanted else [names]):
        raise ValueError(f"--only: expected stages among {', '.join(BY_NAME)}, got {', '.join(unknown) or 'none'}")
    return [task for task in tasks if task.stage.name in wanted]


def _cases(setting: Setting) -> Iterator[tuple[str, dict[str, str]]]:
    sizes = [_text(size) for size in setting.sizes]
    main, *others = setting.dtypes
    yield "ceilings", {"dtype": main}
    yield "build", {"dtype": main}
    yield from (("load", {"variant": variant.name}) for variant in setting.of_dtype(main))
    yield from (
        ("steps", {"dtype": main, "size": size, "topology": topology}) for size in sizes for topology in TOPOLOGIES
    )
    yield "truth", {"dtype": main, "size": sizes[min(1, len(sizes) - 1)]}
    yield from (("requests", {"dtype": main, "size": size}) for size in sizes[:2])
    yield "freezes", {"dtype": main, "size": sizes[0]}
    runs = ["eager", *(variant.name for variant in setting.of_dtype(main))]
    yield from (("profile", {"dtype": main, "size": sizes[0], "run": run}) for run in runs)
    yield "huge", {"dtype": main, "size": _text(setting.huge)}
    for dtype in others:
        yield from (("load", {"variant": variant.name}) for variant in setting.of_dtype(dtype))
        yield "steps", {"dtype": dtype, "size": sizes[0], "topology": TOPOLOGIES[0]}
        yield "truth", {"dtype": dtype, "size": sizes[min(1, len(sizes) - 1)]}
    first = setting.variants[0].name
    yield from (("second", {"variant": variant.name}) for variant in setting.of_dtype(main))
    yield from (
        ("graphs", {"variant": first, "size": size, "topology": topology})
        for size in sizes[:2]
        for topology in TOPOLOGIES
    )
    yield "memory", {"variant": first, "size": sizes[0]}
    yield from (("native", {"variant": first, "region": region}) for region in ("resnet", "transformer"))
    yield from (("attention", {"dtype": main, "kernel": kernel}) for kernel in ("flash", "cudnn", "efficient"))
    yield "repeated", {"dtype": main, "size": sizes[0]}


def _cases_of_tree(setting: Setting) -> Iterator[tuple[str, dict[str, str]]]:
    """What tells whether an idea is worth having."""
    main, sizes = setting.dtypes[0], [_text(size) for size in setting.sizes]
    yield "ceilings", {"dtype": main}
    yield from (("load", {"variant": variant.name}) for variant in setting.variants)
    for dtype in setting.dtypes:
        yield from (
            ("steps", {"dtype": dtype, "size": size, "topology": topology})
            for size in sizes[:2]
            for topology in TOPOLOGIES
        )
        yield "truth", {"dtype": dtype, "size": sizes[min(1, len(sizes) - 1)]}
    yield from (
        ("profile", {"dtype": variant.dtype, "size": sizes[0], "run": variant.name}) for variant in setting.variants
    )
    yield "requests", {"dtype": main, "size": sizes[0]}


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
