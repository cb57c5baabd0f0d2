"""Options: what they default to, where they come from, and what a wrong one is told."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from conversations import conversations
from models import EMBED, Shape
from test_mutations import LOSSLESS, Layer, calls

import tqcompile
from tqcompile import formats
from tqcompile.options import ENVIRONMENT, INNERS, PASSES, Options, as_defaults, resolve


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def codecs(options):
    return options.key_codec.name, options.value_codec.name


def test_defaults():
    options = resolve()
    assert options == Options() == resolve({}) == resolve(None)
    assert dataclasses.asdict(options) == {
        "preset": "balanced",
        "keys": None,
        "values": None,
        "sinks": None,
        "window": None,
        "strict": False,
        "centre": None,
        "disable": (),
        "inner": "inductor",
        "dump": None,
    }
    assert options.chosen == formats.PRESETS["balanced"] and codecs(options) == formats.PRESETS["balanced"].pair


@pytest.mark.parametrize("preset", formats.PRESETS)
def test_a_preset_is_a_pair_and_each_half_can_be_replaced(preset):
    keys, values = formats.PRESETS[preset].pair
    assert codecs(resolve({"preset": preset})) == (keys, values)
    assert codecs(resolve({"preset": preset, "keys": "turboquant:8"})) == ("turboquant:8", values)
    assert codecs(resolve({"preset": preset, "values": "turboquant:8"})) == (keys, "turboquant:8")
    assert codecs(resolve({"keys": "identity", "values": "q8_0"})) == ("identity", "q8_0")


def test_a_preset_is_whole():
    """A codec that is named takes the place of one that was measured with what is kept exactly and centred."""
    small = formats.PRESETS["small"]
    assert resolve({"preset": "small"}).chosen == small and small.sinks and small.window and small.centre
    named = resolve({"preset": "small", "keys": "q8_0"}).chosen
    assert named == formats.Preset("q8_0", small.values)
    assert resolve({"preset": "small", "keys": "q8_0", "window": 8}).chosen == dataclasses.replace(named, window=8)
    for name, value in (("sinks", 0), ("window", 7), ("centre", False)):
        assert resolve({"preset": "small", name: value}).chosen == dataclasses.replace(small, **{name: value})
    assert resolve({"sinks": 3}).chosen == dataclasses.replace(formats.PRESETS["balanced"], sinks=3)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        (" , ,", {}),
        ("keys=turboquant:4", {"keys": "turboquant:4"}),
        (" keys = turboquant:4 , values=q8_0 ,", {"keys": "turboquant:4", "values": "q8_0"}),
        ("preset=small,inner=eager", {"preset": "small", "inner": "eager"}),
        ("disable=compress", {"disable": ("compress",)}),
        ("sinks=4,window=128", {"sinks": 4, "window": 128}),
        ("disable=compress+sites", {"disable": ("compress", "sites")}),
        ("dump=some/folder", {"dump": Path("some/folder")}),
        *((f"strict={word}", {"strict": True}) for word in ("1", "true", "True", "yes")),
        *((f"strict={word}", {"strict": False}) for word in ("0", "false", "No")),
        ("centre=1", {"centre": True}),
    ],
)
def test_the_environment_is_read(monkeypatch, text, expected):
    monkeypatch.setenv(ENVIRONMENT, text)
    assert resolve() == Options(**expected)


def test_what_is_given_beats_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "keys=q8_0,inner=eager,strict=1,disable=sites,dump=there")
    assert resolve({"keys": "identity"}).keys == "identity" and resolve({"keys": "identity"}).inner == "eager"
    given = {"inner": "inductor", "strict": False, "disable": (), "dump": None}
    assert resolve(given) == Options(keys="q8_0", **given)
    assert tqcompile.turboquant(strict=False).options.strict is False
    assert tqcompile.turboquant().options == resolve()


def test_a_given_preset_beats_the_halves_of_the_environment(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "preset=quality,keys=identity,values=identity,sinks=9,centre=0")
    assert codecs(resolve()) == ("identity", "identity")
    assert resolve({"preset": "small"}).chosen == formats.PRESETS["small"]
    assert codecs(resolve({"preset": "small", "keys": "q8_0"})) == ("q8_0", formats.PRESETS["small"].values)
    assert codecs(resolve({"values": "q8_0"})) == ("identity", "q8_0")


WRONG = {
    "name": ({"keyz": "q8_0"}, r"option='keyz'.*did you mean 'keys'\?.*preset, keys, values, sinks, window, strict"),
    "preset": ({"preset": "smal"}, r"preset='smal'.*did you mean 'small'\?.*balanced, quality"),
    "keys": ({"keys": "turboquant4"}, r"keys='turboquant4'.*did you mean 'turboquant:4'\?.*identity, q8_0"),
    "values": ({"values": "q8"}, r"values='q8'.*did you mean 'q8_0'\?"),
    "keys alone": (
        {"values": "qjl:1"},
        r"values='qjl:1': codec 'qjl:1' serves keys alone.*for values one of: identity",
    ),
    "no codec": ({"keys": 4}, r"keys=4 is unknown; did you mean 'q4_0'"),
    "a sketch that is none": ({"values": "qjl:3"}, r"values='qjl:3' is unknown.*Allowed: identity, (?!.*qjl)"),
    "a codec itself": ({"keys": formats.codec("q8_0")}, r"keys=Codec.*did you mean"),
    "inner": ({"inner": "aot"}, r"inner='aot'.*did you mean 'aot_eager'\?.*inductor, aot_eager, eager"),
    "window": ({"window": -1}, r"window=-1; give a number of tokens, 0 or more"),
    "sinks": ({"sinks": True}, r"sinks=True; give a number of tokens"),
    "strict": ({"strict": "yes"}, r"strict='yes'.*True and False"),
    "strict number": ({"strict": 1}, r"strict=1.*True and False"),
    "centre": ({"centre": "yes"}, r"centre='yes'.*True and False"),
    "disable": ({"disable": ("site",)}, r"disable='site'.*did you mean 'sites'\?.*flex, canonicalize, absorb, sites"),
    "disable one": ({"disable": "compres"}, r"disable='compres'.*did you mean 'compress'\?"),
    "disable nothing": ({"disable": None}, r"disable=None.*absorb, sites, centre, regions, compress"),
    "disable number": ({"disable": 3}, r"disable=3.*names of passes"),
    "dump": ({"dump": 3}, r"dump=3.*path of a folder"),
    "dump empty": ({"dump": ""}, r"dump=''.*path of a folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_option_is_told_what_was_given_what_is_allowed_and_what_is_near(name):
    given, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        resolve(given)
    if "keyz" not in given and None not in given.values():
        with pytest.raises(ValueError, match=words):
            tqcompile.turboquant(**given)


@pytest.mark.parametrize(
    "text, words",
    [
        ("q8_0", r"'q8_0' is not name=value; an example is keys=turboquant:4,values=q8_0"),
        ("keyz=q8_0", r"option='keyz'.*did you mean 'keys'\?"),
        ("keys=q80", r"keys='q80'.*did you mean 'q8_0'\?"),
        ("window=-1", r"window='-1'; give a number of tokens, 0 or more"),
        ("strict=maybe", r"strict='maybe'.*Allowed: 1, true, yes, 0, false, no"),
        ("disable=sites+site", r"disable='site'.*did you mean 'sites'\?"),
        ("keys=", r"keys=''.*did you mean"),
        ("dump=", r"dump=''.*path of a folder"),
        ("values=qjl:2", r"values='qjl:2': codec 'qjl:2' serves keys alone.*give it for keys"),
    ],
)
def test_a_wrong_environment_is_named(monkeypatch, text, words):
    monkeypatch.setenv(ENVIRONMENT, text)
    with pytest.raises(ValueError, match=rf"^{ENVIRONMENT}: .*{words}"):
        resolve({"keys": "identity"})


@pytest.mark.parametrize("name", [name for name in formats.REGISTRY if name not in formats.FOR_VALUES])
def test_what_serves_keys_alone_is_taken_for_keys_and_no_list_offers_it_for_values(name):
    assert codecs(resolve({"keys": name})) == (name, formats.PRESETS["balanced"].values)
    with pytest.raises(ValueError) as raised:
        resolve({"keys": name, "values": name})
    offered = str(raised.value).partition("for values one of: ")[2].split(", ")
    assert tuple(offered) == formats.FOR_VALUES and name not in offered


def test_an_unknown_option_of_the_function_is_a_type_error():
    with pytest.raises(TypeError, match="keyz"):
        tqcompile.turboquant(keyz="q8_0")


def test_torch_compile_hands_on_what_is_wrong():
    compiled = torch.compile(Layer(), backend="turboquant", options={"keys": "q80"})
    with torch.no_grad(), pytest.raises(Exception, match=r"keys='q80'.*did you mean 'q8_0'"):
        compiled(*next(calls()))


def test_options_are_frozen_and_hashable():
    options = resolve({"disable": ["sites"], "dump": "here"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.keys = "q8_0"
    assert options.disable == ("sites",) and options.dump == Path("here")
    assert hash(options) == hash(resolve({"disable": "sites", "dump": Path("here")}))
    assert {options: 1}[resolve({"disable": ("sites",), "dump": "here"})] == 1


def test_every_option_says_what_it_is():
    lines = Path(tqcompile.options.__file__).read_text().splitlines()
    for field in dataclasses.fields(Options):
        at = next(at for at, line in enumerate(lines) if line.startswith(f"    {field.name}: "))
        assert lines[at + 1].startswith('    """'), field.name


