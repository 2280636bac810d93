"""For which calls kernels are proved."""

import json

import pytest

from capsops.backends.backend import ALL_OPTIONS, LOGITS, MASK, SHARED
from capsops.proofs.scope import NOTHING, Scope, every_op

OP = "capsule_routing", "float32"


@pytest.mark.parametrize(
    ("proved", "used", "covered"),
    [
        ((), (), True),
        ((), (LOGITS,), False),
        ((LOGITS,), (), True),
        ((LOGITS,), (LOGITS,), True),
        ((LOGITS,), (MASK,), False),
        ((LOGITS, MASK), (MASK,), True),
        ((LOGITS, MASK), (LOGITS, MASK, SHARED), False),
        (ALL_OPTIONS, ALL_OPTIONS, True),
    ],
)
def test_options(proved: tuple[str, ...], used: tuple[str, ...], covered: bool) -> None:
    scope = Scope(every_op(proved), longest=(32, 64))
    assert scope.covers(*OP, (16, 8), frozenset(used)) == covered
    assert scope.covers(*OP, (), frozenset(used)) == covered
    assert not scope.covers(*OP, (33, 8), frozenset(used))


def test_ops_and_dtypes() -> None:
    scope = Scope(frozenset({(*OP, "")}))
    assert scope.covers(*OP)
    assert scope.covers("capsule_routing_backward", "float32"), "a gradient is proved with its op"
    assert not scope.covers("capsule_routing", "bfloat16")
    assert not scope.covers("squash", "float32")
    assert not NOTHING.covers(*OP)


def test_what_two_scopes_cover() -> None:
    one, two = Scope(every_op((MASK,)), (32, 16), 4), Scope(every_op((LOGITS,)), (16, 64), 6)
    assert one & two == Scope(every_op(), (16, 16), 12)
    assert one & Scope(every_op()) == Scope(every_op(), (32, 16), 4)
    assert one & NOTHING == Scope(frozenset(), (32, 16), 4)
    for scope in (one, two, NOTHING):
        assert Scope.from_json(json.loads(json.dumps(scope.to_json()))) == scope
