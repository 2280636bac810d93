"""The plans of the fused kernels cover all of the work once and respect the limits of the device."""

from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cuda_emulator.emulated import Emulated

# Shared memory that a block may have, and multiprocessors: A100, RTX 3090 and 4090, H100 and H200.
DEVICES = {"sm_80": (166912, 108), "sm_86": (101376, 82), "sm_89": (101376, 128), "sm_90": (232448, 132)}

shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 600),
        "I": st.integers(1, 4000),
        "J": st.integers(1, 200),
        "D": st.integers(1, 32),
        "K": st.integers(1, 40),
        "element": st.sampled_from([2, 4]),
        "tensor_cores": st.booleans(),
        "precomputed": st.booleans(),
        "passes": st.integers(0, 12),
    }
)


@pytest.fixture(scope="module")
def cuda(emulated: Emulated) -> ModuleType:
    """The bindings. Plans are plain host code, the same in the emulated library as in the real one."""
    return emulated.extension


def covers(parts: int, length: int, whole: int) -> bool:
    """Whether `parts` parts of `length`, the last one maybe shorter, cover the whole and none is empty."""
    return (parts - 1) * length < whole <= parts * length


@given(shape=shapes, device=st.sampled_from(sorted(DEVICES)), resident_blocks=st.integers(1, 4))
def test_precomputed_passes(
    cuda: ModuleType, shape: dict[str, int], device: str, resident_blocks: int
) -> None:
    shared, multiprocessors = DEVICES[device]
    shape = {**shape, "precomputed": True}
    plan = cuda.fused_plan(
        False,
        **shape,
        multiprocessors=multiprocessors,
        shared_per_block=shared,
        resident_blocks=resident_blocks,
    )
    assert covers(plan["tiles_b"], 16 * plan["m"] * plan["groups"], shape["B"])
    assert covers(plan["tiles_j"], plan["tile_j"], shape["J"])
    assert covers(plan["splits"], plan["length"], shape["I"])
    assert plan["items"] == plan["tiles_b"] * plan["tiles_j"] * plan["splits"]
    assert 8 * plan["n"] >= shape["D"]
    check_block(plan, shape, shared)
    assert plan["warps"] == plan["tile_j"] * plan["groups"]
    # No more partial sums than blocks that are resident at a time: the workspace does not grow with I.
    assert plan["splits"] <= 8 or plan["items"] <= multiprocessors * resident_blocks


# How the passes multiply: components in a step, quads of W and words of u (csrc/cuda/operands.h).
PRODUCTS = {
    "tf32": {"depth": 8, "w_quads": 2, "u_words": 4},
    "float32": {"depth": 8, "w_quads": 4, "u_words": 4},
    "16 bit": {"depth": 16, "w_quads": 2, "u_words": 4},
    "16 bit, K at most 8": {"depth": 8, "w_quads": 1, "u_words": 2},
}


