"""What a rewritten graph is made of, counted before and after."""

import pytest
import torch
from conversations import fake_quantised
from graphs import operators, passed
from representatives import OF_DENSE
from test_sites import AT, Cache, K, Q, V, attend, write

import tqcompile
from tqcompile import formats
from tqcompile.reads import kernels_of

F = torch.nn.functional
NONE = ()


def stepping(read, repeats=1):
    """A cache that is written by an indexed assignment and read by `read`."""

    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        return read(q, kc, vc)

    return Cache(step)


MASK = torch.ones(3, 9, dtype=torch.bool).tril()

ATTENTIONS = {
    "no mask": lambda q, k, v: attend(q, k, v),
    "bool mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK),
    "float mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=MASK.float() - 1),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :3], v[:, :, :3], is_causal=True),
    "scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5),
    "gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "narrow": lambda q, k, v: attend(q, k.narrow(2, 0, 4), v.narrow(2, 0, 4)),
    "written value": lambda q, k, v: attend(q, k.detach(), v.contiguous()),
}

PRODUCTS = {
    "softmax": lambda s: s.softmax(-1),
    "scale and mask": lambda s: torch.softmax(s / 8**0.5 + (MASK.float() - 1), -1),
    "masked_fill": lambda s: F.softmax((s * 0.3).masked_fill(~MASK, -1e9), dim=-1, dtype=torch.float32).to(s.dtype),
    "dropout": lambda s: F.dropout(s.softmax(-1), 0.0, False),
    "softcap": lambda s: (torch.tanh(s / 30) * 30).softmax(-1),
    "square": lambda s: (s * s).softmax(-1),
    "double": lambda s: s.softmax(-1, dtype=torch.float64).type_as(s),
}


APART_BECAUSE = {"square": "a product of scores with themselves is no function of one"}


@pytest.mark.parametrize("codec", OF_DENSE)
def test_a_write_becomes_one_append_and_attention_one_attend(codec):
    keys, values = formats.pair_of(codec)
    after, context, before = passed(stepping(attend), Q, K, V, AT, keys=keys, values=values)
    assert operators(before) == {"setitem": 2, "scaled_dot_product_attention": 1}
    counted = operators(after)
    joined = counted["append_step.default"] + counted["append_step"]
    assert counted["append.default"] + counted["append"] + 2 * joined == 2 and joined == (
        formats.codec(codec).basis != "standard"
    )
    assert counted["attend.default"] + counted["attend"] == 1
    assert not counted["setitem"] and not counted["scaled_dot_product_attention"] and not counted["decode"]
    assert context.reads == 1


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_read_off_the_planes(name):
    after, context, _ = passed(stepping(ATTENTIONS[name]), Q, K, V, AT)
    assert context.reads == 1 and not context.fallbacks
    assert operators(after)["attend"] == 1


@pytest.mark.parametrize("name", PRODUCTS)
def test_whatever_lies_between_the_two_products_they_are_read_off_the_planes(name):
    read = lambda q, k, v: PRODUCTS[name](q @ k.mT) @ v  # noqa: E731
    after, context, before = passed(stepping(read), Q, K, V, AT)
    counted = operators(after)
    assert not context.fallbacks and not counted["matmul"]
    if name not in APART_BECAUSE:
        assert counted["attend"] == context.reads == 1 and not counted["softmax"] and not counted["logits"]
    else:
        assert counted["logits"] == 1 and counted["mix"] == 1 and context.reads == 2
        assert counted["softmax"] == operators(before)["softmax"] == 1


LEAST = torch.finfo(torch.float32).min
BLIND = torch.tensor([[False], [True], [False]])


def less_its_maximum(logits):
    """How models keep a softmax in half precision, and the weight of the last logit dropped."""
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return F.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]


