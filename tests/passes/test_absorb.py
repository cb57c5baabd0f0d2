"""Keys and values that are made of a cached latent: attention reads the latent, and says the same."""

import pytest
import torch
from graphs import capture, operators, passed
from torch.nn.functional import linear, scaled_dot_product_attention

from tqcompile.backend import _copy
from tqcompile.options import Options
from tqcompile.passes.absorb import MOST_QUERIES, absorb
from tqcompile.passes.canonicalize import canonicalize
from tqcompile.passes.context import Context
from tqcompile.passes.nodes import spelling

BATCH, HEADS, NOPE, ROPE, WIDTH, RANK, PAST = 2, 4, 8, 6, 10, 16, 9


def joined(k_nope, k_rope):
    return torch.cat([k_nope, k_rope.expand(-1, HEADS, -1, -1)], -1)


def copied(k_nope, k_rope):
    keys = k_nope.new_empty(*k_nope.shape[:-1], NOPE + ROPE)
    keys[..., :NOPE].copy_(k_nope)
    keys[..., NOPE:].copy_(k_rope.expand(-1, HEADS, -1, -1))
    return keys


def assigned(k_nope, k_rope):
    keys = torch.empty(*k_nope.shape[:-1], NOPE + ROPE, dtype=k_nope.dtype)
    keys[..., NOPE:] = k_rope
    keys[..., :NOPE] = k_nope
    return keys


def fused(q, k, v, **options):
    return scaled_dot_product_attention(q, k, v, **options)


def spelled_out(q, k, v, attn_mask=None, scale=None):
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ v


def decoder(keys=joined, attend=fused, bias=None, between=lambda latent: latent, **options):
    """A step that puts a latent and a rotary key behind those of the past, and makes keys and values of them."""

    def step(q, past, past_rope, new, new_rope, weight, *mask):
        latent = torch.cat([past, new], 2)
        rope = torch.cat([past_rope, new_rope], 2)
        made = linear(between(latent), weight, bias).view(BATCH, latent.shape[2], HEADS, NOPE + WIDTH).transpose(1, 2)
        k_nope, v = made.split([NOPE, WIDTH], -1)
        given = {"attn_mask": mask[0]} if mask else {}
        return attend(q, keys(k_nope, rope), v, **given, **options), latent, rope

    return step


def inputs(queries=1, dtype=torch.float32, mask=None):
    torch.manual_seed(0)
    sizes = [(BATCH, HEADS, queries, NOPE + ROPE)]
    sizes += [(BATCH, 1, tokens, width) for tokens in (PAST, queries) for width in (RANK, ROPE)]
    given = [torch.randn(size).to(dtype) for size in (*sizes, (HEADS * (NOPE + WIDTH), RANK))]
    return given if mask is None else [*given, mask]


def absorbed(function, *args):
    """What `function` says before and after, how many reads were rewritten, and the graph."""
    results = []

    def backend(gm, example_inputs):
        after = _copy(gm)
        canonicalize(after, None)
        count = absorb(after, Context(Options(preset="lossless")))
        after.graph.lint()
        after.recompile()
        results.append((after(*example_inputs)[0], count, after))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        expected = torch.compile(function, backend=backend)(*args)[0]
    return (expected, *results[0])


