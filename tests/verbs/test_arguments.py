"""Arguments of a wrong type at every public name: a refusal that names it, before anything changes; paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from making import make_adapter

import hubkit
from hubkit.documents.arguments import _KINDS, checked, words_of
from hubkit.errors import HubkitError
from hubkit.named.terms import parse_terms
from hubkit.named.trees import parse_tree
from hubkit.registry.reference import parse_reference

h: Any = hubkit
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "attach model": (lambda: h.attach("x", "./a"), "model"),
    "attach terms": (lambda: h.attach(_model(), 3), "terms"),
    "attach mix": (lambda: h.attach(_model(), "./a", mix=None), "mix"),
    "extract base": (lambda: h.extract(3, "t", "o"), "base"),
    "extract rank": (lambda: h.extract("b", "t", "o", rank="8"), "rank"),
    "rebase adapter": (lambda: h.rebase(3, "n", "o"), "adapter"),
    "rebase onto": (lambda: h.rebase("./a", 3, "o"), "onto"),
    "add": (lambda: h.add(3), "reference"),
    "advise": (lambda: h.advise(3, "d"), "base"),
    "advise gpus": (lambda: h.advise("b", "d", gpus="2"), "gpus"),
    "eval": (lambda: h.eval("./a", data=3), "data"),
    "eval benchmarks": (lambda: h.eval("./a", benchmarks="a/b"), "benchmarks"),
    "plan": (lambda: h.plan(3), "base"),
    "predict": (lambda: h.predict(3, "d"), "adapter"),
    "preview": (lambda: h.preview(3, "d"), "base"),
    "bundle": (lambda: h.bundle(3, out="b.tar"), "lock"),
    "cache": (lambda: h.cache(3), "action"),
    "completion": (lambda: h.completion(3), "shell"),
    "config": (lambda: h.config(3), "action"),
    "copy": (lambda: h.copy(3, "hf"), "reference"),
    "copy to": (lambda: h.copy("a/b", 3), " to "),
    "login": (lambda: h.login(registry=3), "registry"),
    "tag": (lambda: h.tag(3, "1.0.0"), "reference"),
    "tag version": (lambda: h.tag("a/b", 1.0), "version"),
    "yank": (lambda: h.yank(3), "reference"),
    "migrate": (lambda: h.migrate(3, "o"), "adapter"),
    "outdated": (lambda: h.outdated(3), "lock"),
    "probe": (lambda: h.probe(3), "url"),
    "remove": (lambda: h.remove(3), "names"),
    "sync": (lambda: h.sync(3), "project"),
    "cache keep": (lambda: h.cache("prune", keep="a.lock"), "keep"),
    "diff": (lambda: h.diff(3, "./a"), "first"),
    "log": (lambda: h.log(3), "reference"),
    "search": (lambda: h.search(3), "text"),
    "search limit": (lambda: h.search(limit="3"), "limit"),
    "compose terms": (lambda: h.compose(3, "o"), "terms"),
    "compose a term": (lambda: h.compose([3], "o"), "terms of a sum.*3"),
    "compose a key": (lambda: h.compose({3: 1.0}, "o"), "terms of a sum.*3"),
    "compose a weight": (lambda: h.compose({"./a": "x"}, "o"), "terms of a sum.*x"),
    "compose rank": (lambda: h.compose("./a", "o", rank="8"), "rank"),
    "compose out": (lambda: h.compose("./a", 7), "out"),
    "deploy": (lambda: h.deploy(3), "folder"),
    "deploy engine": (lambda: h.deploy("d", engine=3), "engine"),
    "export": (lambda: h.export(None, "o"), "reference"),
    "export to": (lambda: h.export("./a", "o", to=["peft"]), " to "),
    "generate": (lambda: h.generate(3, base="b"), "prompt"),
    "generate tokens": (lambda: h.generate("p", base="b", max_new_tokens="9"), "max_new_tokens"),
    "generate temperature": (lambda: h.generate("p", base="b", temperature=True), "temperature"),
    "inspect": (lambda: h.inspect(3), "reference"),
    "list": (lambda: h.list(3), "prefix"),
    "list remote": (lambda: h.list(remote="no"), "remote"),
    "load_base": (lambda: h.load_base(5), "path"),
    "load_base device": (lambda: h.load_base("b", device=0), "device"),
    "load_tokenizer": (lambda: h.load_tokenizer(None), "path"),
    "lock": (lambda: h.lock(3), "recipe"),
    "merge base": (lambda: h.merge(None, "./a", "o"), "base"),
    "merge out": (lambda: h.merge("b", "./a", None), "out"),
    "methods": (lambda: h.methods(3), "name"),
    "mix": (lambda: h.mix(3, "o"), "terms"),
    "mix name": (lambda: h.mix("./a", "o", name=3), "name"),
    "offer model": (lambda: h.offer("x", {}), "model"),
    "offer list": (lambda: h.offer(_model(), ["./a"]), "adapters"),
    "offer a reference": (lambda: h.offer(_model(), {"a": 3}), "terms of a sum.*3"),
    "offer memory": (lambda: h.offer(_model(), {"a": "./a"}, memory="2G"), "memory"),
    "pack": (lambda: h.pack(3), "folder"),
    "pack version": (lambda: h.pack("f", version=1.0), "version"),
    "pull": (lambda: h.pull(b"x"), "reference"),
    "pull offline": (lambda: h.pull("a/b", offline="yes"), "offline"),
    "pull progress": (lambda: h.pull("a/b", progress=True), "progress"),
    "push folder": (lambda: h.push(None, "a/b"), "folder"),
    "push repo": (lambda: h.push("f", 7), "repo"),
    "push registry": (lambda: h.push("f", "a/b", registry=3), "registry"),
    "Route": (lambda: h.Route(3), "route"),
    "save model": (lambda: h.save(3, "a", "f"), "attached"),
    "save name": (lambda: h.save(_model(), 3, "f"), "name"),
    "save folder": (lambda: h.save(_model(), "a", 3), "folder"),
    "serve": (lambda: h.serve(3), "root"),
    "serve port": (lambda: h.serve("r", port="80"), "port"),
    "Stack": (lambda: h.Stack("chat"), "members of a Stack"),
    "Sum": (lambda: h.Sum(3), "members of a Sum"),
    "Sum member": (lambda: h.Sum([3]), "member of a mix"),
    "Sum weight": (lambda: h.Sum({"a": "x"}), "member of a mix"),
    "train base": (lambda: h.train(3, "d", "o"), "base"),
    "train data": (lambda: h.train("b", 3, "o"), "data"),
    "train out": (lambda: h.train("b", "d", None), "out"),
    "train config": (lambda: h.train("b", "d", "o", config=[("rank", 8)]), "config"),
    "train columns": (lambda: h.train("b", "d", "o", columns="text"), "columns"),
    "train replace": (lambda: h.train("b", "d", "o", replace="no"), "replace"),
    "train report": (lambda: h.train("b", "d", "o", report=3), "report"),
    "train steps": (lambda: h.train("b", "d", "o", steps="3"), "steps"),
    "TrainOptions": (lambda: h.TrainOptions(steps="3"), "steps"),
    "trainer_callback": (lambda: h.trainer_callback(3), "name"),
    "users": (lambda: h.users(3), "file"),
    "users add": (lambda: h.users("u", add=3), "add"),
    "verify": (lambda: h.verify(3), "reference"),
    "verify base": (lambda: h.verify("./a", base=3), "base"),
}


def _model() -> Any:
    from torch import nn

    return nn.Linear(2, 2)


@pytest.mark.parametrize("call", WRONG)
def test_a_wrong_type_is_named_and_changes_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    run, named = WRONG[call]
    with pytest.raises((HubkitError, TypeError), match=rf"(?s){named}") as caught:
        run()
    assert isinstance(caught.value, HubkitError) or "() takes " in str(caught.value)
    assert list(work.iterdir()) == []


def test_every_public_function_is_in_the_table() -> None:
    functions = {name for name in dir(hubkit) if name[0].islower()}
    assert {call.split()[0] for call in WRONG} >= functions


def test_every_annotation_of_a_public_function_is_understood() -> None:
    for name in sorted(name for name in dir(hubkit) if name[0].islower()):
        function = getattr(hubkit, name)
        function = getattr(function, "_verb", function)
        assert hasattr(function, "__wrapped__"), f"{name} is not @checked"
        known = {*_KINDS, *dir(hubkit), "Module", "device"}
        for argument, annotation in function.__annotations__.items():
            if argument not in ("return", "options"):
                assert set(words_of(annotation)) <= known, f"{name}: {argument}: {annotation}"


def test_what_fits_passes_in_any_position() -> None:
    import numpy as np

    @checked
    def some(where: Path | str, count: int = 1, *, share: float | None = None, flag: bool = False) -> object:
        return where, count, share, flag

    assert some("a", 2, share=1) == ("a", 2, 1, False)
    numbers: dict[str, Any] = {"count": np.int64(2), "share": np.float32(1)}  # no int and float to a type checker
    assert some(Path("a"), **numbers) == (Path("a"), 2, 1.0, False)
    for wrong in ({"count": 1.0}, {"count": True}, {"share": "1"}, {"flag": 1}, {"flag": None}):
        with pytest.raises(TypeError, match=rf"some\(\) takes {next(iter(wrong))} as "):
            some("a", **wrong)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        some()  # type: ignore[call-arg]


def test_a_path_is_a_folder_wherever_a_reference_is_asked_for(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "chat", tiny_llama).rename(tmp_path / "my chat")
    monkeypatch.chdir(tmp_path)
    there = Path("my chat")
    assert hubkit.inspect(there).digest == hubkit.verify(there, base=tiny_llama).digest
    assert parse_reference(Path("org/name")).path == Path("org/name")
    assert parse_terms(there) == parse_terms([there]) == parse_terms({there: 1.0}) == [("./my chat", 1.0)]
    assert parse_terms(["-0.5*./b", Path("-1*c")]) == [("./b", -0.5), ("./-1*c", 1.0)]
    assert parse_tree(there, "sum").members == ((("./my chat"), 1.0),)
    merged = hubkit.merge(tiny_llama, there, Path("out"), dry_run=True)
    assert merged.changed > 0
    with pytest.raises(HubkitError, match="nothing to pull"):
        hubkit.pull(there)
