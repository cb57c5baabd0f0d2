"""Which keys a graph centres, by what, and why others stay as they are."""

import re

import pytest
import torch
from graphs import operators, passed
from test_rotary import EMBED, HALVES, HEAD_DIM, HEADS, Keys, expected, halves
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tqcompile import ops
from tqcompile.centre import still
from tqcompile.dump import kernel_sources

BATCH, ROOM, TOKENS, PAST = 2, 24, 3, 9


class Layer(nn.Module):
    """Attention of rotated keys over a cache, which `update(caches, k, v, positions)` keeps and hands back."""

    def __init__(self, update, attend=sdpa, rotate=halves):
        super().__init__()
        self.keys, self.update, self.attend = Keys(rotate), update, attend
        self.q, self.v = (nn.Linear(EMBED, HEADS * HEAD_DIM) for _ in range(2))

    def forward(self, hidden, positions, *caches):
        q, v = (w(hidden).view(*hidden.shape[:2], HEADS, HEAD_DIM).transpose(1, 2) for w in (self.q, self.v))
        k, v, kept = self.update(caches, self.keys(hidden, positions), v, positions)
        return self.attend(halves(self.keys, q, positions), k, v), kept


def grown(caches, k, v, positions):
    k, v = torch.cat([caches[0], k], 2), torch.cat([caches[1], v], 2)
    return k, v, (k, v)


def assigned(caches, k, v, positions):
    caches[0][:, :, positions] = k
    caches[1][:, :, positions] = v
    return *caches, ()


def copied_at(caches, k, v, positions):
    caches[0].index_copy_(2, positions, k), caches[1].index_copy_(2, positions, v)
    return *caches, ()


def run_of_tokens(caches, k, v, positions):
    caches[0][:, :, PAST : PAST + TOKENS] = k
    caches[1][:, :, PAST : PAST + TOKENS] = v
    return caches[0][:, :, : PAST + TOKENS], caches[1][:, :, : PAST + TOKENS], ()


def made(caches, k, v, positions):
    return k, v, (k, v)


def tokens_first(caches, k, v, positions):
    caches[0][:, positions] = k.transpose(1, 2)
    caches[1][:, positions] = v.transpose(1, 2)
    return caches[0].transpose(1, 2), caches[1].transpose(1, 2), ()


def window(caches, k, v, positions):
    k, v = torch.cat([caches[0], k], 2), torch.cat([caches[1], v], 2)
    return k, v, (k[:, :, -PAST:], v[:, :, -PAST:])


def rolled(caches, k, v, positions):
    for cache, new in zip(caches, (k, v)):
        full = cache.roll(-TOKENS, 2)
        full[:, :, -TOKENS:] = new
        cache.copy_(full)
    return *caches, ()


def summed(caches, k, v, positions):
    k, v, kept = grown(caches, k, v, positions)
    return k, v, (*kept, k.sum(2))


def cleared(caches, k, v, positions):
    caches[0].zero_()
    return assigned(caches, k, v, positions)


def repeated(q, k, v):
    return sdpa(q.repeat(1, 2, 1, 1), k, v, enable_gqa=True)


def softcap(q, k, v):
    return ((q @ k.mT / 4).tanh() * 4).softmax(-1) @ v


def folded(q, k, v):
    return torch.bmm((q.flatten(0, 1) @ k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1))


def caches_for(update):
    if update is made:
        return ()
    length = PAST if update in (grown, window, summed) else ROOM
    size = (BATCH, ROOM, HEADS, HEAD_DIM) if update is tokens_first else (BATCH, HEADS, length, HEAD_DIM)
    return torch.randn(size), torch.randn(size)


def centred(update, attend=sdpa, rotate=halves, centre=True, **options):
    """The graph after the passes, its context, and the layer."""
    layer = Layer(update, attend, rotate)
    given = torch.randn(BATCH, TOKENS, EMBED), torch.arange(PAST, PAST + TOKENS), *caches_for(update)
    gm, context, _ = passed(layer, *given, centre=centre, **options)
    return gm, context, layer


@pytest.mark.parametrize("update", [grown, assigned, copied_at, run_of_tokens, made, tokens_first])
@pytest.mark.parametrize("attend", [sdpa, repeated])
def test_keys_of_every_form_are_centred_by_their_rotation(update, attend):
    gm, context, layer = centred(update, attend)
    (centring,) = context.centres.values()
    assert not context.uncentred and context.counts["centre"] == 1
    assert list(centring.rotation.partners) == expected(HALVES, HEAD_DIM)[1]
    assert centring.dim == (1 if update is tokens_first else 2)
    torch.testing.assert_close(centring.given, layer.keys.proj.bias.view(HEADS, HEAD_DIM))
    count = operators(gm)
    assert (count["learned"], count["less"]) == ((1, 1) if update is made else (0, 1))
    assert (count["waved"], count["waves"]) == ((0, 0) if update is made else (1, 1))


def test_keys_that_no_position_turns_have_a_mean_that_no_softmax_sees():
    gm, context, _ = centred(grown, rotate=lambda model, x, positions: x)
    (centring,) = context.centres.values()
    assert centring.rotation == still(HEAD_DIM)
    assert operators(gm)["less"] == 1 and not operators(gm)["waved"]
    (read,) = gm.graph.find_nodes(op="call_function", target=ops.attend)
    assert read.args[3] is None and "centre" not in read.kwargs


@pytest.mark.parametrize("rotates", [True, False])
def test_the_kernels_of_a_graph_have_what_adds_to_its_scores(rotates):
    gm, context, _ = centred(grown, rotate=halves if rotates else lambda model, x, positions: x)
    sources = kernel_sources(gm, context.sites)
    (attend,) = [text for what, text in sources.items() if what.startswith("attend_") and "int8" not in what]
    assert ("shift" in sources) == ("scores += part" in attend) == rotates
    assert not rotates or "def shift_scores(" in sources["shift"]


def test_layers_share_one_table_of_waves():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Layer(grown), Layer(grown)

        def forward(self, hidden, positions, *caches):
            out, kept = self.one(hidden, positions, *caches[:2])
            return out, *kept, *self.other(hidden, positions, *caches[2:])[1]

    layers = Two()
    given = torch.randn(BATCH, TOKENS, EMBED), torch.arange(TOKENS), *caches_for(grown), *caches_for(grown)
    gm, context, _ = passed(layers, *given, centre=True)
    assert len(context.centres) == 2 and operators(gm)["waves"] == 1


AS_THEY_ARE = {
    "a window that slides": (window, sdpa, "other places|getitem uses it"),
    "a window that rolls": (rolled, sdpa, "setitem writes it"),
    "numbers that are used otherwise": (summed, sdpa, "sum uses it"),
    "a cache that is cleared": (cleared, sdpa, "zero_ writes it"),
    "a softcap": (grown, softcap, "more than a mask"),
    "sequences and heads in one": (grown, folded, "in one dimension"),
}


@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_keys_stay_as_they_are_where_scores_could_not_get_back_what_is_taken_off(name):
    update, attend, reason = AS_THEY_ARE[name]
    _, context, _ = centred(update, attend)
    assert not context.centres and context.sites
    (found,) = context.uncentred
    assert re.search(reason, found.reason), found.reason
    assert "line" in found.where


@pytest.mark.parametrize("options", [{"centre": False}, {"disable": "centre"}])
def test_nothing_is_centred_that_was_not_asked_for(options):
    gm, context, _ = centred(grown, **options)
    assert not context.centres and not context.uncentred
    assert not operators(gm)["less"] and context.sites