TOKENS = PAST + 3
SEEN = torch.rand(BATCH, 1, 3, TOKENS, generator=torch.Generator().manual_seed(3)) < 0.6
SEEN[..., 0] = True
MASKS = {
    "none": None,
    "bool": SEEN,
    "additive": torch.where(SEEN, torch.randn(TOKENS), -torch.inf),
    "of each head": SEEN & torch.ones(HEADS, 1, 1, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("keys", [joined, copied, assigned])
def test_attention_reads_the_latent_and_nothing_is_made_of_it(keys, mask):
    args = inputs(3, mask=MASKS[mask])
    expected, out, count, gm = absorbed(decoder(keys), *args)
    assert count == 1 and not {"linear", "copy_", "new_empty", "expand"} & operators(gm).keys()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    _, context, _ = passed(decoder(keys), *args)
    assert not context.fallbacks and context.reads == 2 and {site.role for site in context.sites} == {"both", "keys"}


@pytest.mark.parametrize("options", [{"scale": 0.3}, {"is_causal": True}, {"scale": 0.2, "is_causal": True}])
def test_a_scale_and_causal_attention_stay_what_they_are(options):
    expected, out, count, _ = absorbed(decoder(**options), *inputs(3))
    assert count == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_that_sees_nothing_gets_zeros(additive):
    seen = SEEN.clone()
    seen[0, 0, 1] = False
    mask = torch.where(seen, 0.0, -torch.inf) if additive else seen
    expected, out, count, _ = absorbed(decoder(), *inputs(3, mask=mask))
    assert count == 1 and not expected[0, :, 1].any()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", [None, SEEN])
def test_both_products_of_attention_that_is_spelled_out_read_the_latent(mask):
    args = inputs(3, mask=mask)
    expected, out, count, gm = absorbed(decoder(attend=spelled_out), *args)
    assert count == 2 and "linear" not in operators(gm)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    after, context, _ = passed(decoder(attend=spelled_out), *args)
    assert not context.fallbacks and {"attend", "logits", "mix"} & {str(n.target).split(".")[1] for n in calls(after)}


def calls(gm):
    return [node for node in gm.graph.nodes if str(node.target).startswith("tqcompile.")]


def test_a_latent_without_a_dimension_for_heads_and_no_rotary_key_is_read_as_keys_and_values():
    def step(q, past, new, weight):
        latent = torch.cat([past, new], 1)
        made = linear(latent, weight).view(BATCH, -1, HEADS, NOPE + WIDTH)
        k, v = made[..., :NOPE], made[..., NOPE:]
        return scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2)), latent

    q, past, _, new, _, weight = inputs()
    args = q[..., :NOPE], past[:, 0], new[:, 0], weight
    expected, out, count, _ = absorbed(step, *args)
    assert count == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    after, context, _ = passed(step, *args)
    assert not context.fallbacks and operators(after)["attend.default"] + operators(after)["attend"] == 1


def test_one_mask_of_bools_is_made_additive_once_for_all_layers():
    step = decoder()

    def twice(q, past, past_rope, new, new_rope, weight, mask, *other):
        first, *kept = step(q, past, past_rope, new, new_rope, weight, mask)
        second, *others = step(q + first.mean(), *other, new, new_rope, weight, mask)
        return second, *kept, *others

    args = inputs(3, mask=SEEN)
    expected, out, count, gm = absorbed(twice, *args, args[1].clone(), args[2].clone())
    assert count == 2 and operators(gm)["masked_fill"] == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    after, _, _ = passed(twice, *args, args[1].clone(), args[2].clone())
    assert operators(after)["reach"] == 1


def normed(latent):
    return torch.nn.functional.rms_norm(latent, (RANK,))


def overwritten(q, past, past_rope, new, new_rope, weight):
    past[:, :, :1], past_rope[:, :, :1] = new, new_rope
    made = linear(past, weight).view(BATCH, PAST, HEADS, NOPE + WIDTH).transpose(1, 2)
    k_nope, v = made.split([NOPE, WIDTH], -1)
    k = joined(k_nope, past_rope)
    past[:, :, 1:2] = new
    return scaled_dot_product_attention(q, k, v), past, past_rope


def wide_values(q, past, past_rope, new, new_rope, weight):
    latent, rope = torch.cat([past, new], 2), torch.cat([past_rope, new_rope], 2)
    made = linear(latent, weight).view(BATCH, PAST + 1, HEADS, NOPE + WIDTH).transpose(1, 2)
    k_nope, v = made.split([NOPE, WIDTH], -1)
    return scaled_dot_product_attention(q, joined(k_nope, rope), joined(v, rope)), latent, rope


def with_a_gap(k_nope, k_rope):
    keys = k_nope.new_zeros(*k_nope.shape[:-1], NOPE + 1 + ROPE)
    keys[..., :NOPE].copy_(k_nope)
    keys[..., NOPE + 1 :].copy_(k_rope.expand(-1, HEADS, -1, -1))
    return keys


