"""The base of every configuration: frozen, checked, with settings that have dotted names."""

from __future__ import annotations

from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from erpe.errors import ConfigError, nearest
from erpe.explain import explain

CONTENT = "fingerprint"
"""Key of a description of own data that no table of settings has: the hash of its images."""


class Config(BaseModel):
    """Frozen; an unknown key, a NaN or an infinity is a `ConfigError` of one line."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, given: Any, info: ValidationInfo) -> Any:
        """Refuse true and false as numbers, which Python takes for 1 and 0."""
        if isinstance(given, bool) and _is_number(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(given).lower()} given; use a number instead")
        return given

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(*explain(error, type(self))) from None

    def flat(self) -> dict[str, Any]:
        """Every setting under its dotted name: `{"model.width": 64, ...}`."""
        return flatten(self.tree("json"))

    def tree(self, mode: str = "python") -> dict[str, Any]:
        """As `model_dump`, with what is not written there unless it is set."""
        found, dumped = {}, self.model_dump(mode=mode)
        for name in type(self).model_fields:
            value = getattr(self, name)
            found[name] = value.tree(mode) if isinstance(value, Config) else dumped.get(name, value)
        return found

    def replace(self, values: dict[str, Any]) -> Self:
        """Return a copy with some dotted names changed: `{"train.lr": 1e-3}`.

        Raises:
            ConfigError: an unknown name, or a value that does not fit.
        """
        tree, known = self.tree(), self.flat()
        mistakes = []
        for name, value in values.items():
            *path, leaf = name.split(".")
            branch: Any = tree
            for key in path:
                branch = branch.get(key) if isinstance(branch, dict) else None
            if not isinstance(branch, dict) or leaf not in branch:
                mistakes.append(f"unknown setting {name[:100]!r}; {nearest(name, known)}")
            else:
                branch[leaf] = value
        try:
            changed = type(self)(**tree)
        except ConfigError as error:
            mistakes += error.args
        if mistakes:
            raise ConfigError(*mistakes)
        return changed


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(map(_is_number, get_args(annotation)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts to one dict of dotted names; the description of own data is one value, `flowers@3fa2c1d09b7e`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value.get(CONTENT):
            flat[f"{prefix}{key}"] = f"{value['name']}@{value[CONTENT][:12]}"
        else:
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is not above `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)
