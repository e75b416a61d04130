"""The contract between the engine and a platform: abstract classes and frozen data, and nothing else."""

from engine.interfaces.attention import AttentionBackend, AttentionBatch, AttentionSpec, Plan
from engine.interfaces.capabilities import (
    ANY,
    ATTENTION_FEATURES,
    OK,
    AttentionFeature,
    Capabilities,
    Domain,
    Verdict,
)
from engine.interfaces.communicator import Communicator, GroupSpec
from engine.interfaces.device import Device, Event, MemoryInfo, MemoryManager
from engine.interfaces.graph import CompilerOptions, Graph, GraphRuntime
from engine.interfaces.kv_cache import KVCache, KVLayout
from engine.interfaces.ops import (
    DrawInputs,
    ExpertsMethod,
    ExpertsSpec,
    ExpertWeights,
    LinearMethod,
    OpSet,
    QuantScheme,
    QuantWeight,
)
from engine.interfaces.platform import CONTRACT, ConfigPatch, DeviceInfo, Platform, Probe

__all__ = [
    "ANY",
    "ATTENTION_FEATURES",
    "CONTRACT",
    "OK",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionFeature",
    "AttentionSpec",
    "Capabilities",
    "Communicator",
    "CompilerOptions",
    "ConfigPatch",
    "Device",
    "DeviceInfo",
    "Domain",
    "DrawInputs",
    "Event",
    "ExpertWeights",
    "ExpertsMethod",
    "ExpertsSpec",
    "Graph",
    "GraphRuntime",
    "GroupSpec",
    "KVCache",
    "KVLayout",
    "LinearMethod",
    "MemoryInfo",
    "MemoryManager",
    "OpSet",
    "Plan",
    "Platform",
    "Probe",
    "QuantScheme",
    "QuantWeight",
    "Verdict",
]
