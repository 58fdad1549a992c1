"""Kernels of `dynamic_depthwise_conv2d` for kernel sides up to 7, not dilated.

Mapping. One thread walks down a strip of the plane, COLUMNS wide: in NCHW the columns are one
16-byte vector of one channel; in channels-last the thread owns VECTOR adjacent channels, and a warp
spans 32*VECTOR of them. A program is a block of strips of one plane, or of one block of channels.
The taps and the sums of the kh output rows that are under way stay in registers as fp32. Each step
loads ROWS rows with their kw - 1 halo columns, once, and adds them to every output row they touch;
the oldest row is then complete and leaves. Between strips the halo is re-read through L1: kw - 1
columns and, at each strip's head, kh - 1 rows.

Backward walks over grad_output in the same manner, with the input's rows beside it. One halo of
grad_output serves grad_input (flipped taps) and grad_weight (times the strip's own input), so the
input needs none. Each thread carries its kh*kw sums of grad_weight down the strip, and the program
adds them up in a tree.
"""

import triton
import triton.language as tl

RUNTIME = [  # sizes and strides: a new value asks for no new compilation
    *("channels", "height", "width", "output_height", "output_width"),
    *("pad_top", "pad_left", "dilation_h", "dilation_w", "tiles", "steps"),
    *("input_batch", "input_channel", "input_row", "input_column"),
    *("output_batch", "output_channel", "output_row", "output_column"),
    *("grad_batch", "grad_channel", "grad_row", "grad_column"),
    *("per_sample_weight", "per_sample_bias"),
]