def test_a_digest_tells_apart_what_compiles_differently_only():
    digest = Options().digest()
    keys, values = formats.PRESETS["balanced"].pair
    for alike in (Options(keys=keys), Options(keys=keys, values=values, preset="small"), Options(dump="here")):
        assert alike.digest() == digest
    both = Options(disable=("sites", "compress"))
    assert both.digest() == Options(disable=("compress", "sites")).digest()
    others = [Options(preset="small"), Options(keys="q8_0"), Options(values="q8_0"), Options(strict=True)]
    others += [Options(centre=True), Options(sinks=4), Options(window=4)]
    others += [Options(disable="sites"), Options(inner="eager"), both, Options(keys=values, values=keys)]
    assert len({digest, *(other.digest() for other in others)}) == 1 + len(others)


def test_backends_of_equal_options_are_equal():
    one, same = tqcompile.turboquant(keys="q8_0", disable=["sites"]), tqcompile.turboquant(disable="sites", keys="q8_0")
    assert one == same and hash(one) == hash(same) and one.__name__ == "turboquant"
    for other in (tqcompile.turboquant(), tqcompile.turboquant(keys="q8_0"), Options(keys="q8_0"), "turboquant"):
        assert one != other


def test_the_callable_compiles_as_the_name_does():
    x = torch.randn(2, 3, EMBED)
    named, _ = conversations("buffers", Shape(layers=1), ("q8_0", "turboquant:4"))
    called, _ = conversations("buffers", Shape(layers=1), ("q8_0", "turboquant:4"))
    backend = tqcompile.turboquant(keys="q8_0", values="turboquant:4", inner="eager")
    called.call = torch.compile(called.model, backend=backend)
    assert torch.equal(named.feed(x), called.feed(x))
    assert [cache.codec.name for cache in called.caches()] == ["q8_0", "turboquant:4"]


