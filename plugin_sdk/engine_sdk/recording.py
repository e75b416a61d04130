"""Record the calls of a platform that fail: each into a file of its own, from which it can be run again.

    --platform record:NAME  ->  every call of attention, ops, linear and experts  ->  compared with the host's reference
                                                                                 ->  recordings/attention-1.pt

Every call waits for the device and is computed on the host too, so a model runs many times slower, eagerly and without
graphs. Collectives are not recorded: a call of theirs needs its other ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pickle
from collections import Counter
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from engine.errors import ConfigError, PlatformNotFoundError, PluginError
from engine.interfaces import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Capabilities,
    CompilerOptions,
    ExpertsMethod,
    ExpertsSpec,
    ExpertWeights,
    GraphRuntime,
    KVCache,
    KVLayout,
    LinearMethod,
    OpSet,
    Plan,
    Platform,
    QuantScheme,
)
from engine_sdk.calls import (
    AttentionCall,
    Call,
    ExpertsCall,
    LinearCall,
    OpCall,
    results,
    to,
)

log = logging.getLogger(__name__)

FORMAT = 1
"""The version of the files."""

_HOST = torch.device("cpu")


def record(platform: type[Platform], folder: Path, *, limit: int = 5) -> type[Platform]:
    """A platform that does what `platform` does, and writes its failing calls into `folder`.

    A call fails that raises, gives values that are not finite where the reference's are, or gives others than the
    reference on the host. An exception goes on, with a note that names the file; a wrong result is told in the log.

    Args:
        platform: the class that is watched.
        folder: made when the first call fails.
        limit: most files of each kind of call.

    Returns:
        A subclass, called ``record:NAME``.
    """
    attributes = {
        "name": f"record:{platform.name}",
        "__doc__": f"{platform.__name__}, watched.",
        "_recorder": Recorder(folder, limit),
    }
    return type(f"Recorded{platform.__name__}", (_Recorded, platform), attributes)


def record_family(name: str) -> type[Platform]:
    """What ``--platform record:NAME`` selects: the platform NAME, watched; files go to ``recordings`` in this folder.

    Raises:
        PluginError: there is no such platform, or it cannot be imported.
    """
    return record(find_platform(name), Path("recordings"))


def find_platform(name: str) -> type[Platform]:
    """The class of an installed platform, or of a family's; raises `PluginError` where it cannot be had."""
    families = entry_points(group="engine.platform_families", name=name.partition(":")[0])
    try:
        for entry in entry_points(group="engine.platforms", name=name):
            return cast("type[Platform]", entry.load())
        for entry in families:
            return cast("type[Platform]", entry.load()(name.partition(":")[2]))
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"platform {name!r} cannot be imported: {error}\nremedy: see engine platforms, which tells its distribution"
        ) from error
    raise PlatformNotFoundError(f"no platform {name!r} is installed\nremedy: engine platforms lists what is installed")


@dataclasses.dataclass(frozen=True)
class Recording:
    """A file's content.

    Attributes:
        call: what was called.
        platform: where, a platform's name.
        problem: what was wrong then.
        torch: the version of torch then.
    """

    call: Call
    platform: str
    problem: str
    torch: str


def load_recording(file: Path) -> Recording:
    """Read a recording; no code of the file's is run.

    Raises:
        ConfigError: no such file, no recording, or one of another version.
    """
    remedy = "name a file that --platform record:NAME wrote"
    try:
        data = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{file} cannot be read: {error}\nremedy: {remedy}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"{file} is no recording that this engine knows\nremedy: {remedy}, with this engine")
    return Recording(Call.from_dict(data["call"]), data["platform"], data["problem"], data["torch"])


def replay(call: Call, platform: Platform) -> str | None:
    """Run a recorded call again; what is wrong with its result, or None. Raises what the call raises.

    Raises:
        ConfigError: the experts' activation is not known.
        UnsupportedCapability: the platform does not have what was called.
    """
    platform.device().activate()
    with torch.inference_mode():
        return call.judge(call.run(platform), platform.capabilities())