@triton.jit
def program(channels, tiles, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Batch item, first channel and tile of this program."""
    index = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    if CHANNELS_LAST:  # programs that run together read all channels of the same pixels
        block = index % blocks
        tile = index // blocks % tiles
    else:
        tile = index % tiles
        block = index // tiles % blocks
    return (index // (tiles * blocks)).to(tl.int64), block * BLOCK_CHANNELS, tile


@triton.jit
def _channels(
    channel, channels,
    VECTOR: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """A block of channels from `channel` on, how many there are, and which exist.

    In channels-last [1, C]; in NCHW a thread has one.
    """
    present = True
    if CHANNELS_LAST:
        channels = channels // VECTOR * VECTOR
        channel = channel + tl.arange(0, BLOCK_CHANNELS)[None, :]
        present = channel < channels
    return channel, channels, present


@triton.jit
def inside_of(position, size):
    # A negative position wraps to a large one: one comparison instead of two.
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _strips(
    tile, width, strip_height,
    COLUMNS: tl.constexpr, BLOCK_STRIPS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Upper left pixels (y, x) of a tile's strips: [S], or [S, 1] in channels-last."""
    strip = tile * BLOCK_STRIPS + tl.arange(0, BLOCK_STRIPS)
    if CHANNELS_LAST:
        strip = strip[:, None]
    across = tl.cdiv(width, COLUMNS)
    return strip // across * strip_height, strip % across * COLUMNS


@triton.jit
def _pointers(
    tensor, batch, channel, y, x,
    batch_stride, channel_stride, row_stride, column_stride,
    VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Pointers to pixels (y, x): [S], or [S, C] in channels-last."""
    offset = batch * batch_stride + y.to(tl.int64) * row_stride
    if CHANNELS_LAST:
        pointers = tensor + (offset + x.to(tl.int64) * column_stride) * VECTOR + channel
    else:
        pointers = tensor + (offset + channel.to(tl.int64) * channel_stride) * VECTOR + x
    return pointers


@triton.jit
def _load_taps(
    weight, batch, channel, present, channels, per_sample,
    SHAPE: tl.constexpr, KK: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """A kernel set as a tuple of fp32: scalars, or [S, C] in channels-last."""
    weight += batch * per_sample * KK * channels
    if CHANNELS_LAST:  # weight is [B, kh*kw, C]
        pointers = tl.broadcast_to(weight + channel, SHAPE)
        step = channels
    else:  # [B, C, kh*kw]
        pointers = weight + channel * KK
        step = 1
    taps = ()
    for tap in tl.static_range(KK):
        value = tl.load(pointers + tap * step, mask=present, other=0)
        taps = taps + (value.to(tl.float32),)
    return taps


@triton.jit
def _columns(tile, COLUMNS: tl.constexpr):
    """[S, COLUMNS] as a tuple of [S]. No data moves: a thread owns all columns of its strip."""
    if COLUMNS == 1:
        columns = (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], COLUMNS // 2, 2]))
        evens = _columns(even, COLUMNS // 2)
        odds = _columns(odd, COLUMNS // 2)
        columns = ()
        for m in tl.static_range(COLUMNS // 2):
            columns = columns + (evens[m], odds[m])
    return columns


@triton.jit
def _tile(columns, COLUMNS: tl.constexpr):
    """The inverse of `_columns`."""
    if COLUMNS == 1:
        tile = columns[0][:, None]
    else:
        evens = _tile(columns[0::2], COLUMNS // 2)
        odds = _tile(columns[1::2], COLUMNS // 2)
        tile = tl.reshape(tl.join(evens, odds), [columns[0].shape[0], COLUMNS])
    return tile


@triton.jit
def _load_row(
    pointers, mask, x, width, column_stride, left,
    K: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Columns x - left to x - left + COLUMNS + K - 2 of a row, as fp32; `pointers` are at x."""
    row = ()
    if CHANNELS_LAST or COLUMNS == 1:
        for m in tl.static_range(COLUMNS + K - 1):
            inside = mask & inside_of(x + (m - left), width)
            step = (m - left) * column_stride.to(tl.int64) * VECTOR
            value = tl.load(pointers + step, mask=inside, other=0)
            row = row + (value.to(tl.float32),)
    else:
        for m in tl.static_range(left):
            inside = mask & (x >= left - m)
            row = row + (tl.load(pointers + (m - left), mask=inside, other=0).to(tl.float32),)
        columns = tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(pointers[:, None] + columns, mask=mask[:, None], other=0)
        row = row + _columns(tile.to(tl.float32), COLUMNS)
        for m in tl.static_range(COLUMNS, COLUMNS + K - 1 - left):
            inside = mask & (x + m < width)
            row = row + (tl.load(pointers + m, mask=inside, other=0).to(tl.float32),)
    return row


@triton.jit
def _store_row(
    pointers, mask, x, width, column_stride, row,
    COLUMNS: tl.constexpr, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    if CHANNELS_LAST or COLUMNS == 1:
        for m in tl.static_range(COLUMNS):
            step = m * column_stride.to(tl.int64) * VECTOR
            tl.store(pointers + step, row[m], mask=mask & (x + m < width))
    else:
        columns = tl.arange(0, COLUMNS)[None, :]
        tl.store(pointers[:, None] + columns, _tile(row, COLUMNS), mask=mask[:, None])


@triton.jit(do_not_specialize=RUNTIME)
def forward_strips(
    input, weight, bias, output,
    channels, height, width, output_height, output_width, pad_top, pad_left, tiles, steps,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight, per_sample_bias,
    KH: tl.constexpr, KW: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    SHAPE: tl.constexpr = [BLOCK_STRIPS, BLOCK_CHANNELS] if CHANNELS_LAST else [BLOCK_STRIPS]
    batch, channel, tile = program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    channel, channels, present = _channels(channel, channels, VECTOR, BLOCK_CHANNELS, CHANNELS_LAST)
    if SAME:
        top: tl.constexpr = (KH - 1) // 2
        left: tl.constexpr = (KW - 1) // 2
    else:
        top = pad_top
        left = pad_left
    strip_height = steps * ROWS - (KH - 1)
    y, x = _strips(tile, output_width, strip_height, COLUMNS, BLOCK_STRIPS, CHANNELS_LAST)
    valid = (y < output_height) & present
    source = _pointers(
        input, batch, channel, y - top, x, input_batch, input_channel, input_row, input_column,
        VECTOR, CHANNELS_LAST,
    )  # fmt: skip
    target = _pointers(
        output, batch, channel, y - (KH - 1), x,
        output_batch, output_channel, output_row, output_column, VECTOR, CHANNELS_LAST,
    )  # fmt: skip

    taps = _load_taps(
        weight, batch, channel, present, channels, per_sample_weight, SHAPE, KH * KW, CHANNELS_LAST
    )
    start = tl.zeros(SHAPE, tl.float32)
    if bias is not None:  # a tap without an input
        start += _load_taps(
            bias, batch, channel, present, channels, per_sample_bias, SHAPE, 1, CHANNELS_LAST
        )[0]
    # Of output rows y + first - (KH - 1) + q, q = 0 ... KH - 1, at the head of each step.
    sums = (start,) * (KH * COLUMNS)
    for step in range(steps):
        first = step * ROWS
        rows = ()
        for r in tl.static_range(ROWS):
            inside = valid & inside_of(y - top + (first + r), height)
            row = _load_row(
                source + (first + r) * input_row.to(tl.int64) * VECTOR, inside, x, width,
                input_column, left, KW, COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            rows = rows + (row,)
        for r in tl.static_range(ROWS):
            previous = sums
            sums = ()
            for q in tl.static_range(KH):
                for m in tl.static_range(COLUMNS):
                    total = previous[q * COLUMNS + m]
                    for j in tl.static_range(KW):
                        total = tl.fma(taps[(KH - 1 - q) * KW + j], rows[r][m + j], total)
                    sums = sums + (total,)
            complete = y + (first + r - (KH - 1))
            inside = valid & (complete >= y) & (complete < output_height)
            _store_row(
                target + (first + r) * output_row.to(tl.int64) * VECTOR, inside, x, output_width,
                output_column, sums[:COLUMNS], COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            sums = sums[COLUMNS:] + (start,) * COLUMNS


@triton.jit(do_not_specialize=RUNTIME)
def backward_strips(
    grad_output, input, weight, grad_input, weight_sums, bias_sums,
    channels, height, width, output_height, output_width, pad_top, pad_left, tiles, steps,
    grad_batch, grad_channel, grad_row, grad_column,
    input_batch, input_channel, input_row, input_column,
    output_batch, output_channel, output_row, output_column,
    per_sample_weight,
    KH: tl.constexpr, KW: tl.constexpr, SAME: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_STRIPS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    SHAPE: tl.constexpr = [BLOCK_STRIPS, BLOCK_CHANNELS] if CHANNELS_LAST else [BLOCK_STRIPS]
    batch, channel, tile = program(channels, tiles, BLOCK_CHANNELS, CHANNELS_LAST)
    channel, channels, present = _channels(channel, channels, VECTOR, BLOCK_CHANNELS, CHANNELS_LAST)
    # The padding of the flipped kernel, which leads from grad_output to grad_input.
    if SAME:
        top: tl.constexpr = KH // 2
        left: tl.constexpr = KW // 2
    else:
        top = KH - 1 - pad_top
        left = KW - 1 - pad_left
    strip_height = steps * ROWS - (KH - 1)
    y, x = _strips(tile, width, strip_height, COLUMNS, BLOCK_STRIPS, CHANNELS_LAST)
    valid = (y < height) & present
    end = tl.minimum(y + strip_height, height)
    source = _pointers(
        grad_output, batch, channel, y - top, x, grad_batch, grad_channel, grad_row, grad_column,
        VECTOR, CHANNELS_LAST,
    )  # fmt: skip

    zero = tl.zeros(SHAPE, tl.float32)
    if grad_input is not None:
        taps = _load_taps(
            weight, batch, channel, present, channels, per_sample_weight,
            SHAPE, KH * KW, CHANNELS_LAST,
        )  # fmt: skip
        target = _pointers(
            grad_input, batch, channel, y - (KH - 1), x,
            output_batch, output_channel, output_row, output_column, VECTOR, CHANNELS_LAST,
        )  # fmt: skip
        # Of input rows y + first - (KH - 1) + q, q = 0 ... KH - 1, at the head of each step.
        sums = (zero,) * (KH * COLUMNS)
    if weight_sums is not None:
        center = _pointers(
            input, batch, channel, y, x, input_batch, input_channel, input_row, input_column,
            VECTOR, CHANNELS_LAST,
        )  # fmt: skip
        # The same rows of the input itself, the last yet to be loaded.
        window = (zero,) * ((KH - 1) * COLUMNS)
        tap_sums = (zero,) * (KH * KW)
    if bias_sums is not None:
        bias_sum = zero

    for step in range(steps):
        first = step * ROWS
        rows = ()
        inputs = ()
        for r in tl.static_range(ROWS):
            inside = valid & inside_of(y - top + (first + r), output_height)
            row = _load_row(
                source + (first + r) * grad_row.to(tl.int64) * VECTOR, inside, x, output_width,
                grad_column, left, KW, COLUMNS, VECTOR, CHANNELS_LAST,
            )  # fmt: skip
            rows = rows + (row,)
            if weight_sums is not None:
                inside = valid & (y + (first + r) < end)
                row = _load_row(
                    center + (first + r) * input_row.to(tl.int64) * VECTOR, inside, x, width,
                    input_column, 0, 1, COLUMNS, VECTOR, CHANNELS_LAST,
                )  # fmt: skip
                inputs = inputs + (row,)
        for r in tl.static_range(ROWS):
            row = rows[r]
            if grad_input is not None:
                previous = sums
                sums = ()
                for i in tl.static_range(KH):
                    for m in tl.static_range(COLUMNS):
                        total = previous[i * COLUMNS + m]
                        for j in tl.static_range(KW):
                            total = tl.fma(taps[(i + 1) * KW - 1 - j], row[m + j], total)
                        sums = sums + (total,)
                complete = y + (first + r - (KH - 1))
                inside = valid & (complete >= y) & (complete < end)
                _store_row(
                    target + (first + r) * output_row.to(tl.int64) * VECTOR, inside, x, width,
                    output_column, sums[:COLUMNS], COLUMNS, VECTOR, CHANNELS_LAST,
                )  # fmt: skip
                sums = sums[COLUMNS:] + (zero,) * COLUMNS
            if weight_sums is not None:
                window = window + inputs[r]
                previous = tap_sums
                tap_sums = ()
                for i in tl.static_range(KH):
                    for j in tl.static_range(KW):
                        total = previous[i * KW + j]
                        for m in tl.static_range(COLUMNS):
                            total = tl.fma(window[i * COLUMNS + m], row[m + KW - 1 - j], total)
                        tap_sums = tap_sums + (total,)
                window = window[COLUMNS:]
            if bias_sums is not None:  # SAME: the strip's own columns begin at KW // 2
                total = row[KW // 2]
                for m in tl.static_range(1, COLUMNS):
                    total += row[KW // 2 + m]
                own = y - top + (first + r)
                bias_sum += tl.where((own >= y) & (own < end), total, 0.0)

    part = batch * tiles + tile
    if weight_sums is not None:
        weight_sums += part * (KH * KW) * channels
        for tap in tl.static_range(KH * KW):
            if CHANNELS_LAST:  # [part, kh*kw, C]
                pointers = weight_sums + tap * channels + channel
            else:  # [part, C, kh*kw]
                pointers = weight_sums + channel * (KH * KW) + tap
            total = tl.sum(tap_sums[tap], axis=0, keep_dims=CHANNELS_LAST)
            tl.store(pointers, total, mask=present)
    if bias_sums is not None:
        total = tl.sum(bias_sum, axis=0, keep_dims=CHANNELS_LAST)
        tl.store(bias_sums + part * channels + channel, total, mask=present)