def test_options_beside_the_callable_are_not_lost():
    backend = tqcompile.turboquant(preset="lossless", inner="eager")
    model = Layer()
    with torch.no_grad():
        torch.compile(model, backend=backend, options={"values": "q8_0"})(*next(calls()))
    assert (model.k_cache.codec.name, model.v_cache.codec.name) == ("identity", "q8_0")
    with torch.no_grad(), pytest.raises(Exception, match="option='keyz'"):
        torch.compile(Layer(), backend=backend, options={"keyz": "q8_0"})(*next(calls()))


def test_the_environment_reaches_a_model(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "keys=identity,values=turboquant:8,inner=eager")
    model = Layer()
    with torch.no_grad():
        torch.compile(model, backend="turboquant")(*next(calls()))
    assert (model.k_cache.codec.name, model.v_cache.codec.name) == ("identity", "turboquant:8")


def test_strict_raises_with_the_cache_and_the_line():
    touched = Layer(lambda cache, k: cache.mul_(0.5))
    compiled = torch.compile(touched, backend="turboquant", options={**LOSSLESS, "strict": True})
    before = touched.k_cache.clone()
    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"strict=True, and .*k_cache.*: mul_ .*test_options.*line \d+"),
    ):
        compiled(*next(calls()))
    assert type(touched.k_cache) is torch.Tensor and torch.equal(touched.k_cache, before)
    fine = torch.compile(Layer(), backend="turboquant", options={**LOSSLESS, "strict": True})
    with torch.no_grad():
        fine(*next(calls()))