SPELLED_OUT = {
    "a scale behind a mask": lambda s, b: ((s / 2 + b) * 3).softmax(-1),
    "two masks": lambda s, b: (b.relu() + (s * 0.5 + b.to(s.dtype)).float()).softmax(dim=-1),
    "in place": lambda s, b: s.mul_(0.25).add_(b).softmax(-1),
    "a mask for all heads": lambda s, b: F.softmax(s + b[:1, :1], dim=-1, dtype=torch.float32).to(s.dtype),
    "a cap": lambda s, b: (torch.tanh(s * 0.5 / 3.0) * 3.0 + b).softmax(-1),
    "a cap in place": lambda s, b: s.div_(3.0).tanh().mul(3.0).softmax(-1),
    "a cap and a clamp": lambda s, b: (s.sigmoid().mul(-4).clamp(max=-1.5) + b).softmax(-1),
    "one more logit": lambda s, b: torch.cat([s * 0.5 + b, b[..., :1] * 2], -1).softmax(-1)[..., :-1],
    "one more logit, less the maximum": lambda s, b: less_its_maximum(torch.cat([s, b[:, :, :, :1]], dim=-1)),
    "less the maximum": lambda s, b: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "filled": lambda s, b: (s + b).masked_fill(b[:1, :1] > 1, -1e9).softmax(-1),
    "filled and then added to": lambda s, b: (torch.where(b > -1, s, LEAST) + b).softmax(-1),
    "chosen instead": lambda s, b: torch.where(b > 1, torch.tensor(LEAST), s).softmax(-1),
    "nothing below the least": lambda s, b: torch.max(
        s + b.masked_fill(BLIND, -torch.inf), torch.tensor(LEAST)
    ).softmax(-1),
    "no score at all": lambda s, b: s.masked_fill(torch.ones(3, 1, dtype=torch.bool), LEAST).softmax(-1),
    "a fold and back": lambda s, b: (s.view(8, 3, 9) * 0.5).view(2, 4, 3, 9).add(b).softmax(-1),
    "a mask of one row": lambda s, b: F.dropout((s + b[0, 0, :1]).softmax(-1), p=0.3, training=False),
}


@pytest.mark.parametrize("name", SPELLED_OUT)
@pytest.mark.parametrize("codecs", [("identity", "identity"), ("turboquant:4", "q8_0")], ids="/".join)
def test_scales_and_masks_go_into_attention_as_they_stand(name, codecs):
    weigh = SPELLED_OUT[name]
    bias = torch.randn(2, 4, 3, 9)
    model, twin = (stepping(lambda q, k, v: weigh(q @ k.mT, bias) @ v) for _ in range(2))
    options = {"keys": codecs[0], "values": codecs[1], "inner": "eager"}
    compiled = torch.compile(model, backend="turboquant", options=options)
    with torch.no_grad():
        stored = map(fake_quantised, (K, V), codecs)
        torch.testing.assert_close(compiled(Q, K, V, AT), twin(Q, *stored, AT), rtol=1e-4, atol=1e-5)
    assert sum(graph.reads for graph in tqcompile.report(model).graphs) == 1


FOLDED = {
    "both in one dimension": lambda s, b: s.add(b.flatten(0, 1)).softmax(-1),
    "apart for a mask": lambda s, b: (s.view(2, 4, 3, 9) + b[:, :1]).view(8, 3, 9).softmax(-1),
    "two masks, one each": lambda s, b: ((s + b.flatten(0, 1)).view(2, 4, 3, 9) + b[0]).softmax(-1).flatten(0, 1),
    "a logit of each head": lambda s, b: (
        torch.cat([s.unflatten(0, (2, 4)), b[:, :, :1, :1].expand(2, 4, 3, 1)], -1).softmax(-1)[..., :-1].flatten(0, 1)
    ),
    "values apart": lambda s, b: (s.unflatten(0, (2, 4)) + b).softmax(-1),
}


