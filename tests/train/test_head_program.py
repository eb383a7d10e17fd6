"""What the vocabulary projection compiles to: no logits of all tokens, little traffic in loops.

T tokens, c tokens of a chunk, D model, V vocabulary, k vocabulary shards. The sizes are pairwise
distinct, so that a dimension says what it is.
"""

import re
from math import prod

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from medreason_jax.collectives import collective_sizes, loops_of
from medreason_jax.mesh import TokenShards, batch_sharding
from medreason_jax.train.head import token_loss, token_scores
from tests.tiny import some_mesh

V, D, T, CHUNK = 151_936, 896, 4_160, 416


def naive_scores(h_BTD, W_VD, labels_BT, **_):
    """All logits at once."""
    logits_BTV = jnp.einsum("btd,vd->btv", h_BTD, W_VD.astype(h_BTD.dtype)).astype(jnp.float32)
    return jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), labels_BT[..., None], -1)


def partitioned_scan(h_BTD, W_VD, labels_BT, **_):
    """Chunks of a scan that the partitioner splits: it gathers W in every iteration."""
    chunks = h_BTD.shape[1] // 52
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], chunks, 52, *x.shape[2:]), 1, 0)  # noqa: E731
    body = jax.checkpoint(lambda _, xs: (None, naive_scores(xs[0], W_VD, xs[1])))
    return jax.lax.scan(body, None, (split(h_BTD), split(labels_BT)))[1]


def real_scores(h_BTD, W_VD, labels_BT, mesh):
    shards = TokenShards(mesh)
    return token_scores(h_BTD, W_VD, labels_BT, shards=shards, chunk=CHUNK).logp


def real_loss(h_BTD, W_VD, labels_BT, mesh):
    loss_of = lambda scores, fields: -scores.logp * fields  # noqa: E731
    options = {"shards": TokenShards(mesh), "chunk": CHUNK}
    return token_loss(h_BTD, W_VD, labels_BT, loss_of, jnp.ones(labels_BT.shape), **options)[0]


def traced(scores, mesh_shape, rows: int, length: int, argnums=(0, 1)):
    """The traced gradient of the mean log-probability, or of the loss, in h and W."""
    mesh = some_mesh(mesh_shape)
    place = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    arguments = (
        jax.ShapeDtypeStruct((rows, length, D), jnp.bfloat16, sharding=batch_sharding(mesh)),
        jax.ShapeDtypeStruct((V, D), jnp.float32, sharding=place),
        jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh)),
    )
    mean = lambda h, W, labels: jnp.mean(scores(h, W, labels, mesh=mesh))  # noqa: E731
    places = (None, place)[: len(argnums)]
    return jax.jit(jax.grad(mean, argnums), out_shardings=places).trace(*arguments)


def jaxpr_shapes(jaxpr):
    """Of every value of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for var in (*equation.invars, *equation.outvars):
            yield tuple(var.aval.shape)
        for inner in jaxprs_in_params(equation.params):
            yield from jaxpr_shapes(inner)


def program_shapes(text: str):
    for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text):
        yield tuple(int(size) for size in dims.split(","))


def too_large(shapes, shards: int) -> set[tuple[int, ...]]:
    """Shapes with a vocabulary axis, whole or one device's, and more than one chunk beside it."""
    found = set()
    for shape in set(shapes):
        for size in {V, V // shards} & set(shape):
            others = sorted(n for n in shape if n not in (1, size))
            if prod(others) > CHUNK and others != [D]:
                found.add(shape)
    return found


def temporary_bytes(scores, length: int) -> int:
    compiled = traced(scores, (1, 1, 2), 1, length).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes


def holds_no_logits(scores) -> bool:
    found = traced(scores, (1, 1, 2), 1, T)
    shapes = {*jaxpr_shapes(found.jaxpr.jaxpr)}
    shapes |= {*program_shapes(found.lower().compile().as_text())}
    assert any(V // 2 in shape for shape in shapes)
    return not too_large(shapes, 2)


def grows_slowly(scores) -> bool:
    return temporary_bytes(scores, 2 * T) - temporary_bytes(scores, T) < T * (V // 2)


@pytest.mark.parametrize("check", [holds_no_logits, grows_slowly])
def test_no_array_has_all_tokens_and_the_vocabulary(check):
    assert check(real_scores) and check(real_loss)
    assert not check(naive_scores)


def products(scores, argnums) -> int:
    """Matrix products of a chunk."""
    text = traced(scores, (1, 1, 1), 1, T, argnums).lower().compile().as_text()
    return len(re.findall(r" dot\(|custom-call\(.*matmul", text))


def test_a_loss_by_token_makes_its_logits_once():
    """Logits and two gradients: 6 M V D in place of 8; a frozen W has no gradient."""
    assert products(real_loss, (0, 1)) == 3 and products(real_scores, (0, 1)) == 4
    assert products(real_loss, (0,)) == 2


def largest_in_loops(scores) -> int:
    """Bytes of the largest collective inside a loop."""
    text = traced(scores, (2, 2, 2), 8, T // 8).lower().compile().as_text()
    loops = loops_of(text)
    sizes = [
        size for instruction, _, size in collective_sizes(text) if loops[instruction.computation][1]
    ]
    assert sizes, "there are always the sums over the vocabulary's shards"
    return max(sizes)


def test_a_loop_moves_at_most_one_chunk_of_hidden_states():
    one_chunk = CHUNK * D * 4  # float32
    assert largest_in_loops(real_scores) <= one_chunk
    assert largest_in_loops(real_loss) <= one_chunk
    assert largest_in_loops(partitioned_scan) > one_chunk
