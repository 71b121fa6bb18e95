"""Promises of the manifest: every mistake at once, with its line and the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.errors import UsageError
from bridge.manifest import ManifestError, load_manifest, read_sources
from bridge.spec import ModelSpec, read_profile


def write(folder: Path, text: str) -> Path:
    path = folder / "nets.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def mistakes(folder: Path, text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(write(folder, text))
    return str(caught.value)


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = """\
defaults:
  presicion: fp16
  name: x
  tolerance: 1e-3
models:
  - name: resnet
    source: nowhere.onnx
    profiles:
      x: 4x3:2x3:8x3
      y: [[1, 2], [1, 2, 3], [1, 2, 3]]
      z: 1xq
    seed: 1
    seed: 2
  - name: resnet
    source: zoo:resnet
    inputs: {x: nowhere.npy}
    tolerance: {logits: {rtol: 1e-3, atoll: 2}}
  - name: ../unet
    int_range: [5, 1]
    timeout: -1
  - just text
modles: 3
"""
    found = mistakes(tmp_path, text).replace(f"{tmp_path}/", "").splitlines()
    assert found == [
        "nets.yaml: 18 mistakes",
        "  nets.yaml:2: defaults: unknown key 'presicion'; did you mean 'precision'?",
        "  nets.yaml:3: defaults: 'name' belongs to a model, not to defaults",
        "  nets.yaml:4: defaults.tolerance: should be a mapping such as {rtol: 1e-3, atol: 1e-5}, not 0.001",
        "  nets.yaml:7: model 'resnet': source: no such file: nowhere.onnx",
        "  nets.yaml:9: model 'resnet': profiles.x: min <= opt <= max does not hold on axis 0: 4, 2, 8",
        "  nets.yaml:10: model 'resnet': profiles.y: min, opt and max have 2, 3 and 3 dimensions",
        "  nets.yaml:11: model 'resnet': profiles.z: '1xq' is no shape; write one shape as 1x3x224x224, "
        "or three as MIN:OPT:MAX",
        "  nets.yaml:13: model 'resnet': 'seed' stands here again, after line 12",
        "  nets.yaml:14: the name 'resnet' is taken by the model of line 6",
        "  nets.yaml:16: model 'resnet': inputs.x: no such file: nowhere.npy",
        "  nets.yaml:17: model 'resnet': tolerance.logits: the key 'atol' is missing",
        "  nets.yaml:17: model 'resnet': tolerance.logits: unknown key 'atoll'; did you mean 'atol'?",
        "  nets.yaml:18: model '../unet': name: '../unet' cannot be the name of a folder, which a model's name is",
        "  nets.yaml:18: model '../unet': the key 'source' is missing",
        "  nets.yaml:19: model '../unet': int_range: the lower bound 5 is above the upper bound 1",
        "  nets.yaml:20: model '../unet': timeout: should be greater than 0, not -1",
        "  nets.yaml:21: model number 4: should be a mapping, not 'just text'",
        "  nets.yaml:22: unknown key 'modles'; did you mean 'models'?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:\n  - {name: a\n  - b", ":3: not YAML: while parsing a flow mapping"),
        ("models:\n\t- a", ":2: not YAML: while scanning for the next token found character '\\t'"),
        ("models: !!python/object:os.system x", ":1: not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("models: \x01", "not YAML: unacceptable character"),
        ("", ":1: should be a mapping, not None"),
        ("models: []", ":1: models: is empty; at least one is needed"),
        ("models: {a: b}", ":1: models: should be a valid list, not {'a': 'b'}"),
        ("models:\n- {name: 5, source: a:b}", "model number 1: name: should be text, not 5; put it in quotes"),
        ("models: [{name: a, source: resnet}]", "'resnet' is neither an .onnx file nor of the form package.module"),
        ("models: [{name: a, source: a:b}]\nmodels: []", ":2: 'models' stands here again, after line 1"),
        ("models: &m [*m]", "should be a mapping"),
        ("models: [{name: a, source: a:b, task_check: thing}]", "task_check: 'thing' is not of the form"),
        ("models: [{name: index.html, source: a:b}]", "'index.html' is a file of the whole run"),
    ],
)
def test_a_broken_manifest_is_refused_with_its_line_and_cause(tmp_path: Path, text: str, message: str) -> None:
    assert message in mistakes(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.yaml: No such file or directory"):
        load_manifest(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"models: \xe9")
    with pytest.raises(ManifestError, match=r"latin\.yaml: not UTF-8 text: .* at byte 8"):
        load_manifest(tmp_path / "latin.yaml")


def test_a_model_wins_over_the_defaults_and_the_command_line_over_both(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
defaults: {precision: fp16, timeout: 60, tolerance: {rtol: 1e-3, atol: 1e-5}, seed: 7}
models:
  - {name: a, source: zoo:a, precision: bf16, timeout: null}
  - {name: b, source: zoo:b}
""",
    )
    a, b = load_manifest(path, {"seed": 8})
    assert (a.precision, b.precision) == ("bf16", "fp16")
    assert (a.timeout, b.timeout) == (None, 60.0), "null takes a default away"
    assert b.model_dump()["tolerance"] == {"rtol": 1e-3, "atol": 1e-5}
    assert (a.seed, b.seed) == (8, 8)
    assert load_manifest(path, {"precision": "fp32"})[0].precision == "fp32"


def test_paths_are_relative_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "net.onnx").touch()
    (folder / "x.npy").touch()
    write(folder, "models: [{name: net, source: net.onnx, inputs: {x: x.npy}}]")
    monkeypatch.chdir(tmp_path)
    (spec,) = read_sources(["zoo/nets.yaml"], {})
    assert spec.source == str(folder / "net.onnx")
    assert spec.inputs == {"x": str(folder / "x.npy")}


