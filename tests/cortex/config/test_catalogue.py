"""models.toml: valid and invalid catalogues."""

from __future__ import annotations

from pathlib import Path

import pytest

from cortex.config.catalogue import Catalogue, LoraSettings, load_catalogue
from cortex.config.profile import ModelProfile
from shared.settings import SettingsError

TWO = "[[models]]\nid = 'a'\n[[models.variants]]\nquant = 'fp8'\n[[models.variants]]\n"
"""The beginning of a model with two variants; the keys of the second one follow."""
ADAPTER = "[[models]]\nid = 'a'\nbase = 'b'\nlora = '/a'\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "models.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problem(tmp_path: Path, text: str) -> str:
    """The only problem of a catalogue, without the leading file name."""
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_catalogue(path)
    assert len(caught.value.problems) == 1, caught.value.problems
    assert caught.value.problems[0].startswith(f"{path}: ")
    return caught.value.problems[0].removeprefix(f"{path}: ")


def test_only_the_id_is_needed(tmp_path: Path) -> None:
    """Every other field has a default."""
    catalogue = load_catalogue(write(tmp_path, "[[models]]\nid = 'org/model'"))
    profile = catalogue.models[0]
    assert profile == ModelProfile(id="org/model")
    assert (profile.harness, profile.min_devices, profile.residency_priority) == ("vllm", 1, 100)
    assert (profile.tensor_parallel, profile.device_share_mb, profile.pinned_on, profile.limit) == (None, 0, (), None)


def test_empty_catalogue_is_valid(tmp_path: Path) -> None:
    """An empty catalogue serves models that are loaded by hand."""
    assert load_catalogue(write(tmp_path, "")) == Catalogue()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 100),
        ({"pinned_on": []}, 100),
        ({"pinned_on": ["beast"]}, 1000),
        ({"pinned_on": ["beast"], "residency_priority": 300}, 300),
        ({"residency_priority": 0}, 0),
    ],
)
def test_priority_of_pinned_models(fields: dict[str, object], expected: int) -> None:
    """The priority is 1000 with pinned_on, unless it is set explicitly."""
    assert ModelProfile.model_validate({"id": "m", **fields}).residency_priority == expected


@pytest.mark.parametrize(
    ("devices", "vram_mb", "share", "parallel"),
    [(1, 4000, 4000, None), (2, 54000, 27000, 2), (3, 10000, 3334, 3), (2, None, 0, 2)],
)
def test_share_of_each_device(devices: int, vram_mb: int | None, share: int, parallel: int | None) -> None:
    """The footprint covers all devices; each share is rounded up, and tensor_parallel is only sent above 1."""
    profile = ModelProfile(id="m", min_devices=devices, vram_mb=vram_mb)
    assert (profile.device_share_mb, profile.tensor_parallel) == (share, parallel)


@pytest.mark.parametrize(
    ("fields", "split", "devices", "short"),
    [
        ({}, "tensor 1 x pipeline 1 x data 1", 1, 1),
        ({"min_devices": 4}, "tensor 4 x pipeline 1 x data 1", 4, 4),
        ({"parallel": {"tensor": 2, "pipeline": 2, "data": 2}}, "tensor 2 x pipeline 2 x data 2", 8, 2),
        ({"parallel": {"pipeline": 3}}, "tensor 1 x pipeline 3 x data 1", 3, 1),
        ({"min_devices": 2, "parallel": {"data": 2, "expert": True}}, "tensor 2 x pipeline 1 x data 2, expert", 4, 2),
        ({"min_devices": 2, "parallel": {"tensor": 2}}, "tensor 2 x pipeline 1 x data 1", 2, 2),
    ],
)
def test_parallel(fields: dict[str, object], split: str, devices: int, short: int) -> None:
    """The device count is the product; `min_devices` is the short form of `tensor`, and either may be given."""
    profile = ModelProfile.model_validate({"id": "m", "vram_mb": 24000, **fields})
    assert (str(profile.parallelism), profile.device_count, profile.min_devices) == (split, devices, short)
    assert profile.device_share_mb == 24000 // devices
    assert profile.tensor_parallel == (short if short > 1 else None)


