"""``--platform torch:DEVICE``, and what `engine doctor --platform` says of a device's operators."""

import json
from typing import Any

import pytest
import torch

from engine.discovery import FAMILIES, discover
from engine.errors import ContractError, PlatformNotFoundError, PlatformUnavailableError, PluginError
from engine.extensions.cli import doctor, main, operators
from engine.extensions.cli.operators import NEEDED, Operator, unsupported
from engine.interfaces import CONTRACT
from engine.llm import LLM
from engine.plugins import load_platform, select_platform
from engine.request import SamplingParams


def test_a_device_needs_no_plugin() -> None:
    platform = load_platform("torch:cpu")
    assert (platform.name, platform.device_type, platform.contract) == ("torch:cpu", "cpu", CONTRACT)
    assert platform.device().torch_device == torch.device("cpu")


def test_it_generates_what_the_platform_of_the_host_generates() -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8)
    made = [
        LLM(platform=name, kv_cache_memory_bytes=1 << 24).generate("def f(", greedy)[0].outputs[0].token_ids
        for name in ("torch:cpu", "cpu")
    ]
    assert made[0] == made[1]
    assert len(made[0]) == 8


@pytest.mark.parametrize("name", ["torch:nosuch", "torch:", "torch"])
def test_an_unknown_device_type(name: str) -> None:
    with pytest.raises(PlatformNotFoundError) as caught:
        select_platform(name)
    for words in ("has no device type", "usable here: ", "torch:cpu", "known to torch: cpu, ", "remedy: "):
        assert words in str(caught.value)


def test_an_index_is_an_option_of_its_own() -> None:
    with pytest.raises(PlatformNotFoundError, match="remedy: --platform torch:cpu --device-index 0"):
        select_platform("torch:cpu:0")


def test_a_device_type_that_is_not_here() -> None:
    with pytest.raises(PlatformUnavailableError, match=r"'torch:meta' .*cannot run here.*\nremedy: "):
        select_platform("torch:meta")


def test_a_name_without_a_family_is_still_looked_up_among_the_plugins() -> None:
    with pytest.raises(PlatformNotFoundError, match=r"no platform 'cpu:0' is installed: did you mean 'cpu'\?"):
        select_platform("cpu:0")


def test_families_are_no_platforms(capsys: pytest.CaptureFixture[str]) -> None:
    """They are not listed, nor probed where the user names nothing."""
    assert "torch" in [family.name for family in discover(FAMILIES)]
    assert main(["platforms", "--json"]) == 0
    assert "torch" not in [p["name"] for p in json.loads(capsys.readouterr().out)["platforms"]]
    assert select_platform().plugin.name != "torch"


def test_a_vendor_may_have_a_family(install: Any) -> None:
    source = "from dummy_base import Base\ndef chip(word):\n    return type('Chip', (Base,), {'name': %s})\n"
    group = {"group": "engine.platform_families"}
    install("dummy-chips", {"chip": "dummy_chips:chip"}, {"dummy_chips": source % "f'chip:{word}'"}, **group)
    assert select_platform("chip:x:1").platform.name == "chip:x:1"
    install("dummy-wrong", {"wrong": "dummy_wrong:chip"}, {"dummy_wrong": source % "word"}, **group)
    with pytest.raises(ContractError, match="its entry point is called 'wrong:x' and its class 'x'"):
        select_platform("wrong:x")
    install("dummy-broken", {"broken": "dummy_broken:absent"}, {"dummy_broken": ""}, **group)
    with pytest.raises(PluginError, match="platform family 'broken:x' "):
        select_platform("broken:x")


def report(capsys: pytest.CaptureFixture[str], name: str) -> tuple[int, dict[str, str]]:
    code = main(["doctor", "--json", "--platform", name])
    return code, json.loads(capsys.readouterr().out)["operators"]


def test_doctor_finds_every_operator_on_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, "torch:cpu") == (0, {"device": "cpu", "tried": f"{len(NEEDED)}, 0 failed"})


def test_doctor_tells_why_a_device_cannot_be_tried(capsys: pytest.CaptureFixture[str]) -> None:
    code, section = report(capsys, "torch:meta")
    assert code == 1
    assert "PlatformUnavailableError: platform family 'torch:meta'" in section["error"]


def test_doctor_lists_what_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that raises, and one whose result is wrong; both fail on the platform's device only."""
    device = load_platform("torch:cpu").device()
    on_device = False

    def missing(inputs: operators.Inputs) -> torch.Tensor:
        if on_device:
            raise NotImplementedError(f"no kernel for {inputs.dtype}\nand a long explanation")
        return inputs.values(4)

    def wrong(inputs: operators.Inputs) -> torch.Tensor:
        return inputs.values(4) + on_device

    platform = load_platform("torch:cpu")
    monkeypatch.setattr(type(platform), "device", lambda self: device)
    monkeypatch.setattr(doctor, "load_platform", lambda name: platform)
    trials = (Operator("missing", "sampler: x", missing), Operator("wrong", "staging: y", wrong, (torch.int32,)))
    monkeypatch.setattr(operators, "NEEDED", trials)
    real = operators.Inputs

    def drawn(of: torch.device, dtype: torch.dtype) -> operators.Inputs:
        nonlocal on_device
        on_device = of is device.torch_device
        return real(of, dtype)

    monkeypatch.setattr(operators, "Inputs", drawn)
    code, section = report(capsys, "torch:cpu")
    cause = "sampler: x\nNotImplementedError: no kernel for torch."
    assert code == 1
    assert section == {
        "device": "cpu",
        "tried": "2, 4 failed",
        **{f"missing {dtype}": cause + dtype for dtype in ("bfloat16", "float16", "float32")},
        "wrong int32": "staging: y\nits result differs from the host's",
    }


def test_each_trial_has_a_line_of_its_own() -> None:
    declared = sorted(load_platform("torch:cpu").capabilities().dtypes, key=str)
    lines = [(op.name, dtype) for op in NEEDED for dtype in (op.dtypes or declared)]
    assert len(lines) == len(set(lines))


def test_a_device_that_computes_nothing_has_no_operator() -> None:
    """On the meta device results have no values, so each trial must fail."""
    platform = load_platform("torch:cpu")
    platform.device().torch_device = torch.device("meta")
    failed = {(operator.name, operator.needed) for operator, _, _ in unsupported(platform)}
    assert failed == {(operator.name, operator.needed) for operator in NEEDED}
