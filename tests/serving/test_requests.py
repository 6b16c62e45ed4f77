"""What may be asked, and how everything else is refused: without torch, without a service."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_hidiff.deploy import AspectRatios, Deployment, ModelTable, ServiceTable
from accel_hidiff.serving.refusal import Refusal
from accel_hidiff.serving.requests import FIELDS, MAX_SEED, ImageRequest, read_json, read_request
from accel_hidiff.serving.schema import ERROR, generation_operation, request_schema

DEPLOYMENT = Deployment(
    models=(
        ModelTable("base", "some/model", sizes=("1024x1024", "2688x1536"), steps=(30, 8)),
        ModelTable("plus", "some/model", sizes=("1024x1024",), cfgpp=0.6),
    ),
    service=ServiceTable(max_prompt=50, max_steps=100, max_images=4),
)
ONE = dataclasses.replace(DEPLOYMENT, models=DEPLOYMENT.models[:1])
ANY = dataclasses.replace(ONE, service=dataclasses.replace(ONE.service, any_size=True, max_pixels=2048 * 2048))


def read(deployment: Deployment = DEPLOYMENT, **fields: Any) -> ImageRequest:
    return read_request({"prompt": "a red circle", **fields}, deployment, lambda: 77)


class TestAccepted:
    def test_what_is_left_out(self) -> None:
        assert read() == ImageRequest("base", "a red circle", None, 1024, 1024, 1, 77, 30, None, False)

    def test_everything(self) -> None:
        fields = {"model": "base", "size": "2688x1536", "n": 2, "seed": 5, "steps": 9, "guidance": 7, "stream": True}
        got = read(**fields, negative_prompt="", response_format="b64_json", user="somebody")
        assert got == ImageRequest("base", "a red circle", "", 1536, 2688, 2, 5, 9, 7.0, True)

    def test_null_is_left_out(self) -> None:
        assert read(**{name: None for name in FIELDS if name != "prompt"}) == read()

    def test_a_whole_float_is_an_integer(self) -> None:
        assert read(n=2.0).n == 2 and isinstance(read(n=2.0).n, int)

    def test_both_names_of_guidance(self) -> None:
        assert read(guidance_scale=3).guidance == read(guidance=3).guidance == 3.0

    def test_default_steps_are_within_the_limit(self) -> None:
        tight = dataclasses.replace(DEPLOYMENT, service=dataclasses.replace(DEPLOYMENT.service, max_steps=4))
        assert read(tight).steps == 4

    def test_seeds_of_the_images_go_round(self) -> None:
        assert [read(seed=7, n=3).seed_of(n) for n in range(3)] == [7, 8, 9]
        assert read(seed=MAX_SEED).seed_of(1) == 0

    def test_sizes_of_a_family_are_listed(self) -> None:
        model = ModelTable("base", "some/model", aspect_ratios=AspectRatios(2.0))
        assert read(Deployment((model,)), size="2688x1536").width == 2688

    def test_any_size(self) -> None:
        assert (read(ANY, size="72x1000").height, read(ANY, size="72x1000").width) == (1000, 72)


REFUSED = [
    ({"prompt": None}, "prompt", "prompt: expected a text, got null"),
    ({"prompt": ""}, "prompt", "prompt: expected 1 to 50 characters, got 0"),
    ({"prompt": "x" * 51}, "prompt", "expected 1 to 50 characters, got 51"),
    ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
    ({"prompt": ["a"]}, "prompt", "expected a text, got an array"),
    ({"negative_prompt": "x" * 51}, "negative_prompt", "expected 0 to 50 characters"),
    ({"size": "1000x1000"}, "size", "one that base lists, got 1000x1000; the nearest is 1024x1024"),
    ({"size": "2600x1500"}, "size", "the nearest is 2688x1536"),
    ({"size": "2688x1536", "model": "plus"}, "size", "one that plus lists"),
    ({"size": "1024"}, "size", "expected WIDTHxHEIGHT in pixels, such as 1024x1024, got '1024'"),
    ({"size": "-8x8"}, "size", "expected WIDTHxHEIGHT"),
    ({"size": "1024X1024"}, "size", "expected WIDTHxHEIGHT"),
    ({"size": "9" * 5000 + "x8"}, "size", "expected WIDTHxHEIGHT"),
    ({"size": "\u0661\u0660x\u0661\u0660"}, "size", "expected WIDTHxHEIGHT"),
    ({"size": 1024}, "size", "got a number"),
    ({"size": "x\n\n" * 50}, "size", "expected WIDTHxHEIGHT"),
    ({"n": 0}, "n", "n: expected an integer in 1..4, got 0"),
    ({"n": 5}, "n", "n: expected an integer in 1..4, got 5"),
    ({"n": 1.5}, "n", "got 1.5"),
    ({"n": True}, "n", "got true"),
    ({"n": "2"}, "n", "got a text"),
    ({"n": 10**400}, "n", "got a larger number"),
    ({"seed": -1}, "seed", "in 0..9007199254740991, got -1"),
    ({"seed": MAX_SEED + 1}, "seed", "got 9007199254740992"),
    ({"seed": -(10**400)}, "seed", "got a smaller number"),
    ({"steps": 101}, "steps", "in 1..100, got 101"),
    ({"steps": {}}, "steps", "got an object"),
    ({"guidance": 51}, "guidance", "expected a number in 0..50, got 51"),
    ({"guidance_scale": -0.5}, "guidance_scale", "guidance_scale: expected a number in 0..50, got -0.5"),
    ({"guidance": 5, "guidance_scale": 5}, "guidance_scale", "got both"),
    ({"model": "plus", "guidance": 1}, "guidance", "more than 1 for plus, which CFG++ guides, got 1"),
    ({"model": 3}, "model", "there are base, plus"),
    ({"response_format": "url"}, "response_format", "expected \"b64_json\", got 'url'"),
    ({"stream": "yes"}, "stream", "expected true or false, got a text"),
    ({"user": "x" * 257}, "user", "expected 0 to 256 characters"),
    ({"promt": "x"}, "promt", "promt: expected no such field; did you mean prompt?"),
    ({"\n" * 300: "x"}, "", "expected no such field; there are prompt, model"),
]


class TestRefused:
    @pytest.mark.parametrize(("fields", "param", "message"), REFUSED)
    def test_with_the_field_and_one_line(self, fields: dict[str, Any], param: str, message: str) -> None:
        with pytest.raises(Refusal) as refused:
            read(**fields)
        refusal = refused.value
        assert (refusal.status, refusal.kind, refusal.param) == (400, "invalid_request_error", param)
        assert message in refusal.message
        assert "\n" not in refusal.message and len(refusal.message) < 300
        jsonschema.validate(refusal.to_json(), ERROR)

    def test_an_unknown_model_is_not_found(self) -> None:
        with pytest.raises(Refusal, match="expected one of base, plus, got 'bse'") as refused:
            read(model="bse")
        assert (refused.value.status, refused.value.code) == (404, "model_not_found")

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            ("1001x1024", "width: expected a multiple of 8 pixels, got 1001; the nearest is 1000"),
            ("56x1024", "sides of at least 64 pixels, got 56x1024"),
            ("2048x2056", "at most 4194304 pixels, got 2048x2056, which is 4210688"),
            ("999999x999999", "multiple of 8"),
        ],
    )
    def test_sizes_where_any_may_be(self, size: str, message: str) -> None:
        with pytest.raises(Refusal, match=message):
            read(ANY, size=size)

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (b"", "expected a JSON object"),
            (b"{", "expected a JSON object"),
            (b"\xff\xfe", "expected JSON in UTF-8"),
            (b'{"n": NaN}', "NaN is no JSON number"),
            (b"[" * 100_000, "nested too deep"),
            (b'{"n": ' + b"9" * 5000 + b"}", "expected a JSON object"),
        ],
    )
    def test_no_json(self, body: bytes, message: str) -> None:
        with pytest.raises(Refusal, match=message) as refused:
            read_json(body)
        assert refused.value.status == 400 and refused.value.code == "invalid_json"
        assert "\n" not in refused.value.message

    @pytest.mark.parametrize("body", [[], "x", 3, None, True])
    def test_no_object(self, body: Any) -> None:
        with pytest.raises(Refusal, match="expected a JSON object, got"):
            read_request(body, DEPLOYMENT, lambda: 0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=60),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "prompt": st.text(min_size=1, max_size=52),
    "model": st.sampled_from(["base", "bas"]),
    "size": st.sampled_from(["1024x1024", "2688x1536", "1024x1023"]),
    "n": st.integers(-1, 6),
    "seed": st.integers(-1, 2**54),
    "steps": st.integers(0, 120) | st.sampled_from([1.0, 2.5]),
    "guidance": st.floats(-1, 60),
    "guidance_scale": st.none() | st.just(3),
    "negative_prompt": st.text(max_size=52),
    "response_format": st.sampled_from(["b64_json", "url"]),
    "stream": st.booleans(),
    "user": st.text(max_size=5),
    "other": st.none(),
}


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": "a red circle"}
    for name in draw(st.lists(st.sampled_from(sorted(LIKELY)), unique=True, max_size=5)):
        body[name] = draw(LIKELY[name] if draw(st.integers(0, 4)) else JSON)
    return body


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # text is slow to begin with
@given(bodies())
def test_the_schema_says_what_is_accepted(body: dict[str, Any]) -> None:
    body = json.loads(json.dumps(body))
    valid = jsonschema.Draft202012Validator(request_schema(ONE)).is_valid(body)
    try:
        read_request(body, ONE, lambda: 0)
    except Refusal as refusal:
        assert not valid, refusal.message
    else:
        assert valid


def test_the_schema_names_every_field_and_error() -> None:
    operation = generation_operation(DEPLOYMENT)
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert tuple(schema["properties"]) == FIELDS
    assert schema["properties"]["steps"]["maximum"] == 100 and schema["properties"]["n"]["maximum"] == 4
    assert {"200", "400", "404", "413", "429", "500", "503", "504"} <= set(operation["responses"])
    jsonschema.Draft202012Validator.check_schema(schema)