@pytest.mark.parametrize("name", FOLDED)
def test_sequences_and_heads_in_one_dimension_are_the_same_attention(name):
    bias = torch.randn(2, 4, 3, 9)

    def read(q, k, v):
        weights = FOLDED[name](q.flatten(0, 1) @ k.flatten(0, 1).mT, bias)
        return weights @ (v if weights.dim() == 4 else v.flatten(0, 1))

    model, twin = stepping(read), stepping(read)
    with torch.no_grad():
        out = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager"))(Q, K, V, AT)
        torch.testing.assert_close(out, twin(Q, K, V, AT), rtol=1e-4, atol=1e-5)
    (graph,) = tqcompile.report(model).graphs
    assert graph.reads == 1


def test_a_row_of_nothing_but_the_least_of_a_half_sees_all_alike():
    halves = [x.half() for x in (Q, K, V)]
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[1] = True

    def read(q, k, v):
        return (q @ k.mT).masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1) @ v

    model, twin = stepping(read).half(), stepping(read).half()
    with torch.no_grad():
        out = torch.compile(model, backend=tqcompile.turboquant(preset="lossless", inner="eager"))(*halves, AT)
        torch.testing.assert_close(out, twin(*halves, AT), rtol=2e-3, atol=1e-3)
    (graph,) = tqcompile.report(model).graphs
    assert graph.reads == 1


APART = {
    "weights that are used": lambda q, k, v: (w := (q @ k.mT).softmax(-1)) @ v + w.sum(),
    "scores that are used": lambda q, k, v: (s := q @ k.mT).softmax(-1) @ v + s.sum(),
    "a mask of booleans": lambda q, k, v: (q @ k.mT + (k.sum(-1) > 0)[:, :, None]).softmax(-1) @ v,
    "softmax along queries": lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
    "weights that are scaled": lambda q, k, v: ((q @ k.mT).softmax(-1) * 2) @ v,
    "two softmaxes": lambda q, k, v: (q @ k.mT).softmax(-1).softmax(-1) @ v,
    "dropout": lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), p=0.5, training=True) @ v,
    "a fill that scores come near": lambda q, k, v: (q @ k.mT).masked_fill(q[..., :1] > 0, -3.0).softmax(-1) @ v,
    "a cap behind a mask": lambda q, k, v: (q @ k.mT + q[..., :1]).tanh().softmax(-1) @ v,
    "a logit less": lambda q, k, v: (q @ k.mT).softmax(-1)[..., :-1] @ v[:, :, 1:],
    "two logits more": lambda q, k, v: torch.cat([q @ k.mT, q[..., :2]], -1).softmax(-1)[..., :-2] @ v,
    "a first logit": lambda q, k, v: torch.cat([q[..., :1], q @ k.mT], -1).softmax(-1)[..., 1:] @ v,
    "less another maximum": lambda q, k, v: ((s := q @ k.mT) - s.amax(-2, keepdim=True)).softmax(-1) @ v,
    "a square": lambda q, k, v: ((s := q @ k.mT) * s).softmax(-1) @ v,
}


@pytest.mark.parametrize("name", APART)
def test_what_a_scale_and_masks_do_not_say_stays_two_products(name):
    after, _, _ = passed(stepping(APART[name]), Q, K, V, AT)
    assert operators(after)["logits"] == operators(after)["mix"] == 1 and not operators(after)["attend"]


def test_keys_and_values_of_different_heads_are_not_one_attention():
    after, _, _ = passed(stepping(lambda q, k, v: (q @ k[:, :1].mT).softmax(-1) @ v), Q, K, V, AT)
    assert operators(after)["logits"] == operators(after)["mix"] == 1 and not operators(after)["attend"]


def test_queries_that_are_overwritten_between_the_products_keep_them_apart():
    def read(q, k, v):
        q = q * 2
        weights = (q @ k.mT).softmax(-1)
        q.zero_()
        return weights @ v + q

    after, _, _ = passed(stepping(read), Q, K, V, AT)
    assert operators(after)["logits"] == operators(after)["mix"] == 1


