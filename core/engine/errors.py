"""Every exception that the engine raises on purpose.

    EngineError
    |-- ConfigError            an option, or a combination of options, that cannot work
    |-- RequestError           one request is wrong; the engine goes on
    |-- CheckpointError        files are missing, corrupt, or do not fit the model
    |-- UnsupportedModelError  the architecture needs something that is not built yet
    |-- PluginError            a plugin is broken, missing, or written for another contract
    |   |-- PlatformNotFoundError
    |   |-- PlatformUnavailableError
    |   |-- AmbiguousPlatformError
    |   `-- ContractError
    |-- UnsupportedCapability  a platform was asked for what it did not declare
    |-- CommunicatorError      a collective did not complete: a rank ended, stayed away, or made another call
    |-- OutOfMemoryError       the device has too little memory for what was asked
    `-- EngineDeadError        the engine's process ended; running requests are lost

Each message names the cause and the remedy. Those that mean "a bad value" are also ``ValueError``, so a caller may
catch the built-in. Nothing here imports torch.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors of the engine; the command line prints it without a traceback and exits with `exit_code`."""

    exit_code = 1


class ConfigError(EngineError, ValueError):
    """An option, or a combination of options, cannot work."""

    exit_code = 2


class RequestError(EngineError, ValueError):
    """One request is wrong. The engine and the other requests are not affected."""

    exit_code = 2


class CheckpointError(EngineError):
    """Model files are missing, corrupt, or do not fit the model."""


class UnsupportedModelError(EngineError):
    """The architecture needs something that is not built yet; the message says what."""


class PluginError(EngineError):
    """A plugin is broken. The message names the plugin, its distribution, the cause and the remedy."""


class PlatformNotFoundError(PluginError):
    """No installed distribution offers the platform that was named."""


class PlatformUnavailableError(PluginError):
    """The platform is installed, and its `probe()` says that it cannot run here."""


class AmbiguousPlatformError(PluginError):
    """Several accelerators are available and none was named."""


class ContractError(PluginError):
    """The plugin's class does not keep the contract: another version, methods missing, or methods it does not have."""


class UnsupportedCapability(EngineError):  # noqa: N818 - the contract's name
    """A platform was asked for something outside what it declared.

    Raised before anything is launched on the device.

    Args:
        name: the capability, as a field of `Capabilities` (``"head_dims"``, ``"softcap"``).
        value: what was asked for.
        reason: why not, and what would do instead.
    """

    def __init__(self, name: str, value: object, reason: str = "") -> None:
        self.name = name
        self.value = value
        super().__init__(f"unsupported {name}: {value!r}" + (f" ({reason})" if reason else ""))


class CommunicatorError(EngineError):
    """A collective did not complete: a rank ended, did not enter in time, or made another call; the message says."""


class OutOfMemoryError(EngineError):
    """The device has too little memory for what was asked; the message has the numbers."""


class EngineDeadError(EngineError):
    """The engine's process ended; running requests are lost, and new ones are refused."""
