"""Pictures of single UNet calls. Each gives a figure, or None without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from accel_hidiff.benching.names import REFERENCE, STOCK
from benchmarks.compare import style
from benchmarks.compare.content import Content, Memory, Setup, Steps, in_order
from benchmarks.compare.step_tables import EXACT, PROFILED, REGIONS, SYMBOLIC, WHOLE
from benchmarks.compare.text import number, percent, times

_CATEGORIES: Final = {
    "attention": style.BLUE,
    "convolution": style.ORANGE,
    "matmul": style.GREEN,
    "normalisation": style.PURPLE,
    "elementwise": style.SKY,
    "copies": style.VERMILION,
    "other": style.GREY,
}


def steps(plt: Any, content: Content) -> Any:
    """Ratios to eager: markers for topologies, with the range of turns, and a bar for a whole request."""
    told = [(one, size, _ranked(one, size)) for one in content.steps for size in one.sizes]
    told = [(one, size, names) for one, size, names in told if names]
    if not told:
        return None
    columns = 1 if len(told) < 3 else 2
    heights = [1.2 + 0.42 * len(names) for _, _, names in told]
    figure, panels = style.panels(plt, heights, width=8.5 if columns == 1 else 7, columns=columns)
    handles: dict[str, Any] = {}
    for place, (panel, (one, size, names)) in enumerate(zip(panels, told, strict=True)):
        start = place // columns * columns
        room = max(len(beside) for _, _, beside in told[start : start + columns])
        _ratios(panel, one, size, names, room, handles)
    style.legend(figure, handles)
    return figure


def _ranked(one: Steps, size: str) -> list[str]:
    """Contenders with any figure, the fastest request first."""
    found = {}
    for name in one.contenders:
        ratios = [r.value for topology in one.topologies(size) if (r := one.ratio(name, size, topology)) is not None]
        if ratios and name != REFERENCE:
            found[name] = one.request_ratio(name, size) or max(ratios)
    return sorted(found, key=lambda name: found[name])


def _ratios(panel: Any, one: Steps, size: str, names: Sequence[str], room: int, handles: dict[str, Any]) -> None:
    topologies = one.topologies(size)
    ends = []
    for line, name in enumerate(names):
        whole = one.request_ratio(name, size)
        if whole is not None:
            handles["a request's steps"] = panel.barh(line, whole, height=0.62, color=style.PALE, zorder=0)
        ends.append(whole or 0.0)
        for place, topology in enumerate(topologies):
            ratio = one.ratio(name, size, topology)
            if ratio is None:
                continue
            colour, marker = style.of_topology(topology)
            y = line + 0.4 * ((place + 0.5) / len(topologies) - 0.5)
            if ratio.low is not None and ratio.high is not None:
                panel.plot([ratio.low, ratio.high], [y, y], color=colour, linewidth=1.4)
                ends[-1] = max(ends[-1], ratio.high)
            (handles[topology],) = panel.plot(ratio.value, y, marker, linestyle="", color=colour, markersize=5)
            ends[-1] = max(ends[-1], ratio.value)
        text = "a topology has no time" if whole is None else times(whole)
        at, offset = (ends[-1], line), {"xytext": (8, 0), "textcoords": "offset points"}
        panel.annotate(text, at, va="center", fontsize=9, bbox=style.ON_WHITE, **offset)
    panel.axvline(1, color=style.BLACK, linewidth=1, linestyle="--", zorder=0.5)
    style.lines(panel, [f"{name}\n(no HiDiffusion)" if name == STOCK else name for name in names], room)
    panel.set_xlim(0, max(1.05, *ends) * 1.2)
    panel.set_xlabel("time over patched eager's; left of the line is faster")
    panel.set_title(f"{one.name}: {one.record['model']}, {size}, batch {one.record['batch']}", fontsize=10)


def floor(plt: Any, content: Content) -> Any:
    """Shares of the matmul's speed: eager hollow, compiled filled."""
    told = []
    for one in content.insights:
        shares = [share for share in one.shares(PROFILED) if any(share.reached.values())]
        told += [(one, shares)] if shares else []
    if not told:
        return None
    figure, panels = style.panels(plt, [1.1 + 0.34 * len(shares) for _, shares in told])
    handles: dict[str, Any] = {}
    for panel, (one, shares) in zip(panels, told, strict=True):
        for line, share in enumerate(shares):
            reached = [value for value in share.reached.values() if value is not None]
            panel.plot([min(reached), max(reached)], [line, line], color=style.PALE, linewidth=3, zorder=0)
            for name, face in zip(PROFILED, ("white", style.BLUE), strict=True):
                if (value := share.reached[name]) is not None:
                    (handles[name],) = panel.plot(
                        value, line, "o", linestyle="", color=style.BLUE, markerfacecolor=face, markersize=8
                    )
            text = " → ".join(percent(share.reached[name]) for name in PROFILED)
            at = (max(reached), line)
            panel.annotate(text, at, (10, 0), textcoords="offset points", va="center", fontsize=9)
        style.lines(panel, [f"{share.size} {share.topology}" for share in shares])
        most = max(value for share in shares for value in share.reached.values() if value is not None)
        panel.set_xlim(0, most * 1.35)
        panel.xaxis.set_major_formatter(lambda value, place: f"{100 * value:.3g} %")
        ceiling = number(one.record["ceilings"]["matmul_tflop_per_s"])
        panel.set_xlabel(f"share of {ceiling} TFLOP/s, the measured speed of a matmul")
        panel.set_title(f"{one.name}: how near a call is to nothing but arithmetic", fontsize=10)
    style.legend(figure, handles)
    return figure