@pytest.mark.filterwarnings("error")
def test_a_model_goes_to_its_process_as_json_and_comes_back_the_same(tmp_path: Path) -> None:
    (tmp_path / "x.npy").touch()
    path = write(
        tmp_path,
        """\
defaults: {tolerance: {y: {rtol: 0, atol: 1e-3}, z: {rtol: 0, atol: 0}}, int_range: [0, 9], build: false}
models:
  - {name: a, source: zoo:a, profiles: {x: 1x3:2x3:4x3}, inputs: {x: x.npy}, compute_capabilities: [8.9]}
  - {name: b, source: zoo:b, tolerance: {rtol: 1e-3, atol: 0}, inputs: "zoo:inputs"}
""",
    )
    for spec in load_manifest(path):
        assert (
            ModelSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json", exclude_unset=True)))) == spec
        )


def test_a_list_of_profiles_is_read_and_its_mistakes_are_found_where_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path, "models:\n  - {name: a, source: zoo:a, profiles: [{x: 1x3:2x3:4x3}, {x: [8, 3]}]}\n")
    (spec,) = load_manifest(path)
    assert spec.profiles == [{"x": ((1, 3), (2, 3), (4, 3))}, {"x": ((8, 3), (8, 3), (8, 3))}]
    text = """\
models:
  - name: a
    source: zoo:a
    profiles:
      - x: 1x3
      - x: 4x3:2x3:4x3
  - {name: b, source: zoo:b, profiles: []}
"""
    assert mistakes(tmp_path, text).replace(f"{tmp_path}/", "").splitlines()[1:] == [
        "  nets.yaml:6: model 'a': profiles.1.x: min <= opt <= max does not hold on axis 0: 4, 2, 4",
        "  nets.yaml:7: model 'b': profiles: is empty; at least one is needed",
    ]


def test_settings_of_the_builder_and_a_calibration_are_read_and_checked(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "models:\n  - {name: a, source: zoo:a, precision: int8, calibration: zoo:typical,\n"
        "     calibration_algorithm: minmax,\n"
        "     builder: {workspace: 1_073_741_824, tf32: true, max_aux_streams: 0, device_types: {head: DLA}}}\n",
    )
    (spec,) = load_manifest(path)
    told = {"workspace": 1 << 30, "tf32": True, "max_aux_streams": 0, "device_types": {"head": "DLA"}}
    assert (spec.builder, spec.calibration, spec.calibration_algorithm) == (told, "zoo:typical", "minmax")
    text = """\
models:
  - name: a
    source: zoo:a
    builder:
      optimisation_level: 5
  - {name: b, source: zoo:b, builder: {workspace: 4GiB}}
  - {name: c, source: zoo:c, calibration: typical}
"""
    assert mistakes(tmp_path, text).replace(f"{tmp_path}/", "").splitlines()[1:] == [
        "  nets.yaml:4: model 'a': builder: unknown setting 'optimisation_level'; did you mean 'optimization_level'?",
        "  nets.yaml:6: model 'b': builder: workspace: '4GiB' is no whole number of at least 1.",
        "  nets.yaml:7: model 'c': calibration: 'typical' is not of the form package.module:function",
    ]


def test_anchors_and_merged_keys_work(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
models:
  - &a {name: a, source: zoo:a, profiles: &p {x: 1x3:2x3:4x3}}
  - {<<: *a, name: b}
  - {name: c, source: zoo:c, profiles: *p, compute_capabilities: [8.9, "12.0"]}
""",
    )
    a, b, c = load_manifest(path)
    assert a.profiles == b.profiles == c.profiles == {"x": ((1, 3), (2, 3), (4, 3))}
    assert (b.source, c.compute_capabilities) == ("zoo:a", ["8.9", "12.0"])


@pytest.mark.parametrize(
    ("written", "profile"),
    [
        ("1x3:2x3:4x3", ((1, 3), (2, 3), (4, 3))),
        ("2x3", ((2, 3), (2, 3), (2, 3))),
        ([2, 3], ((2, 3), (2, 3), (2, 3))),
        ([[1], [2], [4]], ((1,), (2,), (4,))),
        (8, ((8,), (8,), (8,))),
        ("", ((), (), ())),
        ([], ((), (), ())),
    ],
)
def test_a_profile_may_be_text_or_lists_and_one_shape_is_static(written: object, profile: object) -> None:
    assert read_profile(written) == profile


@pytest.mark.parametrize("written", ["1x3:2x3", "1x-3", "1.5x3", "x", [1.5], [True], [[1], [2]], None, {"min": 1}])
def test_what_is_no_profile_is_refused(written: object) -> None:
    with pytest.raises(ValueError, match="write one shape as 1x3x224x224"):
        read_profile(written)


def test_sources_are_named_after_their_file_or_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.v2.onnx").touch()
    names = [spec.name for spec in read_sources(["net.v2.onnx", "zoo.vision:resnet", "zoo:Nets.unet"], {})]
    assert names == ["net.v2", "resnet", "unet"]


def test_the_mistakes_of_all_sources_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "models: []")
    with pytest.raises(UsageError) as caught:
        read_sources(["resnet", "none.onnx", "a:net", "b:net", "nets.yaml"], {"inputs": "x", "timeout": -1.0})
    text = str(caught.value)
    for part in (
        "--inputs: 'x' is not of the form package.module:function",
        "--timeout: should be greater than 0, not -1.0",
        "'resnet' is neither an .onnx file nor of the form package.module:function, nor a .yaml manifest",
        f"no such file: {tmp_path}/none.onnx",
        "two models are named 'net' (a:net and b:net); give them names of their own in a manifest",
        "nets.yaml:1: models: is empty; at least one is needed",
    ):
        assert part in text, text
