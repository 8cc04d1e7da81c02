"""Read-only configurations that say, in one line, how they are changed."""

from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import ReadonlyConfigError


class _Sealed(DictConfig):
    """A read-only part of a configuration: whoever sets a field is told, in one line, how to change it."""

    def _format_and_raise(self, key: Any, value: Any, cause: Exception, *rest: Any, **kw: Any) -> None:
        if isinstance(cause, ReadonlyConfigError):
            raise ReadonlyConfigError(_how_to_change(self._get_full_key(key))) from None
        super()._format_and_raise(key, value, cause, *rest, **kw)


class _SealedList(ListConfig):
    """The same for a list."""

    def _format_and_raise(self, key: Any, value: Any, cause: Exception, *rest: Any, **kw: Any) -> None:
        if isinstance(cause, ReadonlyConfigError):
            raise ReadonlyConfigError(_how_to_change(self._get_full_key(None))) from None
        super()._format_and_raise(key, value, cause, *rest, **kw)


def _how_to_change(key: str) -> str:
    key = key or "key.path"
    return f"{key}: a configuration stays as it is; config.load(cfg, '{key}=…') gives a changed one"


def sealed(part: Any) -> Any:
    """The same part, whose class says how it is changed: OmegaConf knows no other place for a message."""
    if isinstance(part, (DictConfig, ListConfig)) and not part._is_none():
        for key in part if isinstance(part, DictConfig) else range(len(part)):
            sealed(part._get_node(key))
        object.__setattr__(part, "__class__", _Sealed if isinstance(part, DictConfig) else _SealedList)
    return part
