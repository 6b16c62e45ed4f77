"""What a request for images may say. Pure: no torch, no web framework.

The rules are those of the deploy file; `schema` states the same rules for the service's OpenAPI description.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from accel_hidiff.config import check_pixels
from accel_hidiff.deploy import Deployment, ModelTable
from accel_hidiff.errors import BadInput
from accel_hidiff.serving.refusal import Refusal, invalid
from compile_cache import ShapeBuckets

MAX_SEED: Final = 2**53 - 1  # every JSON reader keeps such integers
MAX_GUIDANCE: Final = 50.0
SMALLEST_SIDE: Final = 64  # pixels, of sizes that no model lists
MAX_USER: Final = 256
SIZE_PATTERN: Final = "[1-9][0-9]{0,5}x[1-9][0-9]{0,5}"
FIELDS: Final = (
    *("prompt", "model", "size", "n", "seed", "steps", "guidance", "guidance_scale", "negative_prompt"),
    *("response_format", "stream", "user"),
)
_SIZE = re.compile(SIZE_PATTERN)


@dataclass(frozen=True)
class ImageRequest:
    """A valid request.

    Attributes:
        model: a name of the deploy file.
        prompt, negative_prompt: text; the second one may be None.
        height, width: pixels.
        n: number of images, at least 1.
        seed: of the first image, 0..2**53 - 1.
        steps: denoising steps, at least 1.
        guidance: the pipeline's `guidance_scale`; None: its own default.
        stream: tell progress by server-sent events.
    """

    model: str
    prompt: str
    negative_prompt: str | None
    height: int
    width: int
    n: int
    seed: int
    steps: int
    guidance: float | None
    stream: bool

    def seed_of(self, image: int) -> int:
        """The seed of image 0..n - 1: the request's seed and as many more, round again at 2**53.

        The same request with n = 1 and this seed gives the same image.
        """
        return (self.seed + image) % (MAX_SEED + 1)


def read_json(body: bytes) -> Any:
    """The JSON value of a request body; Refusal (400) where it is none."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=constant)
    except UnicodeDecodeError:
        raise invalid(None, "body: expected JSON in UTF-8, got other bytes", "invalid_json") from None
    except RecursionError:
        raise invalid(None, "body: expected a JSON object, got one nested too deep", "invalid_json") from None
    except ValueError as problem:
        raise invalid(None, f"body: expected a JSON object, got {_short(problem)}", "invalid_json") from None