def test_variants_inherit_what_they_do_not_set() -> None:
    """Each is a profile of the one id, in the order of the catalogue, named by its `name`, `quant` or number."""
    profile = ModelProfile.model_validate(
        {
            "id": "m",
            "quant": "bf16",
            "vram_mb": 40000,
            "parallel": {"tensor": 2, "pipeline": 2},
            "pinned_on": ["beast"],
            "args": ["--x"],
            "tools": True,
            "replicas": {"min": 2},
            "variants": [
                {"quant": "fp8", "min_compute_capability": 8.9},
                {"min_devices": 1, "vram_mb": 9000, "pinned_on": [], "source": "org/small", "args": []},
                {"name": "wide", "parallel": {"data": 3}, "harness": "sim", "min_device_vram_mb": 9000},
            ],
        }
    )
    fp8, small, wide = profile.choices
    assert [each.variant for each in profile.choices] == ["fp8", "2", "wide"]
    assert {(each.id, each.tools, each.replicas.min, each.residency_priority) for each in profile.choices} == {
        ("m", True, 2, 1000)
    }
    assert (fp8.quant, fp8.vram_mb, fp8.device_count, fp8.min_compute_capability) == ("fp8", 40000, 4, "8.9")
    assert (fp8.pinned_on, fp8.args, fp8.source, fp8.harness) == (("beast",), ("--x",), None, "vllm")
    assert (small.quant, small.vram_mb, small.device_count, small.parallel) == ("bf16", 9000, 1, None)
    assert (small.pinned_on, small.args, small.source) == ((), (), "org/small")
    assert (wide.device_count, wide.tensor_parallel, wide.harness, wide.min_device_vram_mb) == (3, None, "sim", 9000)
    assert profile.choice("2") is small
    assert profile.choice("3") is None
    assert profile.choice(None) is None


def test_without_variants_a_model_is_its_own_choice() -> None:
    """Also when it is copied with another value."""
    profile = ModelProfile(id="m")
    assert profile.choices == (profile,)
    assert profile.choice(None) is profile
    assert profile.variant is None
    copy = profile.model_copy(update={"vram_mb": 5})
    assert copy.choices[0].vram_mb == 5


@pytest.mark.parametrize(("given", "expected"), [(8.9, "8.9"), (9, "9.0"), ("9", "9.0"), ("12.0", "12.0")])
def test_compute_capability_may_be_a_number(given: object, expected: str) -> None:
    assert ModelProfile.model_validate({"id": "m", "min_compute_capability": given}).min_compute_capability == expected


def test_names_of_variants(tmp_path: Path) -> None:
    """A variant has a name of its own, an alias may stand for one, and an id may contain an `@`."""
    text = f"{TWO}quant = 'awq'\n[[models]]\nid = 'b@c'\n[aliases]\nx = 'a'\ny = 'a@awq'\nz = 'b@c'"
    catalogue = load_catalogue(write(tmp_path, text))
    assert catalogue.names_of("a") == ("a", "a@fp8", "a@awq")
    assert catalogue.names_of("b@c") == ("b@c",)
    assert catalogue.names_of("unknown") == ("unknown",)
    for name, expected in {
        "a": "a",
        "a@fp8": "a@fp8",
        "x": "a",
        "x@fp8": "a@fp8",
        "y": "a@awq",
        "y@fp8": "y@fp8",
        "z": "b@c",
        "b@c": "b@c",
        "a@int4": "a@int4",
    }.items():
        assert catalogue.resolve(name) == expected
    assert catalogue.requested("a@fp8") == ("a", "fp8")
    assert catalogue.requested("b@c") == ("b@c", None)
    awq = catalogue.profile("a@awq")
    assert awq is not None
    assert (awq.id, awq.variant, awq.requested.name) == ("a", "awq", "a@awq")
    assert catalogue.profile("a@int4") is None
    meant = catalogue.model_meant_by("a@int4")
    assert meant is catalogue.model_meant_by("x@int4") is catalogue.profile("a")
    assert meant is not None
    assert meant.variants_text == "'a' has the variants fp8, awq"
    assert [catalogue.model_meant_by(name) for name in ("b@x", "@fp8", "a@", "a")] == [None] * 4


