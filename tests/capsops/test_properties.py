"""Random shapes, memory layouts, dtypes and options from hypothesis, against the reference in float64."""

from functools import partial

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import capsops
from capsops import reference
from tests.capsops.cases import LAYOUTS, LOW_PRECISION, Options, Shape, layer_inputs, value_and_gradients
from tests.capsops.compare import assert_all_close, assert_close

COMMON = settings(derandomize=True, deadline=None, max_examples=60)

shapes = st.builds(
    Shape,
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 14),
    st.integers(1, 34),
    st.integers(1, 34),
)
options = st.builds(Options, st.integers(0, 4), st.booleans(), st.booleans(), st.booleans())
layouts = st.sampled_from([None, *LAYOUTS])
dtypes = st.sampled_from([torch.float64, *LOW_PRECISION])
seeds = st.integers(0, 2**31 - 1)


def arranged(x: Tensor | None, layout: str | None) -> Tensor | None:
    return x if x is None or layout is None or x.numel() == 0 else LAYOUTS[layout](x)


@COMMON
@given(shape=shapes, options=options, layouts=st.tuples(layouts, layouts, layouts, layouts), seed=seeds)
def test_layer(impl: str, shape: Shape, options: Options, layouts: tuple[str | None, ...], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [
        arranged(x, layout) for x, layout in zip(layer_inputs(shape, options.bias), layouts, strict=False)
    ]
    upstream = arranged(torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64), layouts[3])
    keywords = options.keywords()
    assert_all_close(
        value_and_gradients(partial(capsops.capsule_routing, impl=impl, **keywords), inputs, upstream),
        value_and_gradients(partial(reference.capsule_routing, **keywords), inputs, upstream),
        tolerance=1e-11,
    )


@COMMON
@given(shape=shapes, options=options, layouts=st.tuples(layouts, layouts, layouts), seed=seeds)
def test_routing(
    impl: str, shape: Shape, options: Options, layouts: tuple[str | None, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    u_hat = arranged(torch.randn(shape[:4], dtype=torch.float64), layouts[0])
    bias = arranged(torch.randn(shape.J, shape.D, dtype=torch.float64), layouts[1]) if options.bias else None
    upstream = arranged(torch.randn(shape.B, shape.J, shape.D, dtype=torch.float64), layouts[2])
    keywords = options.keywords()
    assert_all_close(
        value_and_gradients(partial(capsops.dynamic_routing, impl=impl, **keywords), [u_hat, bias], upstream),
        value_and_gradients(partial(reference.dynamic_routing, **keywords), [u_hat, bias], upstream),
        tolerance=1e-11,
    )


@COMMON
@given(
    shape=st.lists(st.integers(0, 20), min_size=1, max_size=4).map(tuple),
    axis=st.integers(0, 3),
    layout=layouts,
    dtype=dtypes,
    exponent=st.integers(-12, 4),
    seed=seeds,
)
def test_squash(
    impl: str,
    shape: tuple[int, ...],
    axis: int,
    layout: str | None,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    dim = axis % len(shape)
    s = arranged((torch.randn(shape, dtype=torch.float64) * 2.0**exponent).to(dtype), layout)
    got = value_and_gradients(partial(capsops.squash, dim=dim, impl=impl), [s], torch.ones_like)
    want = value_and_gradients(partial(reference.squash, dim=dim), [s.double()], torch.ones_like)
    for name, tensor in want.items():
        assert got[name].dtype == dtype
        assert_close(
            got[name].double(), tensor, name, tolerance=16 * torch.finfo(dtype).eps, floor=2.0**exponent
        )


@COMMON
@given(shape=shapes, options=options, dtype=dtypes, seed=seeds)
def test_couplings_and_lengths(
    impl: str, shape: Shape, options: Options, dtype: torch.dtype, seed: int
) -> None:
    """Couplings are in [0, 1] and sum to 1 (to less with an orphan class); capsules are shorter than 1."""
    torch.manual_seed(seed)
    inputs = layer_inputs(shape, options.bias, dtype)
    keywords = {"iterations": options.iterations, "leaky": options.leaky, "impl": impl}
    c = capsops.couplings(*inputs, **keywords).double()
    v = capsops.capsule_routing(*inputs, **keywords).double()
    slack = shape.J * torch.finfo(dtype).eps
    assert ((c >= 0) & (c <= 1)).all()
    if options.iterations == 0:
        assert (c == 1).all()
    elif options.leaky:
        assert (c.sum(-1) < 1 + slack).all()
    else:
        assert ((c.sum(-1) - 1).abs() <= slack).all()
    assert (v.norm(dim=-1) < 1 + 4 * torch.finfo(dtype).eps).all()