READERS_NO_RULE_KNOWS = {
    "sum": lambda q, k, v: attend(q, k, v) + k.sum(),
    "keys as the left operand": lambda q, k, v: (k @ q.mT).mT.softmax(-1) @ v,
    "outer product": lambda q, k, v: (q.unsqueeze(3) * k.unsqueeze(2)).sum(-1).softmax(-1) @ v,
    "flipped": lambda q, k, v: attend(q, k.flip(2), v),
    "part of a head": lambda q, k, v: attend(q[..., :4], k[..., :4], v),
    "channels repeated": lambda q, k, v: attend(q.repeat(1, 1, 1, 2), k.repeat(1, 1, 1, 2), v),
    "turned and repeated": lambda q, k, v: attend(q, k[:, :2].mT.repeat(1, 2, 1, 1).mT, v),
}


@pytest.mark.parametrize("name", READERS_NO_RULE_KNOWS)
def test_an_unknown_reader_gets_decoded_numbers_and_is_named(name):
    unknown = READERS_NO_RULE_KNOWS[name]
    model, twin = (stepping(lambda q, k, v: unknown(q, k, v).sum(-1) + attend(q, k, v).sum()) for _ in range(2))
    _, context, _ = passed(model, Q, K, V, AT)
    assert context.fallbacks and all(fallback.where.count("line") == 1 for fallback in context.fallbacks)
    torch._dynamo.reset()
    model.k.zero_(), model.v.zero_()
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(Q, K, V, AT), twin(Q, K, V, AT))


def test_a_pass_that_is_switched_off_does_nothing():
    after, context, before = passed(stepping(attend), Q, K, V, AT, disable=("sites",))
    assert operators(after) == operators(before) and not context.sites


def test_layers_that_share_a_mask_share_what_it_lets_them_see():
    def step(kc, vc, q, k, v, at):
        write(kc, k, at), write(vc, v, at)
        first = F.scaled_dot_product_attention(q, kc, vc, attn_mask=MASK[:, :9])
        return F.scaled_dot_product_attention(first, kc, vc, attn_mask=MASK[:, :9])

    after, _, _ = passed(Cache(step), Q, K, V, AT)
    assert operators(after)["attend"] == 2 and operators(after)["reach"] == 1


def test_a_mask_that_is_overwritten_between_layers_is_asked_again():
    def step(kc, vc, q, k, v, at):
        mask = at[:, None] >= torch.arange(9)
        write(kc, k, at), write(vc, v, at)
        first = F.scaled_dot_product_attention(q, kc, vc, attn_mask=mask)
        mask[:, 3:] = True
        return F.scaled_dot_product_attention(first, kc, vc, attn_mask=mask)

    after, _, _ = passed(Cache(step), Q, K, V, AT)
    assert operators(after)["attend"] == 2 and operators(after)["reach"] == 2
    torch._dynamo.reset()
    model, twin = Cache(step), Cache(step)
    compiled = torch.compile(model, backend="turboquant", options={"preset": "lossless", "inner": "aot_eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(Q, K, V, AT), twin(Q, K, V, AT))


@pytest.mark.parametrize(
    ("codec", "kernel"), [("turboquant:4", "int8 units"), ("turboquant:8", "portable, slower than dense attention")]
)
def test_what_reads_codes_on_a_gpu_is_named(codec, kernel):
    wide = [torch.randn(2, 4, 3, 32) for _ in range(3)]

    class Wide(Cache):
        def __init__(self, step):
            super().__init__(step)
            self.k, self.v = (torch.zeros(2, 4, 9, 32) for _ in "kv")

    step = stepping(attend).step
    after, _, _ = passed(Wide(step), *wide, AT, keys=codec, values=codec)
    assert kernels_of(after) == {("attention", f"{codec} / {codec}", kernel): 1}
    product = stepping(lambda q, k, v: PRODUCTS["square"](q @ k.mT) @ v).step
    after, _, _ = passed(Wide(product), *wide, AT, keys=codec, values="q8_0")
    assert [key[:2] for key in kernels_of(after)] == [("query x keys", codec), ("weights x values", "q8_0")]