def test_a_pass_that_only_makes_graphs_faster_is_left_out_alone():
    model, twin = Layer(), Layer()
    results = []
    for each, disable in ((model, ()), (twin, "fuse")):
        options = {"keys": "turboquant:4", "values": "turboquant:4", "disable": disable, "strict": True}
        compiled = torch.compile(each, backend="turboquant", options=options)
        with torch.no_grad():
            results.append(torch.stack([compiled(*arguments) for arguments in calls(3)]))
        counts = tqcompile.report(each).graphs[0].counts
        assert counts.get("fuse", 0) == (each is model) and counts["compress"] > 0
        assert isinstance(each.k_cache, tqcompile.CompressedKV)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("disable", ["canonicalize", "sites", "compress", "sites+compress"])
def test_a_pass_that_is_left_out_leaves_the_model_right(disable):
    model, twin = Layer(), Layer()
    options = {**LOSSLESS, "disable": tuple(disable.split("+"))}
    compiled = torch.compile(model, backend="turboquant", options=options)
    for arguments in calls(3):
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
    torch.testing.assert_close(model.k_cache * 1, twin.k_cache)
    ran = set().union(*(graph.counts for graph in tqcompile.report(model).graphs))
    assert ran == set(PASSES[: PASSES.index(options["disable"][0])])
    assert type(model.k_cache) is torch.Tensor and not any(graph.sites for graph in tqcompile.report(model).graphs)


@pytest.mark.parametrize("inner", INNERS)
def test_inner_compilers(inner):
    model, twin = Layer(), Layer()
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": inner})
    for arguments in calls():
        with torch.no_grad():
            torch.testing.assert_close(compiled(*arguments), twin(*arguments))
    assert isinstance(model.k_cache, tqcompile.CompressedKV)


@pytest.mark.parametrize(
    ("before", "given", "keys", "values"),
    [
        (None, {"keys": "q8_0"}, "q8_0", "turboquant:3"),
        ("keys=turboquant:2, values=turboquant:2", {"keys": "q8_0"}, "q8_0", "turboquant:2"),
        ("keys=turboquant:2,preset=quality", {"preset": "small"}, *formats.PRESETS["small"].pair),
        ("preset=small", {"preset": "quality", "values": "identity"}, "q8_0", "identity"),
        ("", {}, "turboquant:5", "turboquant:3"),
    ],
)
def test_defaults_for_a_while_stand_over_the_environment_and_leave_it_as_it_was(
    before, given, keys, values, monkeypatch
):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    if before is not None:
        monkeypatch.setenv(ENVIRONMENT, before)
    with as_defaults(given):
        assert (resolve().key_codec.name, resolve().value_codec.name) == (keys, values)
        assert resolve({"keys": "turboquant:8"}).key_codec.name == "turboquant:8"
    assert os.environ.get(ENVIRONMENT) == before
    with pytest.raises(KeyError, match="mine"), as_defaults(given):
        raise KeyError("mine")
    assert os.environ.get(ENVIRONMENT) == before


def test_a_default_that_is_wrong_is_named_at_once(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "values=q8_0")
    with pytest.raises(ValueError, match="q8_1"), as_defaults({"keys": "q8_1"}):
        raise AssertionError("nothing runs under it")
    assert os.environ[ENVIRONMENT] == "values=q8_0"
