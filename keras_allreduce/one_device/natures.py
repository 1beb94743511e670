"""What was measured of a step."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from keras_allreduce.one_device import nature
from keras_allreduce.one_device.nature import Nature

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Natures:
    """What was measured of a step.

    Attributes:
        found: The nature of each gradient, loss, value of a metric and log.
        failure: Why nothing was measured; empty if it was.
        losses: The nature of all gradients and losses, if the user says it.
    """

    found: Mapping[Key, Nature] = field(default_factory=dict)
    failure: str = ""
    losses: Nature | None = None

    @classmethod
    def given(cls, *, is_sum: bool) -> "Natures":
        """All losses are sums over samples, or all are means."""
        return cls(losses=Nature(nature.SUM if is_sum else nature.MEAN))

    def to_json(self) -> str:
        """For `from_json`, on another worker."""
        found = [(key, asdict(value)) for key, value in self.found.items()]
        return json.dumps([found, self.failure])

    @classmethod
    def from_json(cls, text: str) -> "Natures":
        """What `to_json` was called on."""
        found, failure = json.loads(text)
        return cls(
            {tuple(key): Nature(**value) for key, value in found}, failure
        )

    def is_sum(self, *key: Any) -> bool:
        """Whether a value is a sum over samples; if not known, a mean."""
        return self.of(*key).kind == nature.SUM

    def of(self, *key: Any) -> Nature:
        """The nature of a value; a mean if it is not known."""
        if self.losses is not None and key[0] not in ("metric", "log", "state"):
            return self.losses
        return self.found.get(key, Nature())
