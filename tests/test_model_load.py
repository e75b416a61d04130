"""Checkpoints: read right, read once, and what is said when one is wrong."""

from __future__ import annotations

import json
import operator
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from engine.config import EngineArgs
from engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from engine.extensions.checkpoints import plan as loading
from engine.extensions.checkpoints.files import Entry, is_remote, read_index
from engine.model.adapt import AdaptedModel, build, load_model
from engine.model.config import eos_token_ids, generation_defaults, max_model_len, read_config
from engine.model.load import Cut, allocate, frozen
from engine_conformance.tiny_models import tiny_config, tiny_model
from engine_cpu import CpuPlatform, native
from engine_mutation.host import HostPlatform


def load(folder: Path, **options: Any) -> AdaptedModel:
    return load_model(EngineArgs(model=str(folder), **options), HostPlatform())


def save(name: str, folder: Path, **options: Any) -> Path:
    tiny_model(name).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save("llama", tmp_path / "llama")


def by_transformers(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    return model


def assert_loaded_alike(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """All parameters and buffers have the same bits and dtypes, and the same ones are tied."""
    for got, want in (
        (model.state_dict(), reference.state_dict()),
        (dict(model.named_buffers()), dict(reference.named_buffers())),
    ):
        assert got.keys() == want.keys()
        for name in want:
            assert got[name].dtype == want[name].dtype, name
            assert torch.equal(got[name], want[name]), name
    assert len(list(model.parameters())) == len(list(reference.parameters()))


# What is read


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "falcon", "bart", "olmoe"]
)
def test_weights_and_buffers_are_those_that_transformers_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_LEAST_MAPPED", 1)  # so that whatever can be used in place is
    save(name, tmp_path)
    assert_loaded_alike(load(tmp_path).model, by_transformers(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cast_while_loading(llama: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_STAGING_BYTES", 1000)  # so that tensors are cast in pieces, the last one shorter
    assert_loaded_alike(load(llama, dtype=dtype).model, by_transformers(llama, getattr(torch, dtype)))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_cast_of_experts_and_what_stays_in_fp32(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    assert_loaded_alike(load(tmp_path, dtype="bfloat16").model, by_transformers(tmp_path, torch.bfloat16))


def test_parameters_that_stay_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", ["layers.*.input_layernorm"])
    model = build(tiny_config("llama"), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["model.layers.0.input_layernorm.weight"] == torch.float32
    assert dtypes["model.layers.0.post_attention_layernorm.weight"] == torch.bfloat16


def test_dtype_auto_is_the_checkpoints(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.bfloat16
    assert load(tmp_path, dtype="float32").model.dtype == torch.float32


def test_shards(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_loaded_alike(load(tmp_path).model, by_transformers(tmp_path))


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def tie(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_parameters_have_one_storage(llama: Path, kept: str) -> None:
    tie(llama)
    other = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}[kept]
    edit(llama, lambda tensors: operator.delitem(tensors, other))
    model = load(llama).model
    assert model.get_parameter(kept) is model.get_parameter(other)
    assert torch.equal(model.get_parameter(other), tiny_model("llama").get_parameter(kept))


def test_equal_copies_of_tied_parameters_are_tied(llama: Path) -> None:
    tie(llama)
    edit(llama, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = load(llama).model
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_different_values_are_not_tied_whatever_the_configuration_says(llama: Path) -> None:
    tie(llama)
    assert_loaded_alike(load(llama).model, by_transformers(llama))
    model = load(llama).model
    assert model.get_parameter("lm_head.weight") is not model.get_parameter("model.embed_tokens.weight")


def test_leftovers_that_transformers_ignores(llama: Path) -> None:
    edit(llama, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    assert_loaded_alike(load(llama).model, tiny_model("llama"))


def test_overrides_reach_parts_of_the_configuration(llama: Path) -> None:
    overrides = {"max_position_embeddings": 77, "rope_parameters": {"rope_theta": 5.0}}
    config = read_config(EngineArgs(model=str(llama), hf_overrides=overrides))
    assert max_model_len(config) == 77
    assert config.rope_parameters["rope_theta"] == 5.0
    assert config.rope_parameters["rope_type"] == "default"


def test_end_tokens(llama: Path) -> None:
    config = read_config(EngineArgs(model=str(llama)))
    (llama / "generation_config.json").unlink(missing_ok=True)
    assert eos_token_ids(llama, config) == (2,)
    (llama / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_p": 0.9}')
    assert eos_token_ids(llama, config) == (5, 6)
    assert generation_defaults(llama)["top_p"] == 0.9


def test_a_configuration_without_end_token(tmp_path: Path) -> None:
    save("roc_bert", tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    assert eos_token_ids(tmp_path, read_config(EngineArgs(model=str(tmp_path)))) == ()


# Dummy weights


def test_dummy_weights_need_no_files_and_follow_the_seed(tmp_path: Path) -> None:
    tiny_config("qwen3_moe").save_pretrained(tmp_path)
    first, same, other = (load(tmp_path, load_format="dummy", seed=seed) for seed in (1, 1, 2))
    for name, parameter in first.model.named_parameters():
        assert torch.equal(parameter, same.model.get_parameter(name))
    assert not torch.equal(first.model.get_parameter("lm_head.weight"), other.model.get_parameter("lm_head.weight"))
    logits = first.forward(torch.arange(9), torch.arange(9), torch.arange(9))
    assert torch.isfinite(logits).all()
    assert 0.01 < logits.std() < 10


# Used in place


def in_files(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped safetensors file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [[int(end, 16) for end in words[0].split("-")] for words in lines]
    return any(begin <= tensor.data_ptr() < end for begin, end in ranges)


@pytest.fixture
def all_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_LEAST_MAPPED", 1)


TABLE, NORM, FUSED = "model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("options", "remote", "mapped"),
    [
        ({}, False, True),
        ({"load_format": "copy"}, False, False),
        ({"dtype": "bfloat16"}, False, False),
        ({}, True, False),
    ],
)
def test_what_lies_in_a_file_as_it_is_wanted_stays_there(
    llama: Path,
    options: dict[str, Any],
    remote: bool,
    mapped: bool,
    all_in_place: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "is_remote", lambda file: remote)
    model = load(llama, **options).model
    assert in_files(model.get_parameter(TABLE)) == mapped
    assert not in_files(model.get_parameter(FUSED)), "it is a part of a larger tensor"
    assert_loaded_alike(model, by_transformers(llama, model.dtype))


def test_small_tensors_are_read(llama: Path) -> None:
    assert not in_files(load(llama).model.get_parameter(NORM))


def test_a_mapped_file_can_be_deleted_and_is_never_written(llama: Path, all_in_place: None) -> None:
    file = llama / "model.safetensors"
    content, want = file.read_bytes(), tiny_model("llama").get_parameter(TABLE)
    first, second = (load(llama).model.get_parameter(TABLE) for _ in range(2))
    first.data.add_(1)
    assert file.read_bytes() == content
    file.unlink()
    assert in_files(second)
    assert torch.equal(second, want)
    assert torch.equal(first, want + 1)


def test_ranks_use_their_rows_in_place(llama: Path, all_in_place: None) -> None:
    want = tiny_model("llama").get_parameter(TABLE)
    rows, width = want.shape
    for dim, spans, mapped in (
        (0, ((64, 128),), True),
        (0, ((0, 32), (96, 128)), False),
        (1, ((0, width // 2),), False),
        (0, ((rows - 32, rows),), True),
    ):
        model = build(read_config(EngineArgs(model=str(llama))), torch.float32)
        kept = torch.cat([want.narrow(dim, begin, end - begin) for begin, end in spans], dim)
        part: Any = frozen(torch.empty_like(kept, device="meta"))
        part.cut = Cut((rows, width), dim, spans)
        model.get_input_embeddings().weight = part
        plan = loading.LoadPlan(model, llama)
        allocate(model, [], torch.device("cpu"))
        model.get_input_embeddings().weight.cut = part.cut  # type: ignore[union-attr]
        plan.fill(HostPlatform().device())
        assert torch.equal(model.get_parameter(TABLE), kept)
        assert in_files(model.get_parameter(TABLE)) == mapped, (dim, spans)


@pytest.mark.parametrize("tied", [False, True])
def test_packed_weights_leave_the_file(tied: bool, tmp_path: Path, all_in_place: None) -> None:
    """Also one that an embedding and the head share; what is looked up in place stays."""
    tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path)
    adapted = load_model(EngineArgs(model=str(tmp_path)), CpuPlatform())
    reference = load_model(EngineArgs(model=str(tmp_path), load_format="copy"), CpuPlatform())
    ids = torch.arange(9)
    assert torch.equal(adapted.forward(ids, ids, ids), reference.forward(ids, ids, ids))
    large = [p for p in adapted.model.parameters() if p.dim() > 1 and not p.is_meta]
    assert len(large) == (0 if tied and native.library() else 1)
    assert all(map(in_files, large))
    norms = sum(p.dim() == 1 for p in adapted.model.parameters())
    mappings = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mappings) == len(large) + norms


def test_a_file_that_shrinks_before_it_is_mapped(llama: Path, all_in_place: None) -> None:
    model = build(read_config(EngineArgs(model=str(llama))), torch.float32)
    plan = loading.LoadPlan(model, llama)
    allocate(model, [], torch.device("cpu"))
    cut(llama, 5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors, tensor '.*check the disk"):
        plan.fill(HostPlatform().device())


@pytest.mark.parametrize(
    ("kind", "remote"), [("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("fuseblk", False), ("overlay", False)]
)
def test_files_of_a_network_are_known(kind: str, remote: bool, tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    info = tmp_path / "proc/self/mountinfo"
    info.parent.mkdir(parents=True)
    assert not is_remote(tmp_path, tmp_path), "nothing is known"
    info.write_text(f"21 1 0:999 / /sys rw - sysfs sysfs rw\n36 35 {number} / /mnt rw shared:1 - {kind} server:/x rw\n")
    assert is_remote(tmp_path, tmp_path) == remote


# What is wrong


def cut(folder: Path, size: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])


def overwrite(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    overwrite(folder, "config.json", json.dumps(config | fields))


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, CheckpointError, r"llama does not exist; give the folder of a model"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "llama has no config.json; give the folder"),
    "config is cut": (lambda f: overwrite(f, "config.json", "{"), CheckpointError, "config.json cannot be read.*again"),
    "config is a list": (lambda f: overwrite(f, "config.json", "[]"), CheckpointError, "does not hold a JSON object"),
    "config is wrong": (
        lambda f: set_config(f, hidden_size="wide"),
        CheckpointError,
        "config.json is not a valid configuration",
    ),
    "unknown type": (
        lambda f: set_config(f, model_type="llama99"),
        UnsupportedModelError,
        "'llama99' is unknown to Transformers .*; a newer",
    ),
    "remote code": (
        lambda f: set_config(f, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        ConfigError,
        "brings its own Python code; set trust_remote_code",
    ),
    "quantised": (
        lambda f: set_config(f, quantization_config={"quant_method": "awq"}),
        CheckpointError,
        r"config\.json says that weights are quantised with 'awq', and none is; download the model again",
    ),
    "not for text": (lambda f: set_config(f, model_type="vit"), UnsupportedModelError, "no causal language model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, r"no \*.safetensors.*load_format"),
    "only .bin": (only_bin, CheckpointError, "only pytorch_model.bin; convert it: .*save_pretrained"),
    "empty file": (lambda f: cut(f, 0), CheckpointError, "model.safetensors is no safetensors file.*download it again"),
    "garbage": (lambda f: overwrite(f, "model.safetensors", "<html>" * 99), CheckpointError, "is no safetensors file"),
    "truncated": (
        lambda f: cut(f, (f / "model.safetensors").stat().st_size - 5),
        CheckpointError,
        "model.safetensors is truncated: tensor '.*' ends at byte .*download it again",
    ),
    "lacks a tensor": (
        lambda f: edit(f, lambda t: operator.delitem(t, "model.layers.1.mlp.up_proj.weight")),
        CheckpointError,
        "the checkpoint lacks model.layers.1.mlp.up_proj.weight; ",
    ),
    "has one more": (
        lambda f: edit(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora": torch.zeros(2)})),
        CheckpointError,
        "the checkpoint has, and the model lacks, model.layers.0.self_attn.q_proj.lora; ",
    ),
    "another shape": (
        lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.zeros(65)})),
        CheckpointError,
        r"model.safetensors: 'model.norm.weight' has shape \[65\], and the model needs \[64\]",
    ),
    "another kind": (
        lambda f: edit(f, lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int32)})),
        CheckpointError,
        r"'model.norm.weight' is torch.int32, and the model needs torch.float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(llama: Path, case: str) -> None:
    spoil, error, message = WRONG[case]
    spoil(llama)
    with pytest.raises(error, match=message) as raised:
        load(llama)
    assert len(str(raised.value)) < 500


def test_a_shard_is_missing(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {gone.name}, which model.safetensors.index.json lists"):
        load(tmp_path)


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    save("llama", tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read.*download it again"):
        load(tmp_path)


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    save("mixtral", tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    edit(tmp_path, lambda t: t.update({name: torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' do not fit together"):
        load(tmp_path)


def test_the_disk_fails(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Entry.read
    index = read_index(llama)

    def fail(self: Any, target: Tensor, at: int = 0) -> None:
        self.file.unlink(missing_ok=True)
        read(self, target, at)

    monkeypatch.setattr(Entry, "read", fail)
    with pytest.raises(CheckpointError, match=r"model.safetensors, tensor 'lm_head.weight': .*; check the disk"):
        index["lm_head.weight"].load()


def test_unknown_dtype(llama: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int4' is not supported; choose one of float32"):
        load(llama, dtype="int4")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_our_error(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with any header byte changed, a file is read right or refused; nothing else happens."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, file)
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        entries = read_index(tmp_path)
    except CheckpointError:
        return
    assert all(entry.load().shape == entry.shape for entry in entries.values())


# What it costs

PEAK = """
import re, sys
from pathlib import Path
import torch
from engine.config import EngineArgs
from engine_mutation.host import HostPlatform
from engine.model.adapt import load_model

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

warm, folder = map(Path, sys.argv[1:3])
load_model(EngineArgs(model=str(warm), dtype=sys.argv[3]), HostPlatform())
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = kib("VmRSS")
model = load_model(EngineArgs(model=str(folder), dtype=sys.argv[3]), HostPlatform())
weights = sum(p.nbytes for p in model.model.parameters())
print((kib("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_weights(llama: Path, tmp_path: Path, dtype: str) -> None:
    """Read in place, and cast from fp32 to bf16, whose staging buffers then weigh the more."""
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    big = tmp_path / "big"
    AutoModelForCausalLM.from_config(config).save_pretrained(big)
    command = [sys.executable, "-c", PEAK, str(llama), str(big), dtype]
    out = subprocess.run(command, check=True, capture_output=True, text=True)
    assert float(out.stdout) < (1.05 if dtype == "float32" else 1.30), out.stdout
