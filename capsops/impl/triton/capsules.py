"""Tiles of capsules in registers: loading, predictions, softmax over j. What the kernels of all ops share.

A tile is [rows, JP, DP]: rows are samples or input capsules, JP output capsules, DP their components. Its sizes
are powers of two; as J mostly is not one, a tile that holds all j comes in one or two parts, PARTS: 10 output
capsules are 8 and 2. A tuple of such parts is what these functions take and return.

EXACT says that the parts are J capsules of exactly DP components. Prefixes: b_ a tile, p_ a pointer, m_ a mask.
"""

import triton
import triton.language as tl


@triton.jit
def load_capsules(
    p, rows, m_rows, first, J: tl.constexpr, D: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Capsules first … first + JP of the rows that begin at `rows`, in float32, 0 where there is none."""
    j = first + tl.arange(0, JP)
    d = tl.arange(0, DP)
    mask = m_rows[:, None, None]
    if not EXACT:
        mask = mask & (j < J)[None, :, None] & (d < D)[None, None, :]
    p = p + rows[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_capsules(
    p, b_x, rows, m_rows, first, J: tl.constexpr, D: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    j = first + tl.arange(0, JP)
    d = tl.arange(0, DP)
    mask = m_rows[:, None, None]
    if not EXACT:
        mask = mask & (j < J)[None, :, None] & (d < D)[None, None, :]
    p = p + rows[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
    tl.store(p, b_x.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_parts(
    p, rows, m_rows, first, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    tiles = ()
    for n in tl.static_range(len(PARTS)):
        tiles = tiles + (load_capsules(p, rows, m_rows, first, J, D, PARTS[n], DP, EXACT),)
        first += PARTS[n]
    return tiles


@triton.jit
def store_parts(
    p, tiles, rows, m_rows, first, J: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    for n in tl.static_range(len(PARTS)):
        store_capsules(p, tiles[n], rows, m_rows, first, J, D, PARTS[n], DP, EXACT)
        first += PARTS[n]


@triton.jit
def _zeros(R: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr):
    return tl.zeros([R, JP, DP], tl.float32)


@triton.jit
def zero_parts(R: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr):
    tiles = ()
    for n in tl.static_range(len(PARTS)):
        tiles = tiles + (_zeros(R, PARTS[n], DP),)
    return tiles


@triton.jit
def load_inputs(p_u, rows, m_rows, K: tl.constexpr, KP: tl.constexpr):
    """Input capsules [rows, KP] that begin at `rows`, 0 beyond K."""
    k = tl.arange(0, KP)
    mask = m_rows[:, None]
    if KP != K:
        mask = mask & (k < K)[None, :]
    return tl.load(p_u + rows[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
def load_weights(
    p_w, first, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
    KP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """W_ij of one i, whose matrices begin at p_w, for j = first … first + JP: [JP · DP, KP]."""
    n = tl.arange(0, JP * DP)
    k = tl.arange(0, KP)
    if EXACT:
        p = p_w + (first * D + n)[:, None] * K + k[None, :]
        if KP == K:
            return tl.load(p)
        else:
            return tl.load(p, mask=(k < K)[None, :], other=0.0)
    else:
        j = first + n // DP
        d = n % DP
        mask = ((j < J) & (d < D))[:, None] & (k < K)[None, :]
        return tl.load(p_w + (j * D + d)[:, None] * K + k[None, :], mask=mask, other=0.0)


@triton.jit
def load_weight_parts(
    p_w, first, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tiles = ()
    for n in tl.static_range(len(PARTS)):
        tiles = tiles + (load_weights(p_w, first, J, D, K, PARTS[n], DP, KP, EXACT),)
        first += PARTS[n]
    return tiles


@triton.jit
def store_weights(
    p_w, b_w, first, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    n = tl.arange(0, JP * DP)
    k = tl.arange(0, KP)
    j = first + n // DP
    d = n % DP
    mask = ((j < J) & (d < D))[:, None] & (k < K)[None, :]
    tl.store(p_w + (j * D + d)[:, None] * K + k[None, :], b_w.to(p_w.dtype.element_ty), mask=mask)


@triton.jit
def store_weight_parts(
    p_w, tiles, first, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, DP: tl.constexpr,
    KP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    for n in tl.static_range(len(PARTS)):
        store_weights(p_w, tiles[n], first, J, D, K, PARTS[n], DP, KP)
        first += PARTS[n]


@triton.jit
def product(b_x, b_y, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """b_x @ b_y summed in float32. WIDE: operands as float32 (the interpreter's 16-bit products are wrong)."""
    if WIDE:
        b_x = b_x.to(tl.float32)
        b_y = b_y.to(tl.float32)
    return tl.dot(b_x, b_y, input_precision=PRECISION)


@triton.jit
def _prediction(
    b_u, b_w, R: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    return tl.reshape(product(b_u, tl.trans(b_w), PRECISION, WIDE), [R, JP, DP])


@triton.jit
def predict(
    b_u, weights, R: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """û [R, JP, DP] in parts, of inputs [R, KP] and the parts of W."""
    tiles = ()
    for n in tl.static_range(len(PARTS)):
        tiles = tiles + (_prediction(b_u, weights[n], R, PARTS[n], DP, PRECISION, WIDE),)
    return tiles


@triton.jit
def _zero_weights(JP: tl.constexpr, DP: tl.constexpr, KP: tl.constexpr):
    return tl.zeros([JP * DP, KP], tl.float32)


@triton.jit
def zero_weight_parts(DP: tl.constexpr, KP: tl.constexpr, PARTS: tl.constexpr):
    tiles = ()
    for n in tl.static_range(len(PARTS)):
        tiles = tiles + (_zero_weights(PARTS[n], DP, KP),)
    return tiles


@triton.jit
def _flat(b_x, R: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr):
    return tl.reshape(b_x, [R, JP * DP])


@triton.jit
def input_gradient(
    grads, weights, R: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """∂u = Σ_j Wᵀ ∂û [R, KP]."""
    x = _flat(grads[0], R, PARTS[0], DP).to(weights[0].dtype)
    found = product(x, weights[0], PRECISION, WIDE)
    for n in tl.static_range(1, len(PARTS)):
        x = _flat(grads[n], R, PARTS[n], DP).to(weights[n].dtype)
        found += product(x, weights[n], PRECISION, WIDE)
    return found


@triton.jit
def weight_gradient(
    sums, grads, b_u, R: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """sums + Σ_b ∂û uᵀ [JP · DP, KP] of each part."""
    found = ()
    for n in tl.static_range(len(PARTS)):
        x = tl.trans(_flat(grads[n], R, PARTS[n], DP)).to(b_u.dtype)
        found = found + (sums[n] + product(x, b_u, PRECISION, WIDE),)
    return found


@triton.jit
def _prediction_by_columns(
    p_u, p_w, m_rows, first, J: tl.constexpr, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    JP: tl.constexpr, DP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    j = first + tl.arange(0, JP)
    d = tl.arange(0, DP)
    p_w = p_w + (j * D)[:, None] * K + (d * K)[None, :]
    m_w = (j < J)[:, None] & (d < D)[None, :]
    tile = tl.zeros([R, JP, DP], tl.float32)
    for k in range(K):
        b_u = tl.load(p_u + k, mask=m_rows, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + k, mask=m_w, other=0.0).to(tl.float32)
        tile += b_u[:, None, None] * b_w[None, :, :]
    return tile


@triton.jit
def dots(xs, ys):
    """Σ_d x y: [R, JP] of each part."""
    sums = ()
    for n in tl.static_range(len(xs)):
        sums = sums + (tl.sum(xs[n] * ys[n], 2),)
    return sums


@triton.jit
def _hide_absent(b_b, first, J: tl.constexpr, JP: tl.constexpr):
    j = first + tl.arange(0, JP)
    return tl.where((j < J)[None, :], b_b, -float("inf"))


@triton.jit
def logits(u_hats, vs, first, J: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr):
    """û · V [R, JP] of each part, −∞ for a j that is not."""
    found = ()
    sums = dots(u_hats, vs)
    for n in tl.static_range(len(PARTS)):
        if EXACT:
            found = found + (sums[n],)
        else:
            found = found + (_hide_absent(sums[n], first, J, PARTS[n]),)
        first += PARTS[n]
    return found


@triton.jit
def _power(z):
    """eᶻ for z ≤ 0, 0 where that is no normal float32 number, on every device."""
    return tl.where(z < -87.0, 0.0, tl.exp(z))


@triton.jit
def largest(bs, LEAKY: tl.constexpr):
    """The largest logit [R]."""
    top = tl.max(bs[0], 1)
    for n in tl.static_range(1, len(bs)):
        top = tl.maximum(top, tl.max(bs[n], 1))
    if LEAKY:
        top = tl.maximum(top, 0.0)
    return top


@triton.jit
def powers(bs, top):
    """exp(b − top) of each part."""
    found = ()
    for n in tl.static_range(len(bs)):
        found = found + (_power(bs[n] - top[:, None]),)
    return found


@triton.jit
def total(xs):
    """Σ_j x [R] over all parts."""
    found = tl.sum(xs[0], 1)
    for n in tl.static_range(1, len(xs)):
        found += tl.sum(xs[n], 1)
    return found


@triton.jit
def softmax(bs, LEAKY: tl.constexpr):
    """Couplings c [R, JP] of each part. LEAKY: one more logit, 0, takes part."""
    top = largest(bs, LEAKY)
    es = powers(bs, top)
    z = total(es)
    if LEAKY:
        z += _power(-top)
    return scaled(es, 1.0 / z)


@triton.jit
def scaled(xs, factor):
    """x · factor, factor [R]."""
    found = ()
    for n in tl.static_range(len(xs)):
        found = found + (xs[n] * factor[:, None],)
    return found


@triton.jit
def scaled_capsules(xs, factor):
    """x · factor, one number for all."""
    found = ()
    for n in tl.static_range(len(xs)):
        found = found + (xs[n] * factor,)
    return found


@triton.jit
def products(xs, ys):
    found = ()
    for n in tl.static_range(len(xs)):
        found = found + (xs[n] * ys[n],)
    return found


@triton.jit
def weighted(sums, cs, xs):
    """sums + c x, c [R, JP], x [R, JP, DP]."""
    found = ()
    for n in tl.static_range(len(xs)):
        found = found + (sums[n] + cs[n][:, :, None] * xs[n],)
    return found


@triton.jit
def logit_gradients(cs, agreements, mean):
    """∂b = c (a − Σ_j c a); mean is that sum [R]."""
    found = ()
    for n in tl.static_range(len(cs)):
        found = found + (cs[n] * (agreements[n] - mean[:, None]),)
    return found
