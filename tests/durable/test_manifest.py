"""What a run directory is for."""

from __future__ import annotations

import pytest

from trinfer import ConfigError, FileError
from trinfer.durable.manifest import Manifest, differences


def test_a_changed_job_is_refused_with_its_differences(tmp_path):
    job = {"model": "a", "params": {"temperature": 0.5, "stop": ("x",)}, "template": None}
    Manifest(job, {"input": "i"}).save(tmp_path)
    found = Manifest.load(tmp_path)
    found.check(Manifest({**job, "params": {"stop": ["x"], "temperature": 0.5}}), tmp_path)
    with pytest.raises(ConfigError) as caught:
        found.check(Manifest({**job, "model": "b", "params": {"temperature": 1}}), tmp_path)
    text = str(caught.value)
    for line in (
        '    - model = "a"\n    + model = "b"\n',
        "    - params.temperature = 0.5\n    + params.temperature = 1",
        '    - params.stop = ["x"]\n    + params.stop = (not set)',
    ):
        assert line in text
    assert "--accept-changes" in text
    assert "template" not in text


def test_a_parameter_that_is_no_number_is_the_same_the_next_time():
    assert differences({"temperature": float("nan")}, {"temperature": float("nan")}) == []
    assert len(differences({"temperature": float("nan")}, {"temperature": 1.0})) == 2


def test_long_values_are_cut():
    (old, _) = differences({"template": "x" * 1000}, {})
    assert len(old) < 400
    assert "1002 characters" in old


def test_what_is_no_manifest(tmp_path):
    assert Manifest.load(tmp_path) is None
    for text in ("", "[]", "{}", '{"format": 1}', '"x"'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(FileError, match="no manifest of trinfer"):
            Manifest.load(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 2, "job": {}}')
    with pytest.raises(FileError, match="has format 2"):
        Manifest.load(tmp_path)