def memory(plt: Any, content: Content) -> Any:
    """Resident memory: when the model was loaded, and what was added until all cases were set up."""
    told: list[tuple[Steps, list[tuple[str, Memory]]]] = []
    for one in content.steps:
        weighed = {name: mine for name in one.contenders if (mine := one.memory(name)) is not None}
        ranked = sorted(weighed.items(), key=lambda pair: pair[1].ready)
        told += [(one, ranked)] if ranked else []
    if not told:
        return None
    figure, panels = style.panels(plt, [1.1 + 0.34 * len(found) for _, found in told])
    handles: dict[str, Any] = {}
    most = max(max(held.ready, held.opened) for _, found in told for _, held in found)
    for panel, (one, found) in zip(panels, told, strict=True):
        for line, (_, held) in enumerate(found):
            loaded = panel.barh(line, held.opened, height=0.66, color=style.SKY)
            added = panel.barh(line, max(held.added, 0.0), left=held.opened, height=0.66, color=style.VERMILION)
            handles |= {"model and libraries loaded": loaded, "added until all topologies were set up": added}
            graphs = f", {held.graphs} graph{'s' * (held.graphs != 1)}" if held.graphs else ""
            gpu = f"; GPU {number(held.gpu)}, at most {number(held.gpu_peak)}" if held.gpu is not None else ""
            text = f"{held.opened:,.0f} {held.added:+,.0f} MB{graphs}{gpu}"
            at = (max(held.ready, held.opened), line)
            panel.annotate(text, at, (6, 0), textcoords="offset points", va="center", fontsize=9)
        style.lines(panel, [name for name, _ in found])
        panel.set_xlim(0, most * (2.0 if any(held.gpu is not None for _, held in found) else 1.45))
        panel.set_title(f"{one.name}: {one.record['model']}, {', '.join(one.sizes)}", fontsize=10)
    panels[-1].set_xlabel("resident megabytes of the contender's process")
    style.legend(figure, handles)
    return figure


def shapes(plt: Any, content: Content) -> Any:
    """Symbolic over exact milliseconds, and what either costs to set up."""
    told = [(one, size) for one in content.steps if _timed(one, (SYMBOLIC, EXACT)) for size in one.sizes]
    return _ratios_and_costs(plt, told, (SYMBOLIC, EXACT), EXACT) if told else None


def regions(plt: Any, content: Content) -> Any:
    """Milliseconds over those of blocks, and what each choice costs to set up."""
    told = [(one, size) for one in content.steps if _timed(one, (SYMBOLIC, WHOLE)) for size in one.sizes]
    return _ratios_and_costs(plt, told, REGIONS, SYMBOLIC) if told else None


def _timed(one: Steps, names: Sequence[str]) -> bool:
    """Whether all of them have a time in the same case."""
    cases = [(size, topology) for size in one.sizes for topology in one.topologies(size)]
    return any(all(one.ms(name, *case) is not None for name in names) for case in cases)