def twice_in_one_place(k_nope, k_rope):
    keys = k_nope.new_zeros(*k_nope.shape[:-1], NOPE + ROPE)
    keys[..., :NOPE].copy_(k_nope)
    part = keys[..., NOPE:]
    part.copy_(k_rope.expand(-1, HEADS, -1, -1))
    part.mul_(2)
    return keys


def with_another_channel(q, k, v):
    return fused(torch.cat([q, q[..., :1]], -1), k, v)


def without_a_channel(q, k, v):
    return fused(q[..., 1:], k, v)


def part_of_a_rotary_key(k_nope, k_rope):
    return joined(k_nope, k_rope[..., 1:])


def filled_later(k_nope, k_rope):
    keys = k_nope.new_zeros(*k_nope.shape[:-1], NOPE + ROPE)
    keys[..., :NOPE].copy_(k_nope)
    read = keys.clone()
    keys[..., NOPE:].copy_(k_rope.expand(-1, HEADS, -1, -1))
    return read


def changed(k_nope, k_rope):
    keys = copied(k_nope, k_rope)
    keys.mul_(2)
    return keys


def created(q, past, past_rope, new, new_rope, weight):
    latent, rope = new + 1, new_rope + 1
    made = linear(latent, weight).view(BATCH, 1, HEADS, NOPE + WIDTH).transpose(1, 2)
    k_nope, v = made.split([NOPE, WIDTH], -1)
    return scaled_dot_product_attention(q, joined(k_nope, rope), v), latent, rope


def hidden(q, past, past_rope, new, new_rope, weight):
    made = linear(past, weight).view(BATCH, PAST, HEADS, NOPE + WIDTH).transpose(1, 2)
    k_nope, v = made.split([NOPE, WIDTH], -1)
    return scaled_dot_product_attention(q, joined(k_nope, past_rope), v), past + 1, past_rope + 1


def given_in_two_parts(q, past, past_rope, new, new_rope, weight):
    latent, rope = torch.cat([past, new], 2), torch.cat([past_rope, new_rope], 2)
    made = linear(latent, weight).view(BATCH, PAST + 1, HEADS, NOPE + WIDTH).transpose(1, 2)
    k_nope, v = made.split([NOPE, WIDTH], -1)
    return scaled_dot_product_attention(q, joined(k_nope, rope), v), past + 1, new_rope + 1


