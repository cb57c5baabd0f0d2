"""The vocabulary refuses nonsense with a sentence, and names its own content."""

from dataclasses import fields, replace

import pytest

from tqcompile.codec import Codec, Lookup, Plane, Term
from tqcompile.formats import REGISTRY

EVERY_CODEC = pytest.mark.parametrize("codec", REGISTRY.values(), ids=REGISTRY)


@pytest.mark.parametrize("bits", [0, -1, 17])
def test_a_plane_refuses_widths_that_no_code_can_have(bits):
    with pytest.raises(ValueError, match=f"'p'.*bits={bits}.*1 to 16"):
        Plane("p", bits)


def test_a_plane_refuses_groups_without_coordinates():
    with pytest.raises(ValueError, match=r"'p'.*per=0.*positive"):
        Plane("p", 4, per=0)


def test_a_plane_counts_one_code_for_each_group_begun():
    assert [Plane("p", 4, per=32).count(head_dim) for head_dim in (1, 32, 33, 80)] == [1, 1, 2, 3]
    assert Plane("p", 4, per=None).count(80) == 1
    assert Plane("p", 4).count(80) == 80


def test_a_codec_without_planes_is_refused():
    with pytest.raises(ValueError, match="'hollow' has no planes"):
        Codec("hollow", (Term("standard", ()),), "exact", unbiased=True, source="")


def test_a_codec_that_names_a_plane_twice_is_refused():
    twice = Term("standard", (Lookup(Plane("p", 4), "signed"), Lookup(Plane("p", 16, per=None), "half")))
    with pytest.raises(ValueError, match=r"'twins' names a plane twice: \['p', 'p'\]"):
        Codec("twins", (twice,), "absmax", unbiased=False, source="")


@EVERY_CODEC
def test_codes_are_one_a_coordinate_and_the_scale_is_not(codec):
    assert codec.codes.plane.per == 1
    assert codec.scale is None or codec.scale.plane.per != 1
    assert {codec.codes.plane, *([codec.scale.plane] if codec.scale else [])} <= set(codec.planes)


@EVERY_CODEC
def test_a_digest_changes_with_any_field_and_with_nothing_else(codec):
    other = next(candidate for candidate in REGISTRY.values() if candidate.terms != codec.terms)
    changed = {
        "name": codec.name + "'",
        "terms": other.terms,
        "fit": next(candidate.fit for candidate in REGISTRY.values() if candidate.fit != codec.fit),
        "unbiased": not codec.unbiased,
        "source": codec.source + ".",
        "minimum_head_dim": codec.minimum_head_dim + 1,
    }
    assert set(changed) == {field.name for field in fields(Codec)}
    assert replace(codec).digest() == codec.digest()
    digests = {codec.digest(), *(replace(codec, **{name: value}).digest() for name, value in changed.items())}
    assert len(digests) == len(changed) + 1
