"""MethodSuite finds what it is for: a right method obeys every law, and one fault breaks the law that names it."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hubkit.methods.host import GROUP, Method, Offer
from hubkit.methods.suite import MethodSuite
from hubkit.methods.template import package_files

SOURCE = package_files("gain", "0")["hubkit_gain.py"]
RESET = "nn.init.uniform_(self.g, -self.limit, self.limit, generator=generator)"
FORWARD = "return y * self.g.to(y.dtype)"
FAULTS = {
    "describes_itself": ('paper="https://arxiv.org/abs/2210.08823"', 'paper=""'),
    "fresh_is_the_base_bit_for_bit": (RESET, "nn.init.ones_(self.g)"),
    "same_seed_same_parts": (RESET, "self.g.copy_(torch.rand(self.g.shape))"),
    "another_seed_gives_another_adapter": (RESET, "nn.init.uniform_(self.g, generator=generator.manual_seed(0))"),
    "only_the_adapter_trains": (FORWARD, "return y * self.g.detach().to(y.dtype)"),
    "write_read_write_gives_the_same_bytes": (
        FORWARD,
        f"{FORWARD}\n\n    def values(self):\n        return {{'g': self.g + 1}}",
    ),
    "detaching_restores_the_base": (FORWARD, "return y * 0"),
    "a_sum_does_not_depend_on_order_and_opposites_cancel": (
        FORWARD,
        "self.calls = vars(self).get('calls', 0) + 1\n        return y * self.g.to(y.dtype) * self.calls",
    ),
    "a_routed_row_is_that_row_alone": (FORWARD, "return y * self.g.to(y.dtype) * x.shape[0]"),
    "merged_equals_live": ("gain[:, None] * site.weight()", "gain[:, None] * site.weight() * 0.999"),
}
"""Law -> what of the method is replaced by what."""


def gain(law: str | None) -> type[MethodSuite]:
    """The kit for the method of `hubkit methods --new`, with the fault that breaks one law."""
    source = SOURCE
    if law is not None:
        right, wrong = FAULTS[law]
        assert right in source
        source = source.replace(right, wrong)
    module = ModuleType("hubkit_gain")
    exec(compile(source, "hubkit_gain.py", "exec", dont_inherit=True), vars(module))
    loaded = Method(Offer("gain", "hubkit-gain", "0", EntryPoint("gain", "hubkit_gain", GROUP)), module)

    class Kit(MethodSuite):
        method = "gain"

        def load(self) -> Method:
            return loaded

    return Kit


def check(kit: type[MethodSuite], law: str, tmp_path: Path) -> None:
    """One law on the tiny Llama, from random starting values where they may be drawn."""
    config = {} if law == "fresh_is_the_base_bit_for_bit" else {"limit": 0.5}
    arguments: dict[str, Any] = {"case": ("llama", config), "tmp_path": tmp_path}
    function = getattr(kit, f"test_{law}")
    function(kit(), **{name: arguments[name] for name in function.__annotations__ if name in arguments})


@pytest.mark.parametrize("law", FAULTS)
def test_the_law_holds_without_the_fault_and_breaks_with_it(law: str, tmp_path: Path) -> None:
    (tmp_path / "right").mkdir()
    check(gain(None), law, tmp_path / "right")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(AssertionError):
        check(gain(law), law, tmp_path / "wrong")


def test_every_law_has_its_fault() -> None:
    laws = {name.removeprefix("test_") for name in vars(MethodSuite) if name.startswith("test_")}
    assert laws - {"to_peft_and_back_and_peft_agrees"} == FAULTS.keys()  # this one method has no form of PEFT
