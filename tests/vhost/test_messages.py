"""The codec of vhost-user: vectors shared with the Rust side, properties, and every refusal by name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpair.vhost import messages as m
from qpair.vhost.framing import FLAG_NEED_REPLY, FLAG_REPLY, PAYLOAD_BYTES_MAX, Assembler, Frame, Header, ProtocolError, Request

VECTORS = Path(__file__).parent.parent / "vectors" / "vhost"
CONFIG = bytes.fromhex(
    "0000020000000000 00000000 7e000000 0000 00 00 00020000 03 00 0100 08000000 01 00 0400"
    "ffff7f00 01000000 08000000 ffff7f00 01000000 01 000000"
)

REQUESTS: list[tuple[str, m.Message, bool, int]] = [
    ("get_features", m.GetFeatures(), False, 0),
    ("set_protocol_features", m.SetProtocolFeatures(0x209), False, 0),
    (
        "set_mem_table",
        m.SetMemTable(
            (m.MemoryRegion(0, 0x200000, 0x7F0A00000000, 0), m.MemoryRegion(1 << 32, 0xFFF000, 0x7F0A40000000, 0x200000)),
        ),
        True,
        2,
    ),
    ("set_vring_num", m.SetVringNum(1, 256), True, 0),
    ("set_vring_addr", m.SetVringAddr(1, 0, desc=0x7F0A00001000, used=0x7F0A00003000, avail=0x7F0A00002000, log=0), False, 0),
    ("set_vring_kick", m.SetVringKick.of(2), False, 1),
    ("set_vring_call_without_fd", m.SetVringCall.of(3, has_fd=False), True, 0),
    ("get_vring_base", m.GetVringBase(1), False, 0),
    ("set_vring_enable", m.SetVringEnable(0, 1), True, 0),
    ("get_config", m.GetConfig.of(60), False, 0),
    ("set_config", m.SetConfig(32, 1, 0, b"\0"), True, 0),
    ("add_mem_reg", m.AddMemReg(m.MemoryRegion(0x7F0A00000000, 0x1234, 0x7F0A00000000, 0x1000)), True, 1),
    ("rem_mem_reg", m.RemMemReg(m.MemoryRegion(0x7F0A00000000, 0x1234, 0x7F0A00000000, 0)), True, 0),
    ("set_inflight_fd", m.SetInflightFd(0x1400, 0, 2, 256), True, 1),
    ("set_log_base", m.SetLogBase(0x8000, 0), False, 1),
    ("set_log_fd", m.SetLogFd(), False, 1),
    ("set_backend_req_fd", m.SetBackendReqFd(), True, 1),
    ("set_status", m.SetStatus(0xF), False, 0),
    ("get_status", m.GetStatus(), False, 0),
]
REPLIES: list[tuple[str, m.Message | m.Ack]] = [
    ("features_reply", m.Features(0x170007246)),
    ("vring_base_reply", m.VringBase(1, 0xFFFE)),
    ("config_reply", m.ConfigReply(0, 60, 0, CONFIG)),
    ("max_mem_slots_reply", m.MaxMemSlots(64)),
    ("status_reply", m.DeviceStatus(0xF)),
    ("ack", m.Ack(Request.SET_MEM_TABLE, 22)),
]


def frame_of(data: bytes, fds: int = 0) -> Frame:
    assembler = Assembler()
    frame = assembler.feed(data[:12], range(1000, 1000 + fds))
    if frame is None and len(data) > 12:
        frame = assembler.feed(data[12:])
    assert frame is not None, f"{len(data)} bytes are no whole message"
    return frame


def message(request: int, payload: bytes, *, flags: int = 1, size: int | None = None) -> bytes:
    return struct.pack("<III", request, flags, len(payload) if size is None else size) + payload


def refusal(data: bytes, fds: int = 0) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        m.decode_request(frame_of(data, fds))
    return caught.value


@pytest.mark.parametrize(("name", "expected", "need_reply", "fds"), REQUESTS, ids=[entry[0] for entry in REQUESTS])
def test_a_request_vector_decodes_and_encodes_to_itself(name: str, expected: m.Message, need_reply: bool, fds: int) -> None:
    data = (VECTORS / f"{name}.bin").read_bytes()
    frame = frame_of(data, fds)
    assert m.decode_request(frame) == expected
    assert frame.header.needs_reply is need_reply
    assert m.encode(expected, need_reply=need_reply) == data


@pytest.mark.parametrize(("name", "expected"), REPLIES, ids=[entry[0] for entry in REPLIES])
def test_a_reply_vector_decodes_and_encodes_to_itself(name: str, expected: m.Message | m.Ack) -> None:
    data = (VECTORS / f"{name}.bin").read_bytes()
    assert m.decode_reply(frame_of(data), to=expected.request) == expected
    assert m.encode(expected, reply=True) == data


# -- refusals -------------------------------------------------------------------------------------


def test_a_size_of_four_gibibytes_is_refused_at_the_header() -> None:
    with pytest.raises(ProtocolError) as caught:
        Assembler().feed(message(Request.SET_FEATURES, b"", size=0xFFFFFFFF))
    assert str(caught.value) == f"SET_FEATURES: payload size is 4294967295, must be at most {PAYLOAD_BYTES_MAX} bytes"


@pytest.mark.parametrize("version", [0, 2, 3])
def test_another_version_is_refused(version: int) -> None:
    error = refusal(message(Request.GET_FEATURES, b"", flags=version))
    assert (error.where, error.field, error.value, error.limit) == ("GET_FEATURES", "version", version, "1")


@pytest.mark.parametrize("number", [0, 44, 99, 0xFFFFFFFF])
def test_an_unknown_request_is_refused(number: int) -> None:
    error = refusal(message(number, b""))
    assert str(error) == f"header: request is {number}, must be a known request, 1 to 43"


@pytest.mark.parametrize("request_", [Request.SET_DEVICE_STATE_FD, Request.SEND_RARP, Request.IOTLB_MSG, Request.GPU_SET_SOCKET])
def test_a_request_that_is_no_block_devices_is_refused_by_name(request_: Request) -> None:
    error = refusal(message(request_, bytes(8)))
    assert str(error) == f"header: request is {request_.name} ({request_:d}), must be one that a block device supports"


def test_a_reply_sent_as_a_request_is_refused() -> None:
    error = refusal(message(Request.GET_FEATURES, b"", flags=1 | FLAG_REPLY))
    assert (error.where, error.field, error.value) == ("GET_FEATURES", "flags", "0x5")


@pytest.mark.parametrize("size", [0, 7, 9, 16])
def test_a_payload_of_another_size_is_refused(size: int) -> None:
    error = refusal(message(Request.SET_FEATURES, bytes(size)))
    assert str(error) == f"SET_FEATURES: payload size is {size}, must be 8 bytes"


def region(guest: int, size: int, user: int = 0, offset: int = 0) -> bytes:
    return struct.pack("<QQQQ", guest, size, user, offset)


def table(count: int, *regions: bytes) -> bytes:
    return message(Request.SET_MEM_TABLE, struct.pack("<II", count, 0) + b"".join(regions))


def test_nine_regions_are_refused() -> None:
    assert str(refusal(table(9), 8)) == "SET_MEM_TABLE: number of regions is 9, must be at most 8"
    assert str(refusal(table(0xFFFFFFFF), 8)) == "SET_MEM_TABLE: number of regions is 4294967295, must be at most 8"


def test_a_table_shorter_than_its_count_is_refused() -> None:
    assert str(refusal(table(2, region(0, 4096)), 2)) == "SET_MEM_TABLE: payload size is 40, must be 72 bytes for 2 regions"


def test_a_table_that_is_padded_to_eight_regions_is_taken() -> None:
    decoded = m.decode_request(frame_of(table(1, region(0, 4096), bytes(7 * 32)), 1))
    assert decoded == m.SetMemTable((m.MemoryRegion(0, 4096, 0, 0),))


@pytest.mark.parametrize("fds", [0, 1, 3])
def test_a_table_with_another_number_of_descriptors_is_refused(fds: int) -> None:
    error = refusal(table(2, region(0, 4096), region(4096, 4096)), fds)
    assert str(error) == f"SET_MEM_TABLE: number of descriptors is {fds}, must be 2"


def test_an_empty_region_is_refused() -> None:
    assert str(refusal(table(1, region(0, 0)), 1)) == "SET_MEM_TABLE: size of region 0 is 0, must be more than 0 bytes"


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("guest_address", region(2**64 - 4096, 4097)),
        ("user_address", region(0, 4096, 2**64 - 1)),
        ("mmap_offset", region(0, 2**64 - 1, 0, 2)),
    ],
)
def test_a_region_that_wraps_the_address_space_is_refused(field: str, data: bytes) -> None:
    error = refusal(table(1, data), 1)
    assert error.field == f"{field} of region 0"


def test_more_than_eight_descriptors_are_refused_before_anything_else() -> None:
    assembler = Assembler()
    with pytest.raises(ProtocolError, match=r"^message: number of descriptors is 9, must be at most 8$"):
        assembler.feed(b"\1", range(9))
    assert assembler.fds == list(range(9)), "whoever closes them finds them"


@pytest.mark.parametrize("kind", [m.SetVringKick, m.SetVringCall, m.SetVringErr])
def test_a_vring_file_needs_exactly_the_descriptor_it_announces(kind: type[m.SetVringKick]) -> None:
    name = kind.request.name
    assert str(refusal(m.encode(kind.of(1)), 0)) == f"{name}: number of descriptors is 0, must be 1"
    assert str(refusal(m.encode(kind.of(1, has_fd=False)), 1)) == f"{name}: number of descriptors is 1, must be 0"
    assert refusal(message(kind.request, struct.pack("<Q", 1 << 9)), 1).field == "payload"


def test_descriptors_beside_a_message_that_takes_none_are_refused() -> None:
    assert str(refusal(m.encode(m.GetFeatures()), 2)) == "GET_FEATURES: number of descriptors is 2, must be 0"


@pytest.mark.parametrize(
    ("offset", "size", "length", "expected"),
    [
        (0, 257, 0, "GET_CONFIG: size is 257, must be at most 256 bytes"),
        (0, 0xFFFFFFFF, 0, "GET_CONFIG: size is 4294967295, must be at most 256 bytes"),
        (200, 100, 100, "GET_CONFIG: offset is 200, must be at most 156 for a size of 100"),
        (0xFFFFFFFF, 1, 1, "GET_CONFIG: offset is 4294967295, must be at most 255 for a size of 1"),
        (0, 60, 59, "GET_CONFIG: payload size is 71, must be 72 bytes for a size of 60"),
    ],
)
def test_a_configuration_range_outside_256_bytes_is_refused(offset: int, size: int, length: int, expected: str) -> None:
    data = message(Request.GET_CONFIG, struct.pack("<III", offset, size, 0) + bytes(length))
    assert str(refusal(data)) == expected


def test_a_short_configuration_head_is_refused() -> None:
    assert str(refusal(message(Request.SET_CONFIG, bytes(11)))) == "SET_CONFIG: payload size is 11, must be at least 12 bytes"


def test_an_enable_that_is_neither_zero_nor_one_is_refused() -> None:
    assert str(refusal(message(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 2)))) == "SET_VRING_ENABLE: enable is 2, must be 0 or 1"


def test_the_documented_twenty_bytes_of_inflight_are_taken_too() -> None:
    payload = struct.pack("<QQHH", 4096, 0, 2, 128)
    assert m.decode_request(frame_of(message(Request.GET_INFLIGHT_FD, payload))) == m.GetInflightFd(4096, 0, 2, 128)
    assert str(refusal(message(Request.GET_INFLIGHT_FD, payload[:19]))) == "GET_INFLIGHT_FD: payload size is 19, must be 20 or 24 bytes"


@pytest.mark.parametrize(
    ("size", "offset", "expected"),
    [
        (0, 0, "SET_LOG_BASE: mmap_size is 0, must be more than 0 bytes"),
        (2, 2**64 - 1, "SET_LOG_BASE: mmap_offset is 0xffffffffffffffff, must be at most 2**64 - 0x2, its size"),
    ],
)
def test_a_log_that_is_empty_or_wraps_is_refused(size: int, offset: int, expected: str) -> None:
    assert str(refusal(message(Request.SET_LOG_BASE, struct.pack("<QQ", size, offset)), 1)) == expected


@pytest.mark.parametrize("kind", [m.SetLogBase, m.SetLogFd, m.SetBackendReqFd])
@pytest.mark.parametrize("fds", [0, 2])
def test_what_brings_a_descriptor_brings_one(kind: type[m.Message], fds: int) -> None:
    data = m.encode(m.SetLogBase(4096, 0) if kind is m.SetLogBase else kind())
    assert str(refusal(data, fds)) == f"{kind.request.name}: number of descriptors is {fds}, must be 1"


def test_a_log_base_of_the_kind_without_shared_memory_is_refused() -> None:
    assert str(refusal(message(Request.SET_LOG_BASE, bytes(8)), 1)) == "SET_LOG_BASE: payload size is 8, must be 16 bytes"


def test_a_status_beyond_eight_bits_is_refused() -> None:
    assert str(refusal(message(Request.SET_STATUS, struct.pack("<Q", 0x100)))) == "SET_STATUS: status is 0x100, must be at most 0xff"


def test_a_refused_configuration_is_a_reply_without_payload() -> None:
    refused = m.ConfigReply(0, 0, 0, b"")
    data = m.encode(refused, reply=True)
    assert len(data) == 12
    decoded = m.decode_reply(frame_of(data), to=Request.GET_CONFIG)
    assert isinstance(decoded, m.ConfigReply)
    assert decoded.refused


def test_a_reply_to_something_else_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"^reply: request is GET_FEATURES, must be GET_QUEUE_NUM, which was asked$"):
        m.decode_reply(frame_of(m.encode(m.Features(0), reply=True)), to=Request.GET_QUEUE_NUM)
    with pytest.raises(ProtocolError, match=r"^GET_FEATURES: flags is 0x1, must be those of a reply$"):
        m.decode_reply(frame_of(m.encode(m.Features(0))), to=Request.GET_FEATURES)


def test_feeding_more_than_is_wanted_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match=r"^fed 13 bytes where 12 are wanted$"):
        Assembler().feed(bytes(13))


# -- properties -----------------------------------------------------------------------------------


def pieces(data: bytes, cuts: list[int], fds: list[int]) -> tuple[list[Frame], ProtocolError | None]:
    """Feed ``data`` in pieces of at most the given sizes; descriptors come with the first byte of the first message."""
    assembler, frames, position, turn = Assembler(), [], 0, 0
    try:
        while position < len(data):
            step = min(cuts[turn % len(cuts)], assembler.wanted)
            frame = assembler.feed(data[position : position + step], fds if position == 0 else ())
            position, turn = position + min(step, len(data) - position), turn + 1
            if frame is not None:
                frames.append(frame)
    except ProtocolError as error:
        return frames, error
    return frames, None


headers = st.builds(
    lambda request, flags, size: struct.pack("<III", request, flags, size),
    st.one_of(st.sampled_from(list(Request)).map(int), st.integers(0, 2**32 - 1)),
    st.one_of(st.sampled_from([1, 1 | FLAG_REPLY, 1 | FLAG_NEED_REPLY]), st.integers(0, 2**32 - 1)),
    st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1)),
)
streams = st.one_of(st.binary(max_size=600), st.tuples(headers, st.binary(max_size=600)).map(b"".join))


@given(streams, st.integers(0, 10))
def test_any_bytes_decode_or_are_refused_by_name(data: bytes, fds: int) -> None:
    frames, error = pieces(data, [10_000], list(range(fds)))
    for frame in frames:
        for decode in (m.decode_request, lambda f: m.decode_reply(f, to=f.header.request)):
            try:
                decode(frame)
            except ProtocolError as refused:
                error = refused
    if error is not None:
        assert error.where
        assert error.field
        assert error.limit
        assert str(error.value) in str(error)


@given(streams, st.lists(st.integers(1, 40), min_size=1), st.integers(0, 10))
def test_pieces_give_the_same_frames_and_the_same_error_as_the_whole(data: bytes, cuts: list[int], fds: int) -> None:
    whole, error = pieces(data, [10_000], list(range(fds)))
    cut, cut_error = pieces(data, cuts, list(range(fds)))
    assert cut == whole
    assert str(cut_error) == str(error)


@given(st.sampled_from(REQUESTS))
def test_a_message_fed_byte_by_byte_is_the_same_message(entry: tuple[str, m.Message, bool, int]) -> None:
    name, expected, _, fds = entry
    frames, error = pieces((VECTORS / f"{name}.bin").read_bytes(), [1], list(range(fds)))
    assert error is None
    assert [m.decode_request(frame) for frame in frames] == [expected]


@given(st.sampled_from(REQUESTS), st.data())
def test_a_truncated_message_never_becomes_a_frame(entry: tuple[str, m.Message, bool, int], data: st.DataObject) -> None:
    whole = (VECTORS / f"{entry[0]}.bin").read_bytes()
    frames, error = pieces(whole[: data.draw(st.integers(0, len(whole) - 1))], [10_000], [])
    assert (frames, error) == ([], None)


u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
regions = st.builds(m.MemoryRegion, st.integers(0, 2**48), st.integers(1, 2**48), st.integers(0, 2**48), st.integers(0, 2**48))
requests = st.one_of(
    st.builds(m.SetFeatures, u64),
    st.builds(m.SetMemTable, st.lists(regions, max_size=8).map(tuple)),
    st.builds(m.SetVringNum, u32, u32),
    st.builds(m.SetVringBase, u32, u16),
    st.builds(m.SetVringAddr, u32, u32, u64, u64, u64, u64),
    st.builds(m.SetVringKick.of, st.integers(0, 255), has_fd=st.booleans()),
    st.builds(m.SetVringEnable, u32, st.integers(0, 1)),
    st.integers(0, 256).flatmap(
        lambda size: st.builds(m.SetConfig, st.integers(0, 256 - size), st.just(size), u32, st.binary(min_size=size, max_size=size))
    ),
    st.builds(m.SetInflightFd, st.integers(0, 2**63), st.integers(0, 2**62), u16, u16),
    st.builds(m.SetLogBase, st.integers(1, 2**63), st.integers(0, 2**62)),
    st.builds(m.SetStatus, st.integers(0, 255)),
    st.sampled_from([m.SetLogFd(), m.SetBackendReqFd(), m.GetStatus()]),
)


@given(requests, st.booleans())
def test_what_is_encoded_decodes_to_itself(request_: m.Message, need_reply: bool) -> None:
    frame = frame_of(m.encode(request_, need_reply=need_reply), request_.fd_count()[0])
    assert m.decode_request(frame) == request_
    assert Header.decode(frame.header.encode()) == frame.header
