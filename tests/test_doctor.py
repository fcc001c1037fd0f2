"""The doctor reports what is there and names a remedy for what is not."""

import json

import pytest

from llava_hd.cli import doctor
from llava_hd.cli.main import main


def test_json_is_the_only_thing_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert found["torch"]["state"] == "ok" and "2." in found["torch"]["detail"]
    assert {"flash-attn", "xformers", "attention=flash_attention_2"} <= set(found)
    assert all(f["remedy"] for f in found.values() if f["state"] != "ok")


def test_a_library_that_is_not_installed_is_missing_with_its_remedy() -> None:
    finding = doctor.probe_library("no-such-thing", "no_such_thing", False, "nothing", "leave it")
    assert (finding.state, finding.remedy) == ("missing", "leave it")


def test_a_library_that_does_not_import_is_broken_with_the_reason() -> None:
    finding = doctor.probe_library("torch", "torch.no_such_module", True, "tensors", "again")
    assert finding.state == "broken" and "no_such_module" in finding.detail


def test_a_missing_needed_library_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    row = ("no-such-thing", "no_such_thing", True, "all", "get it")
    monkeypatch.setattr(doctor, "LIBRARIES", [row])
    assert main(["doctor", "--json"]) == 1