def read_request(body: Any, deployment: Deployment, draw_seed: Callable[[], int]) -> ImageRequest:
    """The request that a JSON value stands for.

    Args:
        body: what `read_json` gives.
        deployment: its models and limits.
        draw_seed: makes a seed, 0..2**53 - 1, where the request names none.

    Raises:
        Refusal: 400, or 404 for a model that is not there; the message says what was expected, what came and what to
            do, in one line.
    """
    if not isinstance(body, Mapping):
        raise invalid(None, f"body: expected a JSON object, got {_kind(body)}", "invalid_json")
    if unknown := [name for name in body if name not in FIELDS]:
        near = difflib.get_close_matches(str(unknown[0]), FIELDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
        raise invalid(_short(unknown[0]), f"{_short(unknown[0])}: expected no such field; {hint}", "unknown_field")
    given = {name: value for name, value in body.items() if value is not None or name == "prompt"}
    limits = deployment.service
    model = _model(given.get("model"), deployment)
    if "prompt" not in given:
        raise invalid("prompt", "prompt: expected a text, got none; say what to draw", "missing_field")
    prompt = _text("prompt", given["prompt"], limits.max_prompt, 1)
    negative = given.get("negative_prompt")
    if given.get("response_format", "b64_json") != "b64_json":
        got = _short(repr(given["response_format"]))
        raise invalid("response_format", f'response_format: expected "b64_json", got {got}; no URLs are made here')
    if "user" in given:
        _text("user", given["user"], MAX_USER, 0)
    height, width = _size(given.get("size"), model, deployment)
    return ImageRequest(
        model=model.name,
        prompt=prompt,
        negative_prompt=None if negative is None else _text("negative_prompt", negative, limits.max_prompt, 0),
        height=height,
        width=width,
        n=_integer("n", given.get("n", 1), 1, limits.max_images),
        seed=_integer("seed", given["seed"], 0, MAX_SEED) if "seed" in given else draw_seed(),
        steps=_integer("steps", given.get("steps", default_steps(model, deployment)), 1, limits.max_steps),
        guidance=_guidance(given, model),
        stream=_boolean("stream", given.get("stream", False)),
    )


def default_steps(model: ModelTable, deployment: Deployment) -> int:
    """The steps of a request that names none: the first number of the model's table, and no more than is allowed."""
    return min(model.steps[0], deployment.service.max_steps)


def size_text(size: tuple[int, int]) -> str:
    """WIDTHxHEIGHT of (height, width).

    >>> size_text((1536, 2688))
    '2688x1536'
    """
    return f"{size[1]}x{size[0]}"


def _model(value: Any, deployment: Deployment) -> ModelTable:
    names = [model.name for model in deployment.models]
    if value is None:
        return deployment.models[0]
    if not isinstance(value, str):
        raise invalid("model", f"model: expected a text, got {_kind(value)}; there are {', '.join(names)}")
    if value not in names:
        message = f"model: expected one of {', '.join(names)}, got {_short(repr(value))}"
        raise Refusal(404, message, param="model", code="model_not_found")
    return deployment.model(value)


def _size(value: Any, model: ModelTable, deployment: Deployment) -> tuple[int, int]:
    """(height, width) in pixels."""
    listed = model.pixel_sizes()
    if value is None:
        return listed[0]
    if not isinstance(value, str) or _SIZE.fullmatch(value) is None:
        got = _short(repr(value)) if isinstance(value, str) else _kind(value)
        raise invalid("size", f"size: expected WIDTHxHEIGHT in pixels, such as {size_text(listed[0])}, got {got}")
    width, height = map(int, value.split("x"))
    if (height, width) in listed:
        return height, width
    limits = deployment.service
    if not limits.any_size:
        near = ShapeBuckets.exact((w, h) for h, w in listed).snap(width, height)
        message = f"size: expected one that {model.name} lists, got {value}; the nearest is {near.width}x{near.height}"
        raise invalid("size", message, "unknown_size")
    try:
        check_pixels(height, width)
    except BadInput as problem:
        raise invalid("size", f"size: {problem}") from None
    if min(height, width) < SMALLEST_SIDE:
        raise invalid("size", f"size: expected sides of at least {SMALLEST_SIDE} pixels, got {value}; ask for more")
    if height * width > limits.max_pixels:
        allowed = f"at most {limits.max_pixels} pixels"
        raise invalid("size", f"size: expected {allowed}, got {value}, which is {height * width}; ask for less")
    return height, width


def _guidance(given: Mapping[str, Any], model: ModelTable) -> float | None:
    names = [name for name in ("guidance", "guidance_scale") if name in given]
    if len(names) == 2:
        raise invalid("guidance_scale", "guidance_scale: expected guidance or guidance_scale, got both; name one")
    if not names:
        return None
    (name,) = names
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_GUIDANCE:
        raise invalid(name, f"{name}: expected a number in 0..{MAX_GUIDANCE:g}, got {_got(value)}")
    if model.cfgpp is not None and value <= 1:
        expected = f"expected more than 1 for {model.name}, which CFG++ guides"
        raise invalid(name, f"{name}: {expected}, got {value:g}; leave it out")
    return float(value)


def _text(name: str, value: Any, longest: int, shortest: int) -> str:
    if not isinstance(value, str):
        raise invalid(name, f"{name}: expected a text, got {_kind(value)}")
    if not shortest <= len(value) <= longest:
        raise invalid(name, f"{name}: expected {shortest} to {longest} characters, got {len(value)}", "invalid_length")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(name, f"{name}: expected Unicode text, got a half of a surrogate pair") from None
    return value


def _integer(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, float) and value.is_integer()  # JSON has one kind of number: 1.0 is 1
    if isinstance(value, bool) or not (isinstance(value, int) or whole) or not low <= value <= high:
        raise invalid(name, f"{name}: expected an integer in {low}..{high}, got {_got(value)}")
    return int(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, f"{name}: expected true or false, got {_got(value)}")
    return value


def _got(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "a larger number" if value > 0 else "a smaller number"
    return _short(json.dumps(value)) if isinstance(value, bool | int | float) else _kind(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _short(value: object) -> str:
    """On one line, printable, and not long."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))
    return text if len(text) <= 60 else f"{text[:57]}..."