def _ratios_and_costs(plt: Any, told: Sequence[tuple[Steps, str]], names: Sequence[str], other: str) -> Any:
    heights = [1.3 + 0.45 * len(names) for _ in told for _ in range(2)]
    figure, panels = style.panels(plt, heights, width=5.8, columns=2)
    handles: dict[str, Any] = {}
    for place, (one, size) in enumerate(told):
        shown = [name for name in in_order(names) if name in one.contenders]
        left, right = panels[2 * place : 2 * place + 2]
        _over(left, one, size, shown, other, handles)
        _costs(right, one, size, shown)
    style.legend(figure, handles)
    return figure


def _over(panel: Any, one: Steps, size: str, names: Sequence[str], other: str, handles: dict[str, Any]) -> None:
    topologies, most, least = one.topologies(size), 1.0, 1.0
    for line, name in enumerate(names):
        values = []
        for place, topology in enumerate(topologies):
            value = one.over(name, other, size, topology)
            if value is None:
                continue
            colour, marker = style.of_topology(topology)
            y = line + 0.5 * ((place + 0.5) / len(topologies) - 0.5)
            (handles[topology],) = panel.plot(value, y, marker, linestyle="", color=colour, markersize=6)
            values.append(value)
        most, least = max([most, *values]), min([least, *values])
        if not values:
            panel.text(1.0, line, " no time", va="center", fontsize=9)
    panel.axvline(1, color=style.BLACK, linewidth=1, linestyle="--", zorder=0)
    style.lines(panel, names)
    margin = max(0.15 * (most - least), 0.1)
    panel.set_xlim(least - margin, most + margin)
    panel.grid(axis="x", color=style.PALE, linewidth=0.6)
    panel.set_xlabel(f"time of a step over that of {other}; left is faster")
    panel.set_title(f"{one.name}, {size}", fontsize=10)


def _costs(panel: Any, one: Steps, size: str, names: Sequence[str]) -> None:
    costs: list[Setup] = [one.setup(name, size) for name in names]
    for line, cost in enumerate(costs):
        seconds = cost.cpu_s or 0.0
        panel.barh(line, seconds, height=0.6, color=style.BLUE)
        found = f", {cost.loaded} loaded" if cost.loaded else ""
        text = f"{number(cost.cpu_s)} s, {cost.compiled} compiled{found}"
        panel.annotate(text, (seconds, line), (6, 0), textcoords="offset points", va="center", fontsize=9)
    style.lines(panel, names)
    panel.set_yticklabels([])
    panel.set_xlim(0, max([cost.cpu_s or 0.0 for cost in costs] + [1e-3]) * 1.75)
    panel.set_xlabel("processor seconds of all first calls")
    panel.set_title("setting up", fontsize=10)


def profile(plt: Any, content: Content) -> Any:
    """Shares of a call's time by category."""
    told = [one for one in content.insights if one.profiles]
    if not told:
        return None
    listed = []
    for one in told:
        found = [
            (share, name, shape)
            for share in one.shares(PROFILED)
            for name in PROFILED
            if (shape := one.profile(name, share.size, share.topology)) is not None
        ]
        listed.append(found)
    figure, panels = style.panels(plt, [1.0 + 0.36 * len(found) for found in listed], width=10)
    handles: dict[str, Any] = {}
    for panel, one, found in zip(panels, told, listed, strict=True):
        for line, (_, _, shape) in enumerate(found):
            left = 0.0
            for category, value in shape["shares"].items():
                style_of: dict[str, Any] = {"color": _CATEGORIES.get(category, style.YELLOW), "edgecolor": "white"}
                if category not in _CATEGORIES:
                    style_of |= {"color": "#f4f4f4", "hatch": "///", "edgecolor": style.GREY}
                handles[category] = panel.barh(line, value, left=left, height=0.72, linewidth=0.6, **style_of)
                if value >= 0.05:
                    text = f"{100 * value:.0f}"
                    panel.text(left + value / 2, line, text, ha="center", va="center", fontsize=8, bbox=style.ON_WHITE)
                left += value
        style.lines(panel, [f"{share.size} {share.topology}: {name}" for share, name, _ in found])
        widest = max(sum(shape["shares"].values()) for _, _, shape in found)
        panel.set_xlim(0, max(1.0, widest))
        panel.xaxis.set_major_formatter(lambda value, place: f"{100 * value:.0f} %")
        panel.set_title(f"{one.name}: shares of one call's time, each bar its own call", fontsize=10)
    style.legend(figure, handles)
    return figure
