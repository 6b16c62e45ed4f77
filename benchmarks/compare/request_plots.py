"""Pictures of whole requests: cold start and compilations. Each gives a figure, or None without data."""

from __future__ import annotations

from typing import Any

from benchmarks.compare import style
from benchmarks.compare.content import EAGER, Content, Process, Requests
from benchmarks.compare.text import number, times


def cold_start(plt: Any, content: Content) -> Any:
    """Seconds until ready and until the first image; below, seconds of stalls by the number of sizes."""
    cold = [one for one in content.requests if not one.traced_only and one.processes]
    several = [one for one in content.requests if len(one.sizes) > 1 and one.processes]
    if not cold and not several:
        return None
    heights = [1.3 + 0.36 * len(one.processes) for one in cold] + [3.6] * len(several)
    figure, panels = style.panels(plt, heights)
    for panel, one in zip(panels, cold, strict=False):
        _first_images(panel, one)
    for panel, one in zip(panels[len(cold) :], several, strict=True):
        _by_sizes(panel, one)
    return figure


def _first_images(panel: Any, one: Requests) -> None:
    processes = sorted(one.processes, key=lambda told: told.record["first_image_s"])
    eager = one.eager_first_image_s()
    for line, told in enumerate(processes):
        ready, first = told.record["ready_s"], told.record["first_image_s"]
        colour = style.BLUE if told.ours else style.ORANGE
        panel.plot([ready, first], [line, line], color=colour, linewidth=3, alpha=0.5, zorder=1)
        panel.plot(ready, line, "o", markerfacecolor="white", color=colour, markersize=7)
        panel.plot(first, line, "o", color=colour, markersize=7)
        ratio = f"  ({times(first / eager)} x eager)" if eager and told.contender != "eager" else ""
        text = f"{number(first)} s{ratio}"
        panel.annotate(text, (first, line), (9, 0), textcoords="offset points", va="center", fontsize=9)
    style.lines(panel, [_label(told, one) for told in processes])
    panel.set_xscale("log")
    least = min(told.record["ready_s"] for told in processes)
    most = max(told.record["first_image_s"] for told in processes)
    panel.set_xlim(least / 1.15, most * (most / least) ** 0.3 * 1.25)
    style.plain_log(panel.xaxis)
    panel.grid(axis="x", color=style.PALE, linewidth=0.6)
    panel.set_xlabel("seconds since the start of the process, logarithmic")
    panel.set_title(f"{one.name}: until ready (hollow) and until the first image, {one.sizes[0]} (filled)", fontsize=10)


def _by_sizes(panel: Any, one: Requests) -> None:
    processes = sorted(one.processes, key=lambda told: -told.stalled_s()[-1])
    for told in processes:
        seconds = told.stalled_s()
        colour, marker = style.of_contender(told.contender)
        dash = "-" if told.number == 1 else "--"
        label = f"{_label(told, one)}: {number(seconds[-1])} s"
        panel.plot(range(1, len(seconds) + 1), seconds, dash, color=colour, marker=marker, label=label)
    panel.set_xticks(range(1, len(one.sizes) + 1))
    panel.set_xlim(0.8, len(one.sizes) + 0.2)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("sizes served so far")
    panel.set_ylabel("seconds of stalls, cumulative")
    hint = ", peers without code generation" if one.traced_only else ""
    panel.set_title(f"{one.name}: what each further size costs{hint}", fontsize=10)
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def compilations(plt: Any, content: Content) -> Any:
    """Milliseconds of every step, a panel for each process; marks where anything was compiled."""
    told = [(one, process) for one in content.requests for process in one.processes]
    if not told:
        return None
    figure, panels = style.panels(plt, [1.45] * len(told), width=11)
    handles: dict[str, Any] = {}
    for panel, (one, process) in zip(panels, told, strict=True):
        _timeline(panel, one, process, handles)
    for panel, (one, _) in zip(panels, told, strict=True):
        mine = [ms for r, p in told if r is one for request in p.requests for ms in request["step_ms"]]
        panel.set_ylim(min(mine) / 1.6, max(mine) * 2.5)
    for panel, (one, _), (below, _) in zip(panels, told, told[1:], strict=False):
        panel.tick_params(labelbottom=below is not one)
    panels[-1].set_xlabel("step, requests of all sizes one after the other")
    style.legend(figure, handles)
    return figure


def _timeline(panel: Any, one: Requests, process: Process, handles: dict[str, Any]) -> None:
    begin, steps, all_steps = 0, one.record["steps"], one.record["steps"] * len(one.sizes)
    for request in process.requests:
        ms = request["step_ms"]
        (handles["step"],) = panel.plot(
            range(begin, begin + len(ms)), ms, color=style.BLUE, linewidth=1, marker=".", markersize=3
        )
        marks = process.marks(request)
        if marks:
            (handles["step in which something was compiled"],) = panel.plot(
                [begin + step for step in marks], [ms[step] for step in marks],
                linestyle="", marker="v", markersize=7, color=style.VERMILION, markeredgecolor=style.BLACK, zorder=3,
            )  # fmt: skip
        panel.text(
            begin + steps / 2, 0.98, request["size"], transform=panel.get_xaxis_transform(), ha="center", va="top",
            fontsize=8, color="#555555", bbox=style.ON_WHITE,
        )  # fmt: skip
        if begin:
            panel.axvline(begin - 0.5, color=style.GREY, linewidth=0.8, linestyle=":")
        begin += steps
    panel.set_yscale("log")
    panel.set_xlim(-1, all_steps)
    panel.set_ylabel("ms")
    panel.grid(axis="y", color=style.PALE, linewidth=0.6)
    counted = process.counted()
    parts = [f"{process.compilations} graphs compiled"]
    if process.ours:
        parts.append(f"{process.handled('loads')} loaded")
    if process.contender not in EAGER and not process.ours:
        parts += [f"{counted['recompilations']} recompilations", f"{counted['graph_breaks']} graph breaks"]
        parts += [f"{counted['gave_up']} given up"]
    hint = ", traced only" if one.traced_only and process.contender not in EAGER and not process.ours else ""
    what = "nothing to compile" if process.contender in EAGER else ", ".join(parts)
    panel.set_title(f"{one.name}: {_label(process, one)}{hint}: {what}", fontsize=9, loc="left")


def _label(told: Process, one: Requests) -> str:
    """A name; with the process where there are several."""
    several = any(other.contender == told.contender and other.number > 1 for other in one.processes)
    if not several:
        return told.contender
    return f"{told.contender}, {'empty caches' if told.number == 1 else 'caches of process 1'}"
