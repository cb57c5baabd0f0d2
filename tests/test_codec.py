"""The vocabulary refuses nonsense with a sentence, and names its own content."""

from dataclasses import fields, replace

import pytest
import torch

from tqcompile import tables
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
        Codec("hollow", (Term("standard", (), "exact"),), unbiased=True, source="")


def test_a_codec_that_names_a_plane_twice_is_refused():
    twice = Term("standard", (Lookup(Plane("p", 4), "signed"), Lookup(Plane("p", 16, per=None), "half")), "absmax")
    with pytest.raises(ValueError, match=r"'twins' names a plane twice: \['p', 'p'\]"):
        Codec("twins", (twice,), unbiased=False, source="")


def test_planes_of_two_terms_may_not_share_a_name_either():
    term = REGISTRY["turboquant:4"].terms[0]
    with pytest.raises(ValueError, match=r"'twins' names a plane twice"):
        Codec("twins", (term, term), unbiased=False, source="")


@EVERY_CODEC
def test_a_plain_codec_has_one_code_a_coordinate_and_a_scale_of_several(codec):
    if not codec.is_plain:
        with pytest.raises(AssertionError, match="no one plane of codes"):
            _ = codec.codes
        with pytest.raises(AssertionError, match="no one scale"):
            _ = codec.scale
        return
    assert codec.codes.plane.per == 1
    assert codec.scale is None or codec.scale.plane.per != 1
    assert {codec.codes.plane, *([codec.scale.plane] if codec.scale else [])} == set(codec.planes)


@EVERY_CODEC
def test_the_tensors_of_a_cache_are_two_at_most_whatever_its_terms_are(codec):
    assert codec.stores == (("number",) if codec.is_exact else ("scale", "codes"))


@EVERY_CODEC
def test_bands_lie_one_behind_the_other_and_share_the_coordinates_out(codec):
    for head_dim in {*range(codec.minimum_head_dim, 131), 192, 256, 576}:
        bands, at = codec.bands(head_dim), 0
        for term, band in zip(codec.terms, bands):
            assert band.start == at and band.stop > at
            assert abs(band.stop - band.start - term.share * head_dim) <= (0.5 if not codec.principal else 1)
            at = band.stop
        whole = sum(term.share for term in codec.terms)
        assert codec.coordinates(head_dim) == at == round(head_dim * whole)
        again = codec.head_dim(at)
        assert again == head_dim if whole >= 1 else codec.bands(again) == bands


@EVERY_CODEC
def test_bases_of_the_same_name_are_the_same_matrices(codec):
    """Graphs tell bases apart by their names; an operator that gets another's basis would be silently wrong."""
    mine = tables.basis_matrix(codec, 64)
    for other in REGISTRY.values():
        theirs = tables.basis_matrix(other, 64)
        same = (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs))
        assert same == (codec.basis == other.basis)


@EVERY_CODEC
def test_a_digest_changes_with_any_field_and_with_nothing_else(codec):
    other = next(candidate for candidate in REGISTRY.values() if candidate.terms != codec.terms)
    changed = {
        "name": codec.name + "'",
        "terms": other.terms,
        "unbiased": not codec.unbiased,
        "source": codec.source + ".",
        "minimum_head_dim": codec.minimum_head_dim + 1,
        "for_values": not codec.for_values,
        "principal": not codec.principal,
    }
    assert set(changed) == {field.name for field in fields(Codec)}
    assert replace(codec).digest() == codec.digest()
    digests = {codec.digest(), *(replace(codec, **{name: value}).digest() for name, value in changed.items())}
    assert len(digests) == len(changed) + 1


@EVERY_CODEC
def test_a_digest_changes_with_any_field_of_a_term(codec):
    term = codec.terms[-1]
    others = [
        replace(term, basis="hadamard" if term.basis != "hadamard" else "rotation"),
        replace(term, fit="polar" if term.fit != "polar" else "sign"),
        replace(term, share=term.share / 2),
        replace(term, factors=term.factors + (Lookup(Plane("more", 3), "signed"),)),
    ]
    changed = [replace(codec, terms=(*codec.terms[:-1], other)).digest() for other in others]
    assert len({codec.digest(), *changed}) == len(changed) + 1