@given(
    shape=shapes,
    device=st.sampled_from(sorted(DEVICES)),
    products=st.sampled_from(sorted(PRODUCTS)),
    clusters=st.lists(st.integers(0, 132), min_size=3, max_size=3),
)
def test_passes(
    cuda: ModuleType, shape: dict[str, int], device: str, products: str, clusters: list[int]
) -> None:
    shared, multiprocessors = DEVICES[device]
    sizes = {axis: shape[axis] for axis in "BIJDK"}
    if products == "16 bit, K at most 8":
        sizes["K"] = min(sizes["K"], 8)
    how = PRODUCTS[products]
    plan = cuda.pass_plan(
        **sizes,
        **how,
        multiprocessors=multiprocessors,
        shared_per_block=shared,
        clusters=[multiprocessors, *clusters],
    )
    if plan is None:  # W of one input capsule is too large for this device, so the general kernels are used
        assert device in ("sm_86", "sm_89")
        assert min(sizes["D"], sizes["J"]) > 3
        assert sizes["K"] > 16
        return
    warps = plan["groups"] * plan["m_tiles"]
    streams = plan["cluster"] * plan["groups"]  # of input capsules in an item
    resident = [multiprocessors, *clusters][(1, 2, 4, 8).index(plan["cluster"])]
    assert 1 <= warps <= 8
    assert covers(plan["tiles_b"], 16 * plan["m_tiles"], sizes["B"])
    assert covers(plan["tiles_j"], plan["tile_j"], sizes["J"])
    assert covers(plan["splits"], streams * plan["length"], sizes["I"])
    assert plan["items"] == plan["tiles_b"] * plan["tiles_j"] * plan["splits"]
    assert plan["steps"] * how["depth"] >= sizes["K"] > (plan["steps"] - 1) * how["depth"]
    assert resident > 0
    # The workspace does not grow with I.
    assert plan["splits"] <= 8 or plan["items"] <= resident
    tiles = plan["n"] * (16 if plan["n"] == 1 else 5 if plan["n"] == 4 else 8 if plan["few"] else 10)
    assert 8 * plan["n"] >= sizes["D"]
    assert plan["tile_j"] * plan["n"] <= tiles
    words = plan["steps"] * (tiles // 4 * how["w_quads"] * 128 + plan["m_tiles"] * how["u_words"] * 32)
    assert plan["slot_words"] >= words
    assert plan["slot_words"] % 4 == 0
    ring, sums = plan["groups"] * 3 * plan["slot_words"] * 4, warps * tiles * 512
    assert plan["capsules_offset"] >= max(ring, sums)
    assert plan["progress_offset"] >= plan["capsules_offset"] + plan["m_tiles"] * tiles * 512
    assert plan["progress_offset"] + 8 * 36 <= plan["shared"] <= shared


@given(shape=shapes, device=st.sampled_from(sorted(DEVICES)))
def test_gradients(cuda: ModuleType, shape: dict[str, int], device: str) -> None:
    shared, multiprocessors = DEVICES[device]
    plan = cuda.fused_plan(True, **shape, multiprocessors=multiprocessors, shared_per_block=shared)
    assert plan is not None
    assert covers(plan["tiles_b"], 16 * plan["m"], shape["B"])
    assert covers(plan["tiles_j"], plan["tile_j"], shape["J"])
    assert covers(plan["splits"], plan["length"], plan["tiles_b"])
    assert plan["items"] == -(-shape["I"] // plan["chunk"]) * plan["tiles_j"] * plan["splits"]
    check_block(plan, shape, shared)
    assert plan["warps"] <= plan["tile_j"]
    assert plan["slot"] >= 2 * shape["passes"] * 16 * plan["m"]
    assert plan["splits"] == 1 or plan["items"] <= multiprocessors


def check_block(plan: dict[str, int], shape: dict[str, int], shared: int) -> None:
    assert 1 <= plan["warps"] <= 12
    assert 1 <= plan["chunk"] <= 16
    assert plan["shared"] <= shared
    assert plan["stage"] % 16 == 0
    # Whole tiles of a row of predictions, and whole steps of a row of u or W, are read.
    assert plan["stride"] >= 8 * (plan["n"] if shape["precomputed"] else plan["steps"])
    assert 8 * plan["steps"] >= (0 if shape["precomputed"] else shape["K"])
    assert plan["stride"] % 16 == 8  # an odd multiple of 8: rows begin in different banks


@pytest.mark.parametrize(
    ("shape", "gradients"),
    [
        ({"B": 1, "I": 1, "J": 1, "D": 33, "K": 8}, False),
        ({"B": 1, "I": 1, "J": 1, "D": 16, "K": 1025}, False),
        ({"B": 1, "I": 1, "J": 1 << 16, "D": 16, "K": 8}, False),
        ({"B": 1 << 24, "I": 1, "J": 1, "D": 16, "K": 8}, False),
        ({"B": (1 << 24) - 1, "I": 1, "J": (1 << 16) - 1, "D": 16, "K": 8}, False),  # too many items
        ({"B": 1, "I": 1, "J": 1, "D": 16, "K": 8, "passes": 2000}, True),
    ],
)
def test_shapes_for_the_general_kernels(cuda: ModuleType, shape: dict[str, int], gradients: bool) -> None:
    assert (cuda.fused_plan(True, **shape) if gradients else cuda.pass_plan(**shape)) is None


@given(shape=shapes, device=st.sampled_from(sorted(DEVICES)))
def test_smem_cached(cuda: ModuleType, shape: dict[str, int], device: str) -> None:
    shared, multiprocessors = DEVICES[device]
    B, I, J, D = (shape[axis] for axis in "BIJD")  # noqa: E741
    plan = cuda.smem_cached_plan(
        B, I, J, D, shape["element"], shape["passes"], multiprocessors, shared_per_block=shared
    )
    busy = B / (-(-B // multiprocessors) * multiprocessors)
    if plan is None:
        assert shape["passes"] == 0 or J > 10 or busy < 2 / 3 or D > 16
        return
    assert busy >= 2 / 3
    matrix = shape["element"] == 2 and plan["parts"] == 4
    of_set = 16 if matrix else 32 // plan["parts"]
    assert covers(plan["sets"], of_set, I)
    assert 1 <= plan["warps"] <= min(12, plan["sets"])
    assert 4 * plan["parts"] >= D
    assert plan["row"] >= J * 4 * plan["parts"]
    unit = 8 if matrix else 4 * plan["parts"]  # an odd number of them: neighbours begin in different banks
    assert plan["row"] % (2 * unit) == unit
    of_warp = -(-plan["sets"] // plan["warps"])
    assert 1 <= plan["slots"] <= min(8, of_warp)
    assert plan["ring"] >= plan["warps"] * plan["slots"] * of_set * plan["row"] * shape["element"]
    assert plan["ring"] + (plan["warps"] + 2) * J * 16 * plan["parts"] <= plan["shared"] <= shared


def test_half_of_the_predictions_of_a_capsule_network_stay_on_an_h200(cuda: ModuleType) -> None:
    plan = cuda.smem_cached_plan(128, 1152, 10, 16, element=2)
    assert plan["warps"] * plan["slots"] >= plan["sets"] / 2


def test_a_capsule_network_fills_an_h200(cuda: ModuleType) -> None:
    """MNIST's capsule layer: B = 128, I = 1152, J = 10, D = 16, K = 8."""
    passes = cuda.pass_plan(128, 1152, 10, 16, 8)
    assert passes["items"] * passes["cluster"] >= 0.95 * 132
    assert passes["splits"] <= 4  # the partial sums are 4 times the size of the output capsules
    gradients = cuda.fused_plan(True, 128, 1152, 10, 16, 8)
    assert gradients["items"] >= 0.95 * 132
    assert gradients["splits"] == gradients["tiles_j"] == 1  # no parts to sum afterwards


def test_many_output_capsules_fill_an_h200(cuda: ModuleType) -> None:
    """I = 3872, J = 196: with tiles of j and splits of i, the last round of blocks is not half empty."""
    plan = cuda.pass_plan(128, 3872, 196, 16, 8)
    blocks = plan["items"] * plan["cluster"]
    assert blocks >= 0.75 * 132 * -(-blocks // 132)
