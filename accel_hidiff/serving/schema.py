"""The service's OpenAPI description: fields with their ranges, answers, and errors. States the rules of `requests`."""

from __future__ import annotations

from typing import Any, Final

from accel_hidiff.deploy import Deployment
from accel_hidiff.serving import requests

ERROR: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "One line: expected, got, what to do."},
                "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"], "description": "The field that is at fault."},
                "code": {"type": "string"},
            },
        }
    },
}
REASONS: Final = {
    400: "A field is missing, unknown or out of range, or the body is no JSON object.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is larger than `service.max_body`.",
    415: "The body is not declared as application/json.",
    429: "As many requests wait as may; `Retry-After` says when to try again.",
    500: "The pipeline failed. The log tells more.",
    503: "The model is not loaded yet, a graph is missing under `on_miss = error`, or the service is stopping.",
    504: "It took longer than `service.timeout`, waiting included.",
}
IMAGES: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["created", "model", "size", "data", "served"],
    "properties": {
        "created": {"type": "integer", "description": "Seconds since 1970."},
        "model": {"type": "string"},
        "size": {"type": "string", "pattern": f"^{requests.SIZE_PATTERN}$"},
        "data": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["b64_json", "seed"],
                "properties": {
                    "b64_json": {"type": "string", "description": "A PNG in base64."},
                    "seed": {"type": "integer", "minimum": 0, "maximum": requests.MAX_SEED},
                },
            },
        },
        "served": {
            "type": "object",
            "description": "Calls of the UNet and the decoder that compiled graphs served, and that ran eager.",
            "required": ["compiled", "eager"],
            "properties": {
                "compiled": {"type": "integer", "minimum": 0},
                "eager": {"type": "integer", "minimum": 0},
            },
        },
        "timing": {
            "type": "object",
            "required": ["waited_s", "drawn_s"],
            "properties": {"waited_s": {"type": "number"}, "drawn_s": {"type": "number"}},
        },
    },
}

_COUNT: Final = {"type": "integer", "minimum": 0}
_TOLD: Final[dict[str, dict[str, Any]]] = {
    "image_generation.queued": {"type": "object", "required": ["before"], "properties": {"before": _COUNT}},
    "image_generation.step": {
        "type": "object",
        "required": ["image", "step", "total"],
        "properties": {"image": _COUNT, "step": {**_COUNT, "minimum": 1}, "total": {**_COUNT, "minimum": 1}},
    },
    "image_generation.completed": IMAGES,
    "error": ERROR,
}
EVENT: Final[dict[str, Any]] = {
    "description": "Each event of a stream: first queued, one per step, and last completed or error.",
    "anyOf": [
        {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "event": {"const": name},
                "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": told},
            },
        }
        for name, told in _TOLD.items()
    ],
}


def request_schema(deployment: Deployment) -> dict[str, Any]:
    """JSON schema of a request body."""
    limits, first = deployment.service, deployment.models[0]
    listed = dict.fromkeys(requests.size_text(size) for model in deployment.models for size in model.pixel_sizes())
    if limits.any_size:
        size: dict[str, Any] = {"type": ["string", "null"], "pattern": f"^{requests.SIZE_PATTERN}$"}
        told = f"Multiples of 8, {requests.SMALLEST_SIDE} and up, at most {limits.max_pixels} pixels in all. "
    else:
        size = {"enum": [*listed, None]}
        told = "One that the model lists; see GET /v1/models. "
    guidance = _number(None, 0, requests.MAX_GUIDANCE, "number")
    names = [model.name for model in deployment.models]
    properties = {
        "prompt": {"type": "string", "minLength": 1, "maxLength": limits.max_prompt},
        "model": {"enum": [*names, None], "description": f"Default: {first.name}."},
        "size": {**size, "description": f"WIDTHxHEIGHT in pixels. {told}Default: the first of the model."},
        "n": _number("Images; image i has the seed seed + i. Default: 1.", 1, limits.max_images),
        "seed": _number("Drawn by chance, and told, where it is left out.", 0, requests.MAX_SEED),
        "steps": _number("Denoising steps. Default: the first number of the model.", 1, limits.max_steps),
        "guidance": {**guidance, "description": "The pipeline's guidance_scale. Default: the pipeline's own."},
        "guidance_scale": {**guidance, "description": "Another name of guidance."},
        "negative_prompt": {"type": ["string", "null"], "maxLength": limits.max_prompt},
        "response_format": {"enum": ["b64_json", None]},
        "stream": {"type": ["boolean", "null"], "description": "Progress by server-sent events. Default: false."},
        "user": {"type": ["string", "null"], "maxLength": requests.MAX_USER, "description": "Not used."},
    }
    both = {"required": ["guidance", "guidance_scale"]}
    numbers = {name: {"type": "number"} for name in both["required"]}
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["prompt"],
        "properties": properties,
        "not": {**both, "properties": numbers},
    }


def generation_operation(deployment: Deployment) -> dict[str, Any]:
    """What OpenAPI says of `POST /v1/images/generations` beside its summary."""
    example = {"prompt": "a lighthouse in a storm", "seed": 1}
    body = {"schema": request_schema(deployment), "example": example}
    answers: dict[int, Any] = {
        200: {
            "description": "The images; with `stream`, events.",
            "content": {"application/json": {"schema": IMAGES}, "text/event-stream": {"schema": EVENT}},
        },
        **{status: error_answer(REASONS[status]) for status in REASONS},
    }
    retry = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    answers[429]["headers"] = retry
    return {
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {str(status): answer for status, answer in answers.items()},
    }


def error_answer(reason: str) -> dict[str, Any]:
    """An answer with an error for a body."""
    return {"description": reason, "content": {"application/json": {"schema": ERROR}}}


def json_answer(description: str, *required: str) -> dict[str, Any]:
    """An answer with a JSON object that has these members."""
    schema = {"type": "object", "required": list(required)}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _number(description: str | None, low: float, high: float, kind: str = "integer") -> dict[str, Any]:
    told = {} if description is None else {"description": description}
    return {"type": [kind, "null"], "minimum": low, "maximum": high, **told}