class Recorder:
    """Runs calls, judges them, and writes down those that fail."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._found: Counter[str] = Counter()

    def watch(self, platform: Platform, call: Call, run: Callable[[], tuple[Tensor, ...]]) -> None:
        """Call `run`, whose results on the host are judged; raises what it raises."""
        try:
            got = run()
        except Exception as error:
            if file := self._write(platform, call, f"{type(error).__name__}: {error}"):
                error.add_note(f"recorded in {file}; to run it again: engine plugin replay {file}")
            raise
        with torch.inference_mode():
            problem = call.judge(got, platform.capabilities())
        if problem and (file := self._write(platform, call, problem)):
            log.warning("%s: %s\nto run it again: engine plugin replay %s", call.kind, problem, file)

    def _write(self, platform: Platform, call: Call, problem: str) -> Path | None:
        self._found[call.kind] += 1
        if self._found[call.kind] > self._limit:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        number = 1
        while (file := self._folder / f"{call.kind}-{number}.pt").exists():
            number += 1
        about = {"format": FORMAT, "platform": platform.name, "problem": problem, "torch": str(torch.__version__)}
        torch.save(about | {"call": call.to_dict()}, file)
        return file


class _Recorded(Platform):
    """What `record` puts before the platform's own class."""

    _recorder: ClassVar[Recorder]

    def capabilities(self) -> Capabilities:
        """The platform's, without graphs: a captured call cannot be looked at."""
        return dataclasses.replace(super().capabilities(), graphs="none")  # type: ignore[safe-super]

    def attention(self, spec: AttentionSpec) -> AttentionBackend:
        return _Attention(self, super().attention(spec))  # type: ignore[safe-super]

    def ops(self) -> OpSet:
        ops = super().ops()  # type: ignore[safe-super]
        watched = {f.name: functools.partial(self._op, f.name, getattr(ops, f.name)) for f in dataclasses.fields(ops)}
        return OpSet(**watched)

    def _op(self, name: str, op: Callable[..., Any], *arguments: Any) -> Any:
        made: list[Any] = []

        def run() -> tuple[Tensor, ...]:
            made.append(op(*arguments))
            return results((made[0], arguments))

        self._recorder.watch(self, OpCall(name, to(arguments, _HOST)), run)
        return made[0]

    def linear(self, scheme: QuantScheme | None) -> LinearMethod | None:
        method = super().linear(scheme)  # type: ignore[safe-super]
        # What a quantised weight stands for is the method's to know, so there is nothing to compare with.
        return method if method is None or scheme is not None else _Linear(self, method)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod:
        return _Experts(self, super().experts(spec), spec)  # type: ignore[safe-super]

    def graphs(self) -> GraphRuntime | None:
        return None

    def compiler(self) -> CompilerOptions | None:
        return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    inner: Plan
    batch: AttentionBatch


class _Attention(AttentionBackend):
    def __init__(self, platform: _Recorded, inner: AttentionBackend) -> None:
        super().__init__(inner.spec)
        self._platform, self._inner = platform, inner
        self._layouts: dict[int, KVLayout] = {}

    def layout(self, block_size: int) -> KVLayout:
        self._layouts[block_size] = self._inner.layout(block_size)
        return self._layouts[block_size]

    def plan(self, batch: AttentionBatch) -> Plan:
        return _Plan(self._inner.plan(batch), to(batch, _HOST))

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        cache: KVCache,
        plan: Plan,
        out: Tensor,
        *,
        sinks: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> None:
        batch: AttentionBatch = plan.batch
        layout = self._layouts[batch.block_size]
        columns = torch.arange(batch.block_table.shape[1]) * batch.block_size
        live = batch.block_table[columns < batch.seq_lens_host[:, None]].long()
        blocks = torch.cat((live, batch.slots // batch.block_size)).unique()
        on_device = blocks.to(q.device)
        q_, k_, v_, sinks_, slopes = to((q, k, v, sinks, alibi_slopes), _HOST)
        keys, values = to(layout.export_blocks(cache, on_device), _HOST)
        call = AttentionCall(self.spec, batch, q_, k_, v_, sinks_, slopes, lse is not None, blocks, keys, values)

        def run() -> tuple[Tensor, ...]:
            extras = {"sinks": sinks, "alibi_slopes": alibi_slopes, "lse": lse}
            self._inner.forward(q, k, v, cache, plan.inner, out, **extras)
            return results((out, *(() if lse is None else (lse,)), *layout.export_blocks(cache, on_device)))

        self._platform._recorder.watch(self._platform, call, run)


@dataclasses.dataclass(frozen=True)
class _Packed:
    inner: object
    weight: Tensor
    bias: Tensor | None


class _Linear(LinearMethod):
    def __init__(self, platform: _Recorded, inner: LinearMethod) -> None:
        self._platform, self._inner = platform, inner

    def pack(self, weight: Tensor, bias: Tensor | None) -> object:
        kept = to((weight, bias), _HOST)
        return _Packed(self._inner.pack(weight, bias), *kept)

    def apply(self, x: Tensor, packed: object) -> Tensor:
        assert isinstance(packed, _Packed)
        made: list[Tensor] = []

        def run() -> tuple[Tensor, ...]:
            made.append(self._inner.apply(x, packed.inner))
            return results(made[0])

        self._platform._recorder.watch(self._platform, LinearCall(to(x, _HOST), packed.weight, packed.bias), run)
        return made[0]


class _Experts(ExpertsMethod):
    def __init__(self, platform: _Recorded, inner: ExpertsMethod, spec: ExpertsSpec) -> None:
        self._platform, self._inner, self._spec = platform, inner, spec

    def apply(self, x: Tensor, expert_ids: Tensor, scores: Tensor, weights: ExpertWeights) -> Tensor:
        x_, ids, given = to((x, expert_ids, scores), _HOST)
        up, down, up_bias, down_bias = to((weights.up, weights.down, weights.up_bias, weights.down_bias), _HOST)
        call = ExpertsCall(self._spec, x_, ids, given, up, down, up_bias, down_bias, weights.activate)
        made: list[Tensor] = []

        def run() -> tuple[Tensor, ...]:
            made.append(self._inner.apply(x, expert_ids, scores, weights))
            return results(made[0])

        self._platform._recorder.watch(self._platform, call, run)
        return made[0]