REFUSED = {
    "a bias": (decoder(bias=torch.ones(HEADS * (NOPE + WIDTH))), inputs()),
    "a norm in front of the product": (decoder(between=normed), inputs()),
    "many queries": (decoder(), inputs(MOST_QUERIES + 1)),
    "many queries, spelled out": (decoder(attend=spelled_out), inputs(MOST_QUERIES + 1)),
    "a latent that is overwritten before attention": (overwritten, inputs()),
    "keys that are filled in part": (decoder(with_a_gap, with_another_channel), inputs()),
    "keys whose part is filled and changed": (decoder(twice_in_one_place), inputs()),
    "a part of a rotary key": (decoder(part_of_a_rotary_key, without_a_channel), inputs()),
    "values with a rotary part": (wide_values, inputs()),
    "keys that are read before they are filled": (decoder(filled_later), inputs()),
    "keys that are changed": (decoder(changed), inputs()),
    "a latent that is made here": (created, inputs()),
    "an input that is no cache": (hidden, inputs()),
    "two inputs that are no caches": (given_in_two_parts, inputs()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_exact_or_not_pay_stays_as_it_is(case):
    function, args = REFUSED[case]
    _, _, count, gm = absorbed(function, *[arg.clone() for arg in args])
    assert count == 0 and "linear" in operators(gm)


def test_keys_that_something_else_reads_too_are_still_made():
    def step(*args):
        made = []

        def keys(k_nope, k_rope):
            made.append(copied(k_nope, k_rope))
            return made[0]

        return *decoder(keys)(*args), made[0]

    args = inputs()
    _, _, count, gm = absorbed(step, *args)
    assert count == 1
    torch.testing.assert_close(gm(*[args[at] for at in order(gm, args)])[-1], step(*args)[-1])


def order(gm, args):
    """Which argument each placeholder is, by its shape: no two have the same."""
    shapes = [tuple(arg.shape) for arg in args]
    return [shapes.index(tuple(n.meta["example_value"].shape)) for n in gm.graph.nodes if n.op == "placeholder"]


def test_a_size_that_was_asked_of_what_is_not_made_any_more_does_not_keep_it():
    args = inputs()
    gm = capture(decoder(), *args)
    canonicalize(gm, None)
    made = next(node for node in gm.graph.nodes if spelling(node) == "linear")
    (view,) = made.users
    with gm.graph.inserting_after(made):
        size = gm.graph.call_method("size", (made, 2))
    size.meta["example_value"] = PAST + 1
    view.args = (made, BATCH, size, *view.args[3:])
    assert absorb(gm, None) == 1 and not {"linear", "size"} & operators(gm).keys()


def counting(counts):
    """A backend that notes how many reads of each graph are brought to a latent, and runs it as it was."""

    def backend(gm, example_inputs):
        after = _copy(gm)
        canonicalize(after, None)
        counts.append(absorb(after, Context(Options())))
        return gm.forward

    return backend


def test_how_many_queries_are_few_is_a_guard_where_their_number_is_a_symbol():
    counts = []
    call = torch.compile(decoder(), backend=counting(counts))
    torch._dynamo.reset()
    with torch.no_grad():
        for queries in (5, 7, MOST_QUERIES, MOST_QUERIES + 1, 40, 3):
            args = inputs(queries)
            for tensor in (args[0], args[3], args[4]):
                torch._dynamo.mark_dynamic(tensor, 2)
            call(*args)
    assert counts == [1, 0]


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_cache_that_grows_needs_no_new_graph_for_each_token(dynamic):
    counts = []

    def step(q, past, past_rope, new, new_rope, weight):
        out, latent, rope = decoder()(q, past, past_rope, new, new_rope, weight)
        return out + (q[..., :ROPE] @ rope.transpose(-1, -2)).softmax(-1).amax(), latent, rope

    torch._dynamo.reset()
    args = inputs()
    weight = torch.nn.Parameter(args.pop(), requires_grad=False)
    call = torch.compile(lambda *args: step(*args, weight), backend=counting(counts), dynamic=dynamic)
    with torch.no_grad():
        for _ in range(5):
            _, args[1], args[2] = call(*args)
    assert counts == [1] * len(counts) and len(counts) <= 2


def test_numbers_of_queries_that_the_author_bounds_get_no_guard():
    call = torch.compile(decoder(), backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    torch._dynamo.reset()
    args = inputs(5)
    for tensor in (args[0], args[3], args[4]):
        torch._dynamo.mark_dynamic(tensor, 2, min=2, max=64)
    with torch.no_grad():
        torch.testing.assert_close(call(*args)[0], decoder()(*inputs(5))[0], rtol=1e-5, atol=1e-5)


def test_left_out_by_name_the_latent_is_decoded():
    _, context, _ = passed(decoder(), *inputs(), disable=("absorb",))
    assert {fallback.operator for fallback in context.fallbacks} == {"linear", "expand"}


@pytest.mark.parametrize("mask", [None, SEEN])
def test_in_half_precision_it_is_about_as_exact_as_what_it_replaces(mask):
    args = inputs(3, torch.bfloat16, mask)
    # Scores of a rotary key that are large, as a part of the mask, are not to be rounded for themselves.
    args[0][..., NOPE:] *= 8
    exact = decoder()(*[arg.double() if arg.is_floating_point() else arg for arg in args])[0]
    outs = []
    for disable in ((), ("absorb",)):
        torch._dynamo.reset()
        options = {"preset": "lossless", "inner": "eager", "disable": disable}
        with torch.no_grad():
            call = torch.compile(decoder(), backend="turboquant", options=options)
            outs.append(call(*[arg.clone() for arg in args])[0])
    errors = [(out.double() - exact).square().mean().sqrt() for out in outs]
    assert errors[0] < 1.5 * errors[1]