def test_aliases(tmp_path: Path) -> None:
    """An alias resolves to its model, any other name to itself."""
    catalogue = load_catalogue(write(tmp_path, "[[models]]\nid = 'org/model'\n[aliases]\nlarge = 'org/model'"))
    assert catalogue.resolve("large") == "org/model"
    assert catalogue.resolve("other") == "other"
    assert catalogue.profile("large") is None
    assert catalogue.profile("org/model") is catalogue.models[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[models]]", "models[0].id: required, but missing"),
        ("[[models]]\nid = ''", "models[0].id = '': "),
        ("[[models]]\nid = 'a b'", "models[0].id = 'a b': "),
        ("[[models]]\nid = 'a'\n[[models]]\nid = 'a'", "the model 'a' is listed twice"),
        ("[[models]]\nid = 'a'\nvram = 5", "models[0].vram: unknown key (value 5)"),
        ("[[models]]\nid = 'a'\nvram_mb = 0", "models[0].vram_mb = 0: "),
        ("[[models]]\nid = 'a'\nvram_mb = 'big'", "models[0].vram_mb = 'big': "),
        ("[[models]]\nid = 'a'\nmin_devices = 0", "models[0].min_devices = 0: "),
        (
            "[[models]]\nid = 'a'\nmin_devices = 4\nparallel = { tensor = 2 }",
            "models[0].parallel: tensor is 2, but min_devices is 4: remove one, or make them equal",
        ),
        ("[[models]]\nid = 'a'\nparallel = { tensor = 0 }", "models[0].parallel.tensor = 0: must be at least 1"),
        ("[[models]]\nid = 'a'\nparallel = { tensr = 2 }", "models[0].parallel.tensr: unknown key (value 2)"),
        ("[[models]]\nid = 'a'\nparallel = { expert = 1 }", "models[0].parallel.expert = 1: must be true or false"),
        ("[[models]]\nid = 'a'\nparallel = 8", "models[0].parallel = 8: must be a table"),
        (
            "[[models]]\nid = 'a'\nparallel = { tensor = 8, pipeline = 8, data = 2 }",
            "models[0].parallel: tensor 8 x pipeline 8 x data 2 needs 128 devices, at most 64 are possible",
        ),
        ("[[models]]\nid = 'a'\nreplicas = { per_node = 0 }", "models[0].replicas.per_node = 0: must be at least 1"),
        ("[[models]]\nid = 'a'\nreplicas = { min = 3, max = 2 }", "max (2) is below min (3)"),
        ("[[models]]\nid = 'a'\nmin_device_vram_mb = -1", "models[0].min_device_vram_mb = -1: "),
        ("[[models]]\nid = 'a'\npinned_on = 'beast'", "models[0].pinned_on = 'beast': "),
        ("[[models]]\nid = 'a'\nargs = '--x'", "models[0].args = '--x': "),
        ("[[models]]\nid = 'a'\n[models.limit]\ncontext = 0", "models[0].limit.context = 0: "),
        (f"[[models]]\nid = 'a'\n[models.limit]\nrpm = {10**16}", f"models[0].limit.rpm = {10**16}: "),
        ("[[models]]\nid = 'a'\n[models.limit]\nmax = 1", "models[0].limit.max: unknown key"),
        (
            "[[models]]\nid = 'a'\nmax_model_len = 0",
            "models[0].max_model_len = 0: must be a number of tokens, at least 1,",
        ),
        ("[[models]]\nid = 'a'\nmax_model_len = '32k'", "models[0].max_model_len = '32k': must be a number of tokens"),
        (
            "[[models]]\nid = 'a'\nmax_model_len = 9\nargs = ['--max_model_len=8']",
            "max_model_len: --max-model-len is in args too, remove one of them",
        ),
        (f"{TWO}args = ['--max-model-len', '8']\nmax_model_len = 'auto'", "--max-model-len is in args too"),
        ("[aliases]\nx = 'nothing'", "'x' points to 'nothing', which is not in this catalogue"),
        ("[[models]]\nid = 'a'\n[aliases]\na = 'a'", "'a' is also the id of a model"),
        ("[[models]]\nid = 'a'\n[aliases]\nb = 'a'\nc = 'b'", "'c' points to 'b', an alias too: name its model"),
        ("[model]\nid = 'a'", "model: unknown key"),
        ("[[models]]\nid = 'a'\nmin_compute_capability = 'ada'", "models[0].min_compute_capability = 'ada': "),
        (
            f"{TWO}name = 'fp8'",
            "models[0].variants = a list of tables: two variants are named 'fp8': give each a `name` of its own",
        ),
        (f"{TWO}name = 'a b'", "models[0].variants[1].name = 'a b': "),
        (f"{TWO}name = 'a@b'", "models[0].variants[1].name = 'a@b': "),
        (f"{TWO}quant = 'a b'", "models[0].variants[1]"),
        (f"{TWO}name = ''", "models[0].variants[1].name = '': "),
        (f"{TWO}vram_mb = 0", "models[0].variants[1].vram_mb = 0: "),
        (f"{TWO}replicas = 2", "models[0].variants[1].replicas: unknown key (value 2)"),
        (f"{TWO}pinned_on = 'beast'", "models[0].variants[1].pinned_on = 'beast': "),
        (
            f"{TWO}min_devices = 2\nparallel = {{ tensor = 4 }}",
            "models[0].variants[1].parallel: tensor is 4, but min_devices is 2: remove one, or make them equal",
        ),
        ("[[models]]\nid = 'a'\nvariants = 2", "models[0].variants = 2: "),
        ("[[models]]\nid = 'a'\nvariants = [2]", "models[0].variants[0] = 2: "),
        (
            f"{TWO}quant = 'awq'\n[[models]]\nid = 'a@awq'",
            "'a@awq' is the id of a model and also stands for the variant 'awq' of 'a': rename one",
        ),
        (f"{TWO}quant = 'awq'\n[aliases]\n'a@awq' = 'a'", "aliases: 'a@awq' is also a variant of 'a'"),
        (
            f"{TWO}quant = 'awq'\n[aliases]\nx = 'a@int4'",
            "aliases: 'x' points to 'a@int4', which is not in this catalogue ('a' has the variants fp8, awq)",
        ),
        ("[[models]]\nid = 'a'\nlora = '/a'", "base: required with lora, the id of the model that the adapter belongs"),
        (
            "[[models]]\nid = 'a'\nbase = 'b'",
            "lora: required with base, the adapter's directory or its name on the hub",
        ),
        (
            f"{ADAPTER}[[models]]\nid = 'c'",
            "the base of the adapter 'a', 'b', is not the id of a model in this catalogue",
        ),
        (f"{ADAPTER}vram_mb = 5\n[[models]]\nid = 'b'", "an adapter runs on the engine of 'b', whose entry says how: "),
        (
            f"{ADAPTER}[[models]]\nid = 'b'\nharness = 'own'",
            "has the harness 'own': only vllm and sim can load adapters",
        ),
        (
            f"{ADAPTER}[[models]]\nid = 'b'\nbase = 'c'\nlora = '/b'\n[[models]]\nid = 'c'",
            "the base of the adapter 'a' is 'b', which is an adapter of 'c' itself: name a model",
        ),
        ("[[models]]\nid = 'a'\nbase = 'b'\nlora = './a'", "models[0].lora = './a': "),
        ("[[models]]\nid = 'a'\nmax_loras = 0", "models[0].max_loras = 0: "),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, expected: str) -> None:
    """Each problem names the key and, where there is one, the value."""
    assert expected in problem(tmp_path, text)


def test_adapters() -> None:
    """They share their base's profile; the base is prepared for as many as it says, or four."""
    models: list[dict[str, object]] = [{"id": "b"}, {"id": "x", "base": "b", "lora": "/x"}, {"id": "plain"}]
    catalogue = Catalogue.model_validate({"models": models, "aliases": {"short": "x"}})
    assert catalogue.loras("b") == LoraSettings(4, None, ("/x",))
    assert (catalogue.loras("plain"), catalogue.loras("x")) == (None, None)
    assert (catalogue.profile("x"), catalogue.requested("x").name) == (catalogue.profile("b"), "b")
    assert catalogue.names_of("b") == ("b", "x")
    assert catalogue.rewrites["short"][:2] == ("x", "x")


def test_environment_does_not_reach_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`MODELS` and `ALIASES` in the environment are ignored."""
    monkeypatch.setenv("MODELS", "[]")
    monkeypatch.setenv("ALIASES__X", "y")
    assert len(load_catalogue(write(tmp_path, "[[models]]\nid = 'a'")).models) == 1
